"""Silence while a library works: none of its bars and advice between our own lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet(*logs: Any) -> Iterator[None]:
    """While open, no tqdm bar is drawn, and of `logs` (`datasets.utils.logging` and its like) only errors are said.

    What was set before comes back. Errors still raise.
    """
    from unittest.mock import patch  # takes long to import, and --help imports this file

    from tqdm.std import tqdm

    begin = tqdm.__init__

    def silent(self: Any, *given: Any, **named: Any) -> None:  # some callers say disable=False themselves
        begin(self, *given, **{**named, "disable": True})

    with ExitStack() as undo:
        for log in logs:
            undo.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
        undo.enter_context(patch.object(tqdm, "__init__", silent))
        yield
