"""What every test stands on: no network for models, one torch thread a process; and what several files ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# set before anything imports torch or transformers, and handed on to the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of demo:smollm2-135m, converted on first use; fails with the one line that names the remedy."""
    from compress.checkpoint.source import locate
    from compress.errors import CompressError

    try:
        return locate("demo:smollm2-135m").folder
    except CompressError as error:
        pytest.fail(error.message, pytrace=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread, whatever a test before has set: bytes depend on it, and two wait for each other longer than a
    pico model computes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line here: exit code, stdout, stderr."""
    from compress import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
