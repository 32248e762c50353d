"""The sections on the demo, damping, memory, sampling and starting; each renders the rows of one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from _markdown import MIB, Row, by_setting, described, number, table, verdict

STARTUP = {
    "python": ("`python -c pass`", None),
    "torch": ('`python -c "import torch"`', None),
    "help": ("`autoglm-compress --help`", 0.5),
    "prune-help": ("`autoglm-compress prune --help`", None),
    "plan": ("`autoglm-compress plan`, 10.3 B from headers", 3.0),
}
SAMPLING_SECONDS = 300
SAMPLING = """\
`self`: temperature 1, top-p 0.95, in batches with keys and values kept; whole processes, imports and loading included.
"""
DEMO_SECONDS, DEMO_RATIO = 600, 1.5
PRUNING_MEMORY, MEMORY_GROWTH = 512 * MIB, 1.10

DAMPING = """\
FFN only, 20 %, times dense. The ridge is lambda times the mean of H's diagonal, the column's own entry, or the median.
Calibrated on three quarters of the WikiText-2 validation split and judged on the last quarter: a default chosen from
this table has not seen the test split.
"""
MEMORY = """\
Peak of the whole process, self-check included, above a Python that has only imported torch, transformers and this
package. Stock load: the layers of the result that the self-check loaded in stock transformers, as many as fit in the
memory that the plan asks for, and what it found.
"""


def sampling(rows: list[Row]) -> str:
    """One line a setting, and the number to meet for the setting that it is stated for."""
    lines, verdicts = [], []
    for row in rows:
        key, found = row["key"], row["found"]
        size = f"{key['samples']} x {key['length']}"
        rate = number(found["tokens"] / found["seconds"], 0)
        times = (number(found["seconds"], 0), rate, number(found["again_seconds"], 1), number(found["peak"] / MIB, 0))
        lines.append((key["model"], size, str(key["threads"]), *times))
        if (key["samples"], key["length"], key["threads"]) == (128, 512, 2):
            verdicts.append(verdict("64 k tokens, two threads", found["seconds"], SAMPLING_SECONDS, "s", 0))
    header = ("model", "tokens", "threads", "s", "tokens a second", "s from the cache", "peak MiB")
    return f"{SAMPLING}\n{table(header, lines)}\n{''.join(verdicts)}"


def demo(rows: list[Row]) -> str:
    """One table a run: every stage, then the numbers to meet."""
    parts = []
    for row in rows:
        found = row["found"]
        header = ("stage", "perplexity", "times dense", "KL", "top-1", "parameters", "MB", "s", "peak MiB", "predicted")
        grid = table(header, (_stage(stage) for stage in found["stages"]))
        last = found["stages"][-1]
        distilled = [stage for stage in found["stages"] if stage["stage"].endswith("distill")]
        ratio = (distilled or [last])[-1].get("perplexity_ratio")
        changes = f" with {', '.join(row['key']['set'])}" if row["key"]["set"] else ""
        verdicts = [verdict(f"whole run, {found['threads']} threads", found["seconds"], DEMO_SECONDS, "s", 0)]
        if ratio is not None:
            verdicts.append(verdict("times dense after distillation", ratio, DEMO_RATIO, "", 3))
        failed = "".join(f"- {line}\n" for line in found["failed"])
        title = f"`{row['key']['recipe']}`{changes}, exit code {found['exit_code']}"
        parts.append(f"{title}:\n\n{grid}\n{''.join(verdicts)}{failed}")
    return "\n".join(parts)


def _stage(stage: Row) -> tuple[str, ...]:
    memory = stage.get("memory")
    return (
        stage["stage"],
        number(stage.get("perplexity"), 2),
        number(stage.get("perplexity_ratio"), 3),
        number(stage.get("kl"), 3),
        number(stage.get("top1_agreement"), 3),
        f"{stage['parameters'] / 1e6:.1f} M",
        number(stage["bytes"] / 1e6, 1),
        number(stage.get("seconds"), 0),
        number(None if memory is None else memory / MIB, 0),
        number(stage["memory_predicted"] / MIB if "memory_predicted" in stage else None, 0),
    )


MULTIPLE_CHOICE = """\
Zero-shot accuracy by lm-eval's harness on local files of questions, with its standard error; `acc_norm`: the likelihood
a byte of each choice.
"""


def multiple_choice(rows: list[Row]) -> str:
    """One line a model and file."""
    body = []
    for row in rows:
        key, found = row["key"], row["found"]
        values = (f"{each['value']:.1%} ±{each['error']:.1%}" for each in found.values())
        body.append((key["file"], str(key["questions"]), key["model"], *values))
    return f"{MULTIPLE_CHOICE}\n{table(('file', 'questions', 'model', 'acc', 'acc_norm'), body)}"


def damping(rows: list[Row]) -> str:
    """A table by criterion and calibration size: ridge by lambda."""
    parts = [DAMPING]
    for setting, group in by_setting(rows, ("criterion", "samples", "ridge", "lambda")).items():
        cells = {tuple(r["key"][k] for k in ("criterion", "samples", "ridge", "lambda")): r["found"] for r in group}
        lambdas = sorted({key[3] for key in cells})
        ridges = [ridge for ridge in ("mean", "column", "median") if any(key[2] == ridge for key in cells)]
        body = []
        for criterion, samples in sorted({key[:2] for key in cells}, key=lambda pair: (pair[1], pair[0])):
            for ridge in ridges:
                values = [cells.get((criterion, samples, ridge, value), {}).get("ratio") for value in lambdas]
                body.append((criterion, str(samples), ridge, *(number(value, 3) for value in values)))
        header = ("criterion", "windows", "ridge", *(f"lambda {value}" for value in lambdas))
        parts.append(f"{described(setting)}.\n\n{table(header, body)}")
    return "\n".join(parts)


def memory(rows: list[Row]) -> str:
    """One row a command; then the growth with depth."""
    body = []
    peaks: dict[tuple[str, int | None], int] = {}
    for row in sorted(rows, key=lambda row: row["key"]["step"]):
        key, found = row["key"], row["found"]
        tokens = f"{key['samples']} x {key['length']}" if key["samples"] else ""
        peaks[key["step"], key["layers"]] = found["above"]
        sizes = (found[name] / MIB for name in ("above", "imports", "step_above", "predicted", "weights_written"))
        shown = (number(size, 0) for size in sizes)
        body.append((key["step"], key["model"], tokens, *shown, found["stock_load"], number(found["seconds"], 0)))
    header = ("step", "model", "tokens", "peak above imports, MiB", "imports", "in the step", "predicted")
    grid = table((*header, "weights written", "stock load", "s"), body)
    return f"{MEMORY}\n{grid}\n" + "".join(_memory_verdicts(peaks))


def _memory_verdicts(peaks: Mapping[tuple[str, int | None], int]) -> Iterable[str]:
    demo_peak = peaks.get(("prune", None))
    if demo_peak is not None:
        yield verdict("pruning SmolLM2", demo_peak / MIB, PRUNING_MEMORY / MIB, "MiB", 0)
    for step in ("prune", "quantize"):
        depths = sorted(layers for one, layers in peaks if one == step and layers is not None)
        if len(depths) > 1:
            growth = peaks[step, depths[-1]] / peaks[step, depths[0]]
            yield verdict(f"{step}, {depths[-1]} layers against {depths[0]}", growth, MEMORY_GROWTH, "times", 3)


def startup(rows: list[Row]) -> str:
    """One row a command."""
    body, verdicts = [], []
    for row in sorted(rows, key=lambda row: list(STARTUP).index(row["key"]["command"])):
        found = row["found"]
        name, must = STARTUP[row["key"]["command"]]
        times = (number(found[k], 3) for k in ("median", "min", "max", "cpu"))
        body.append((name, str(row["key"]["runs"]), *times))
        if must is not None:
            verdicts.append(verdict(name, found["median"], must, "s", 3))
    header = ("command", "runs", "median s", "least", "most", "processor s")
    return f"Wall time of the whole process, files cached.\n\n{table(header, body)}\n{''.join(verdicts)}"
