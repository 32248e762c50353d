"""Render bench/results/*.json as docs/benchmarks.md: tables, and for every number that must be met, whether it is.

    .venv/bin/python bench/tables.py [--check]

Every number on the page comes from a row on file; what was not measured says so. --check writes nothing and fails
when the page is not what the results give.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from _foundation_sections import foundation, fuzz, kills, peers_quant
from _markdown import Row, provenance
from _pruning_picture import draw
from _pruning_sections import ablation, kv_merging, pruning, pruning_speed
from _results import ROOT, options
from _sections import damping, demo, memory, multiple_choice, sampling, startup

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = "pictures/pruning.png"  # beside the page

INTRO = """\
# Benchmarks

Written by `bench/tables.py` from `bench/results/*.json`; every row there carries its machine, versions and date. Each
section names the command that measures it again; `make bench` runs them all. Ratios are times dense, lower is better;
gaps under 3 % are noise: one small model, one seed.
"""
# what every row of a file has; rows that lack it were measured in another way and count as not measured
NEEDED = {"memory": "stock_load", "kills": "killed"}


def main() -> None:
    given = _arguments()
    page = render(given.results)
    if given.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            raise SystemExit(f"{PAGE}: not what {given.results} gives; run bench/tables.py")
        return
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(page, encoding="utf-8")
    draw(_rows(given.results, "pruning"), given.output.parent / PICTURE)
    print(given.output)


def render(folder: Path) -> str:
    """The whole page."""
    sections: tuple[tuple[str, str, Callable[[list[Row]], str]], ...] = (
        ("The demo", "demo", demo),
        ("Pruning quality on WikiText-2", "pruning", pruning),
        ("What each part of pruning gives", "pruning", ablation),
        ("KV heads merged", "kv_merging", kv_merging),
        ("Multiple choice", "multiple_choice", multiple_choice),
        ("Pruning speed", "pruning_speed", pruning_speed),
        ("Damping", "damping", damping),
        ("Memory", "memory", memory),
        ("Full width", "foundation", foundation),
        ("Kills", "kills", kills),
        ("Damaged input", "fuzz", fuzz),
        ("Peers: 8-bit weights, and pruning in memory", "peers_quant", peers_quant),
        ("Text that a model writes itself", "sampling", sampling),
        ("Starting", "startup", startup),
    )
    parts = [INTRO]
    for title, name, section in sections:
        rows = _rows(folder, name)
        rows = [row for row in rows if name not in NEEDED or NEEDED[name] in row["key"] | row["found"]]
        body = f"{section(rows)}\n{provenance(rows)}" if rows else "Not measured yet.\n"
        parts.append(f"## {title}\n\n`.venv/bin/python bench/{name}.py`\n\n{body}")
    return "\n".join(parts)


def _rows(folder: Path, name: str) -> list[Row]:
    """The rows on file; none where there is no file."""
    file = folder / f"{name}.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return rows


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
