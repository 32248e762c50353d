"""Render bench/results/*.json as docs/benchmarks.md: tables, and for every number that must be met, whether it is.

    .venv/bin/python bench/tables.py [--check]

Every number on the page comes from a row on file; what was not measured says so. --check writes nothing and fails
when the page is not what the results give.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _results import ROOT, options

PAGE = ROOT / "docs" / "benchmarks.md"
MIB = 2**20
Row = dict[str, Any]

METHODS = {
    "wanda": "wanda + refit (default)",
    "obs": "obs + refit",
    "magnitude": "magnitude + refit",
    "wanda-sp": "Wanda-sp (our wanda, no refit)",
    "magnitude-no-refit": "magnitude, no refit",
    "flap": "FLAP, with its biases, uniform widths",
    "taylor": "first-order Taylor (LLM-Pruner's score), 10 windows",
    "torch-pruning-magnitude": "Torch-Pruning, group magnitude",
    "torch-pruning-taylor": "Torch-Pruning, group Taylor, 10 windows",
}
SHAPES = {
    (0.20, None): "FFN, 20 %",
    (0.35, None): "FFN, 35 %",
    (0.20, 0.3334): "heads, 20 %",
    (0.35, 0.3334): "heads, 35 %",
}
PRUNING_MUST = {(0.20, None): 1.60, (0.35, None): 2.45, (0.20, 0.3334): 1.75, (0.35, 0.3334): 2.60}
STARTUP = {
    "python": ("`python -c pass`", None),
    "torch": ('`python -c "import torch"`', None),
    "help": ("`autoglm-compress --help`", 0.5),
    "prune-help": ("`autoglm-compress prune --help`", None),
    "plan": ("`autoglm-compress plan`, 10.3 B from headers", 3.0),
}
DEMO_SECONDS, DEMO_RATIO = 600, 1.5
PRUNING_MEMORY, MEMORY_GROWTH = 512 * MIB, 1.10

INTRO = """\
# Benchmarks

Written by `bench/tables.py` from `bench/results/*.json`; every row there carries its machine, versions and date. Each
section names the command that measures it again; `make bench` runs them all. Ratios are times dense, lower is better;
gaps under 3 % are noise: one small model, one seed.
"""
PRUNING = """\
One shot, no training. Calibrated on the WikiText-2 validation split, judged by `bench/judge.py` (stock transformers,
nothing of this package) on the test split and on a second text that no method is calibrated on: fiction (*Alice's
Adventures in Wonderland*), or where it could not be had the builtin documentation. Share of the decoder layers'
attention + FFN parameters that goes: from the FFN alone, or ("heads") with one query head of every KV head's group.
All methods cut to the same widths in every layer. Wanda-sp and magnitude are our own code without the refit; FLAP and
the Taylor score are re-implemented; Torch-Pruning is its own code, FFN only. FLAP's biases on o_proj and down_proj have
no slot in stock Llama: its model lives in memory only.
"""
DAMPING = """\
FFN only, 20 %, times dense. The ridge is lambda times the mean of H's diagonal, the column's own entry, or the median.
Calibrated on three quarters of the WikiText-2 validation split and judged on the last quarter: a default chosen from
this table has not seen the test split.
"""
MEMORY = """\
Peak of the whole process above a Python that has only imported torch, transformers and this package. `limited`: with
`--memory` just above what the plan asks for, so that a result which needs more is checked by streaming only. `default`:
without it; the self-check then also loads the whole result in stock transformers wherever memory is free.
"""


def main() -> None:
    given = _arguments()
    page = render(given.results)
    if given.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            raise SystemExit(f"{PAGE}: not what {given.results} gives; run bench/tables.py")
        return
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(page, encoding="utf-8")
    print(given.output)


def render(folder: Path) -> str:
    """The whole page."""
    sections: tuple[tuple[str, str, Callable[[list[Row]], str]], ...] = (
        ("The demo", "demo", demo),
        ("Pruning quality on WikiText-2", "pruning", pruning),
        ("Damping", "damping", damping),
        ("Memory", "memory", memory),
        ("Starting", "startup", startup),
    )
    parts = [INTRO]
    for title, name, section in sections:
        file = folder / f"{name}.json"
        rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
        body = f"{section(rows)}\n{_provenance(rows)}" if rows else "Not measured yet.\n"
        parts.append(f"## {title}\n\n`.venv/bin/python bench/{name}.py`\n\n{body}")
    return "\n".join(parts)


def demo(rows: list[Row]) -> str:
    """One table a run: every stage, then the numbers to meet."""
    parts = []
    for row in rows:
        found = row["found"]
        header = ("stage", "perplexity", "times dense", "KL", "top-1", "parameters", "MB", "s", "peak MiB", "predicted")
        table = _table(header, (_stage(stage) for stage in found["stages"]))
        last = found["stages"][-1]
        distilled = [stage for stage in found["stages"] if stage["stage"].endswith("distill")]
        ratio = (distilled or [last])[-1].get("perplexity_ratio")
        changes = f" with {', '.join(row['key']['set'])}" if row["key"]["set"] else ""
        verdicts = [_verdict(f"whole run, {found['threads']} threads", found["seconds"], DEMO_SECONDS, "s", 0)]
        if ratio is not None:
            verdicts.append(_verdict("times dense after distillation", ratio, DEMO_RATIO, "", 3))
        failed = "".join(f"- {line}\n" for line in found["failed"])
        title = f"`{row['key']['recipe']}`{changes}, exit code {found['exit_code']}"
        parts.append(f"{title}:\n\n{table}\n{''.join(verdicts)}{failed}")
    return "\n".join(parts)


def _stage(stage: Row) -> tuple[str, ...]:
    memory = stage.get("memory")
    return (
        stage["stage"],
        _number(stage.get("perplexity"), 2),
        _number(stage.get("perplexity_ratio"), 3),
        _number(stage.get("kl"), 3),
        _number(stage.get("top1_agreement"), 3),
        f"{stage['parameters'] / 1e6:.1f} M",
        _number(stage["bytes"] / 1e6, 1),
        _number(stage.get("seconds"), 0),
        _number(None if memory is None else memory / MIB, 0),
        _number(stage["memory_predicted"] / MIB if "memory_predicted" in stage else None, 0),
    )


def pruning(rows: list[Row]) -> str:
    """For every setting: ratios on both texts by method and shape, KL and agreement, and the numbers to meet."""
    parts = [PRUNING]
    for setting, group in _by_setting(rows, ("method", "ratio", "heads")).items():
        cells = {(r["key"]["method"], r["key"]["ratio"], r["key"]["heads"]): r["found"] for r in group}
        dense = cells.pop(("dense", None, None))
        second = dense["second_text"]
        parts.append(
            f"{_setting(setting)}. Dense perplexity: {dense['perplexity']:.2f} on WikiText-2, "
            f"{dense['second_perplexity']:.2f} on the second text ({second}).\n"
        )
        for title, name, digits in (
            ("WikiText-2, times dense", "ratio", 2),
            (f"Second text ({second}), times dense", "second_ratio", 2),
            ("WikiText-2, KL to dense (nats a token)", "kl", 3),
            ("WikiText-2, top-1 agreement with dense", "top1", 3),
            ("Seconds to prune", "seconds", 0),
        ):
            parts.append(f"**{title}**\n\n{_shapes_table(cells, name, digits)}")
        verdicts = (
            _verdict(f"wanda + refit, {SHAPES[shape]}", cells["wanda", *shape]["ratio"], most, "times dense", 3)
            for shape, most in PRUNING_MUST.items()
            if ("wanda", *shape) in cells
        )
        parts.append("".join(verdicts))
    return "\n".join(parts)


def _shapes_table(cells: Mapping[tuple[Any, ...], Row], name: str, digits: int) -> str:
    methods = [method for method in METHODS if any(key[0] == method for key in cells)]
    body = []
    for method in methods:
        values = [cells.get((method, *shape), {}).get(name) for shape in SHAPES]
        body.append((METHODS[method], *(_number(value, digits) for value in values)))
    return _table(("", *SHAPES.values()), body)


def damping(rows: list[Row]) -> str:
    """A table by criterion and calibration size: ridge by lambda."""
    parts = [DAMPING]
    for setting, group in _by_setting(rows, ("criterion", "samples", "ridge", "lambda")).items():
        cells = {tuple(r["key"][k] for k in ("criterion", "samples", "ridge", "lambda")): r["found"] for r in group}
        lambdas = sorted({key[3] for key in cells})
        ridges = [ridge for ridge in ("mean", "column", "median") if any(key[2] == ridge for key in cells)]
        body = []
        for criterion, samples in sorted({key[:2] for key in cells}, key=lambda pair: (pair[1], pair[0])):
            for ridge in ridges:
                values = [cells.get((criterion, samples, ridge, value), {}).get("ratio") for value in lambdas]
                body.append((criterion, str(samples), ridge, *(_number(value, 3) for value in values)))
        header = ("criterion", "windows", "ridge", *(f"lambda {value}" for value in lambdas))
        parts.append(f"{_setting(setting)}.\n\n{_table(header, body)}")
    return "\n".join(parts)


def memory(rows: list[Row]) -> str:
    """One row a command; then the growth with depth."""
    body = []
    peaks: dict[tuple[str, str, int | None], int] = {}
    for row in sorted(rows, key=lambda row: (row["key"]["variant"] == "default", row["key"]["step"])):
        key, found = row["key"], row["found"]
        tokens = f"{key['samples']} x {key['length']}" if key["samples"] else ""
        peaks[key["variant"], key["step"], key["layers"]] = found["above"]
        sizes = (found[name] / MIB for name in ("above", "imports", "step_above", "predicted", "weights_written"))
        shown = (_number(size, 0) for size in sizes)
        body.append(
            (
                key["variant"],
                key["step"],
                key["model"],
                tokens,
                *shown,
                found["full_load"],
                _number(found["seconds"], 0),
            )
        )
    header = ("", "step", "model", "tokens", "peak above imports, MiB", "imports", "in the step", "predicted")
    table = _table((*header, "weights written", "full load", "s"), body)
    return f"{MEMORY}\n{table}\n" + "".join(_memory_verdicts(peaks))


def _memory_verdicts(peaks: Mapping[tuple[str, str, int | None], int]) -> Iterable[str]:
    demo_peak = peaks.get(("limited", "prune", None))
    if demo_peak is not None:
        yield _verdict("pruning SmolLM2 (limited)", demo_peak / MIB, PRUNING_MEMORY / MIB, "MiB", 0)
    for step in ("prune", "quantize"):
        depths = sorted(k[2] for k in peaks if k[:2] == ("limited", step) and k[2] is not None)
        if len(depths) > 1:
            growth = peaks["limited", step, depths[-1]] / peaks["limited", step, depths[0]]
            what = f"{step}, {depths[-1]} layers against {depths[0]} (limited)"
            yield _verdict(what, growth, MEMORY_GROWTH, "times", 3)


def startup(rows: list[Row]) -> str:
    """One row a command."""
    body, verdicts = [], []
    for row in sorted(rows, key=lambda row: list(STARTUP).index(row["key"]["command"])):
        found = row["found"]
        name, must = STARTUP[row["key"]["command"]]
        times = (_number(found[k], 3) for k in ("median", "min", "max", "cpu"))
        body.append((name, str(row["key"]["runs"]), *times))
        if must is not None:
            verdicts.append(_verdict(name, found["median"], must, "s", 3))
    header = ("command", "runs", "median s", "least", "most", "processor s")
    return f"Wall time of the whole process, files cached.\n\n{_table(header, body)}\n{''.join(verdicts)}"


def _by_setting(rows: list[Row], apart: Sequence[str]) -> dict[str, list[Row]]:
    """Rows whose keys agree in all but `apart`, under that rest as JSON."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["key"].items() if key not in apart}
        groups.setdefault(json.dumps(rest), []).append(row)
    return groups


def _setting(text: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in json.loads(text).items())


def _provenance(rows: list[Row]) -> str:
    """Machines, versions and dates of the rows, each combination once."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        host = row["machine"]
        where = f"{host['cpu']}, {host['cores']} cores, {host['memory'] / 2**30:.0f} GiB"
        what = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
        seen.setdefault(f"{where}; {what}", []).append(row["date"][:10])
    lines = []
    for text, dates in seen.items():
        span = min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
        lines.append(f"Measured {span} on {text}.\n")
    return "\n".join(lines)


def _verdict(what: str, found: float, most: float, unit: str, digits: int) -> str:
    unit = f" {unit}" if unit else ""
    return f"- {what}: {found:.{digits}f}{unit}, at most {most:g}{unit}: {'met' if found <= most else '**missed**'}\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
