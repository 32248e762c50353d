"""Pieces of the page of measurements: tables, numbers, verdicts, and where a number comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

MIB, GIB = 2**20, 2**30
Row = dict[str, Any]


def by_setting(rows: list[Row], apart: Sequence[str]) -> dict[str, list[Row]]:
    """Rows whose keys agree in all but `apart`, under that rest as JSON."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["key"].items() if key not in apart}
        groups.setdefault(json.dumps(rest), []).append(row)
    return groups


def described(text: str) -> str:
    """A setting of `by_setting` as words."""
    return ", ".join(f"{key} {value}" for key, value in json.loads(text).items())


def provenance(rows: list[Row]) -> str:
    """Machines, versions and dates of the rows, each machine with its versions once; behind them the commits."""
    seen: dict[str, tuple[list[str], list[str]]] = {}
    for row in rows:
        host, made = row["machine"], dict(row["versions"])
        commit = made.pop("commit", "unknown")
        where = f"{host['cpu']}, {host['cores']} cores, {host['memory'] / 2**30:.0f} GiB"
        what = ", ".join(f"{name} {value}" for name, value in made.items())
        dates, commits = seen.setdefault(f"{where}; {what}", ([], []))
        dates.append(row["date"][:10])
        commits.append(commit)
    lines = []
    for text, (dates, commits) in seen.items():
        span = min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
        noun = "commit" if len(set(commits)) == 1 else "commits"
        lines.append(f"Measured {span} on {text}; {noun} {', '.join(dict.fromkeys(commits))}.\n")
    return "\n".join(lines)


def verdict(what: str, found: float, most: float, unit: str, digits: int, note: str = "") -> str:
    """A number that must be met, and whether it is; `note` stands behind that."""
    unit, note = f" {unit}" if unit else "", f"; {note}" if note else ""
    met = "met" if found <= most else "**missed**"
    return f"- {what}: {found:.{digits}f}{unit}, at most {most:g}{unit}: {met}{note}\n"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
