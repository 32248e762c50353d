"""WikiText-2, where it lies beside the repository, and the options of the scripts that judge models on texts.

Texts of another kind are in bench/_far_texts.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from _results import ROOT, options, say

from compress.machine import Machine

DATA = ROOT.parent / "shared" / "data"


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
