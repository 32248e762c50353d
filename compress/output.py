"""Where a result goes: what is refused, the work folder beside OUT, and the rename that makes a result appear.

Nothing that is not ours is ever removed. One run at a time writes an OUT: a lock beside it is held for the whole run.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.checkpoint.disk import existing
from compress.checkpoint.headers import read_json
from compress.checkpoint.source import Source
from compress.curves import DOCUMENT
from compress.errors import UserError
from compress.machine import Progress

MARK = ".autoglm-compress"  # stands in every work folder of ours
RECEIPT = "receipt.json"  # stands in every result of a run
RESULTS = (RECEIPT, DOCUMENT)  # what shows a result of ours, of a run or of an analysis


def rejected(out: Path) -> Path:
    """Where a result lies whose gates failed."""
    return out.with_name(out.name + ".rejected")


def check_out(out: Path, overwrite: bool, mark: str = RECEIPT) -> None:
    """Refuse an OUT that exists (unless it is empty, or a result of ours that may be replaced and holds no other) or
    cannot be written, a foreign OUT.work, and an OUT.rejected that no gate has rejected.

    `mark`: the file that shows a result of ours.
    """
    # one that was made for us: nothing can be lost; in the place of a mount nothing can be renamed
    empty = out.is_dir() and not any(out.iterdir()) and not out.is_mount()
    if not out.name:
        raise UserError(f"{out}: not a folder that can be written")
    if out.is_symlink():
        raise UserError(f"{out}: a link; name the folder it leads to")
    for folder in (work_of(out), rejected(out)):
        if folder.is_symlink():
            raise UserError(f"{folder}: a link, where a run puts a folder of its own", hint="move it away")
    for folder in (out, rejected(out)):
        if os.path.lexists(folder) and not (folder / mark).is_file() and not (folder == out and empty):
            what = f"no {mark}" if folder.is_dir() else "no folder"
            raise UserError(
                f"{folder}: exists already and is not a result of ours ({what}); it is not replaced",
                hint="move it away, or give another output folder",
            )
    if mark == RECEIPT and not _was_rejected(rejected(out)):
        raise UserError(
            f"{rejected(out)}: exists already, and no gate has rejected it; it is not replaced",
            hint="move it away, or give another output folder",
        )
    if out.exists() and not empty:
        if not overwrite:
            raise UserError(f"{out}: exists already", hint="--overwrite replaces it")
        inside = sorted(path.parent for name in RESULTS for path in out.rglob(name) if path.parent != out)
        if inside:
            raise UserError(
                f"{out}: holds another result, {inside[0]}; it is not replaced",
                hint="move that away, or give another output folder",
            )
    _check_work(work_of(out))
    try:
        check_takes(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _was_rejected(folder: Path) -> bool:
    """Whether there is nothing, or a result whose receipt names gates that failed."""
    if not folder.exists():
        return True
    gates = read_json(folder / RECEIPT).get("gates")
    return isinstance(gates, dict) and bool(gates.get("failed"))


def _check_work(work: Path) -> None:
    if os.path.lexists(work) and not (work / MARK).is_file():
        raise UserError(f"{work}: exists and is not a work folder of ours")


def check_takes(path: Path) -> None:
    """OSError where `path` cannot be made: by the nearest folder that exists. Leaves nothing behind."""
    with tempfile.TemporaryFile(dir=existing(path.absolute().parent)):
        pass  # tried, not asked: permission bits do not tell of a read-only file system


def check_apart(out: Path, sources: Sequence[Source], texts: Iterable[Path] = ()) -> None:
    """Refuse sources and `texts`, files and folders, that OUT, OUT.work or OUT.rejected would replace or
    remove, and an OUT inside a source."""
    places = [each.resolve() for each in (out, work_of(out), rejected(out))]
    for source in sources:
        theirs = source.folder.resolve()
        for mine in places:
            if mine == theirs or mine in theirs.parents or theirs in mine.parents:
                raise UserError(f"{mine}: lies inside the source {source.name}, or the source inside it")
    for path in texts:
        for mine in places:
            if mine == path.resolve() or mine in path.resolve().parents:
                raise UserError(f"{mine}: would replace {path}, which is read", hint="give another output folder")


@contextmanager
def locked(out: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold OUT's lock. When another run holds it: UserError, or with `wait` that is called once and the lock awaited.

    The kernel frees the lock with the process, however it ends.
    """
    path = out.with_name(f".{out.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, wait)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror})") from None
    if descriptor is None:
        raise UserError(f"{out}: another run is writing it", hint="--wait waits until it has ended")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def claimed(out: Path, overwrite: bool, wait: bool, progress: Progress, mark: str = RECEIPT) -> Iterator[None]:
    """Hold OUT's lock, and with `wait` wait for another run that holds it; as `locked` and, after that, `check_out`."""
    with locked(out, (lambda: progress.note(f"{out}: another run is writing it; waiting")) if wait else None):
        if wait:
            check_out(out, overwrite, mark)  # the other run may have made it
        yield


def _lock(path: Path, wait: Callable[[], None] | None) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                os.close(descriptor)
                return None
            wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # who held it has removed the file: of those that waited on it, only one may go on, on a file that is there
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)


def work_folder(out: Path, fresh: bool) -> Path:
    """OUT.work: what an earlier run of ours left there, or with `fresh` an empty one."""
    work = work_of(out)
    _check_work(work)
    try:
        if fresh and work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        (work / MARK).touch()
    except OSError as error:
        raise UserError(f"{work}: cannot be written ({error.strerror})") from None
    return work


def work_of(out: Path) -> Path:
    """OUT.work."""
    return out.with_name(out.name + ".work")


def publish(folder: Path, target: Path) -> None:
    """Rename the finished folder to its place; an older result goes only once the new one stands."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.old-*"):  # of a run that was killed right here
        shutil.rmtree(left)
    if not target.exists():
        os.rename(folder, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
    old = aside / target.name
    os.rename(target, old)
    try:
        os.rename(folder, target)
    except BaseException:
        os.rename(old, target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)
