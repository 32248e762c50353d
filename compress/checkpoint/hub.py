"""Fetch a model from the Hugging Face hub: only what a checkpoint folder needs, with one line when it cannot be had.

Torch-free. Files go to the hub's own cache, where other tools find them; HF_HUB_OFFLINE and the login are respected.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from compress.errors import MachineError, UserError
from compress.machine import Progress, Task

ALLOWED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
    "README.md",  # its front matter names the licence, for the card of what is made from it
)
# subfolders hold other formats of the same weights (original/, onnx/); consolidated* is Mistral's second copy
IGNORED = ("*/*", "consolidated*")

# the HTTP and Xet libraries have error classes of their own, and which they are changes with the hub's version
NETWORK = ("aiohttp", "httpx", "httpx2", "requests", "hf_xet", "huggingface_hub")


def fetch(repository: str, revision: str | None, progress: Progress) -> Path:
    """The snapshot folder of `repository` at `revision` (a branch, tag or commit; None = main); its name is the commit.

    UserError: no such repository or revision, gated, no safetensors, or not in the cache while offline.
    MachineError: the hub cannot be reached, or the disk is full.
    """
    import huggingface_hub

    what: dict[str, Any] = {
        "repo_id": repository,
        "revision": revision,
        "allow_patterns": list(ALLOWED),
        "ignore_patterns": list(IGNORED),
    }
    with told_in_one_line(repository, revision):
        size = _bytes_to_fetch(what)
        if size:
            with progress.task(f"fetching {repository}", total=size) as task:
                folder = Path(huggingface_hub.snapshot_download(**what, tqdm_class=_reporting_to(task)))
        else:
            folder = Path(huggingface_hub.snapshot_download(**what))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{repository}: has no safetensors weights on the hub (pickles can run code and are not read)")
    return folder


def _bytes_to_fetch(what: dict[str, Any]) -> int:
    import huggingface_hub
    from huggingface_hub.errors import DryRunError

    try:
        files = huggingface_hub.snapshot_download(**what, dry_run=True)
    except DryRunError:  # the hub did not answer: the real call looks in the cache and says what is wrong
        return 0
    return sum(file.file_size for file in files if file.will_download)


def _reporting_to(task: Task) -> type:
    """A tqdm class that draws nothing and passes the bytes written on to `task`."""
    from tqdm import tqdm

    class Forwarding(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # the hub counts files, bytes received and bytes written in three bars; the last is the size on disk
            self._counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            self._nowhere = open(os.devnull, "w")  # noqa: SIM115
            super().__init__(*args, **{**kwargs, "file": self._nowhere})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                task.advance(int(n))
            return bool(super().update(n))

        def close(self) -> None:
            super().close()
            self._nowhere.close()

    return Forwarding


@contextmanager
def told_in_one_line(
    repository: str, revision: str | None, kind: Literal["model", "dataset"] = "model"
) -> Iterator[None]:
    """What goes wrong within, as one line about `repository`: UserError, or MachineError for network and disk."""
    from huggingface_hub import constants, errors

    here = "no folder here, and " if kind == "model" else ""  # a dataset's name is never a folder's

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repository}: gated on the hub", hint="accept its terms on its page, then log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository}: the hub has no revision '{revision}' of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repository}: not found{', neither as a folder here nor' if here else ''} on the hub",
            hint=f"a private {kind} needs a login: hf auth login",
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{repository}: not a hub id ({error})") from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{repository}: {here}not complete in the hub's cache; HF_HUB_OFFLINE forbids to fetch it"
            ) from None
        cause = type(error.__cause__).__name__
        raise MachineError(f"{repository}: {here}the hub cannot be reached ({cause})") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"{repository}: fetching failed: the disk is full") from None
        raise MachineError(f"{repository}: fetching failed ({_first_line(error)})") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in NETWORK:
            raise
        raise MachineError(f"{repository}: fetching failed ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
