"""The sections on the demo, pruning quality, damping, memory and starting; each renders the rows of one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from _markdown import MIB, Row, by_setting, described, number, table, verdict

METHODS = {
    "wanda": "wanda + refit (default)",
    "wanda-held-out": "wanda + refit, damping chosen on held-out windows",
    "obs": "obs + refit",
    "flap": "flap + refit",
    "activation": "activation + refit",
    "taylor": "taylor + refit",
    "fisher": "fisher + refit",
    "tp-magnitude": "tp-magnitude + refit",
    "tp-taylor": "tp-taylor + refit",
    "magnitude": "magnitude + refit",
    "random": "random + refit",
    "wanda-sp": "Wanda-sp (our wanda, no refit)",
    "minitron": "Minitron's importance (our activation, no refit)",
    "flap-bias": "FLAP, with its biases",
    "llm-pruner": "first-order Taylor (LLM-Pruner's score), 10 windows",
    "torch-pruning-taylor": "Torch-Pruning, group Taylor, 10 windows",
    "torch-pruning-magnitude": "Torch-Pruning, group magnitude",
    "magnitude-no-refit": "magnitude, no refit",
}
CALIBRATED = {
    "wikitext": "WikiText-2 valid",
    "self+wikitext": "half `self`, half WikiText-2 valid",
    "self": "`self`",
    "builtin": "`builtin` (72 windows, all there are)",
}
SHAPES = {"ffn": "FFN", "heads": "heads + FFN"}
# the best row of uniform widths has to stay within: (calibration, ratio) -> (on WikiText-2, on the far text)
PRUNING_MUST: dict[tuple[str, float], tuple[float, float | None]] = {
    ("wikitext", 0.20): (1.47, None),
    ("wikitext", 0.35): (2.18, None),
    ("self+wikitext", 0.20): (1.57, 1.55),
    ("self+wikitext", 0.35): (2.45, 2.45),
}
FAR = {0.20: 1.2, 0.35: 1.35}  # a calibration's ratio on the far text, at most this times its ratio on WikiText-2
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

PRUNING = """\
One shot, no training, uniform widths. Judged by `bench/judge.py` (stock transformers, nothing of this package) on
64 windows of the WikiText-2 test split and of a text of another kind that nothing is calibrated on. Share of the
decoder layers' attention + FFN parameters that goes: from the FFN alone, or with one query head of every KV head's
group. Perplexity times dense; several seeds of the calibration: their mean, and in brackets the least and the most.
One seed: behind it, where it was taken, the standard error over the judged windows in percent. All methods cut to the
same widths.
Wanda-sp and Minitron's importance are our own criteria without the refit; FLAP with its biases and LLM-Pruner's score
are re-implemented; Torch-Pruning is its own code, FFN only. FLAP's biases on o_proj and down_proj have no slot in stock
Llama: its model lives in memory only.
"""
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


def pruning(rows: list[Row]) -> str:
    """For every calibration: ratios on both texts by method, shape and share; then the numbers to meet."""
    parts = [PRUNING]
    for setting, group in by_setting(rows, ("method", "calibration", "shape", "ratio", "seed", "dense")).items():
        dense = next(row["found"]["perplexity"] for row in group if "dense" in row["key"])
        texts = ", ".join(f"{number(value, 2)} on {name}" for name, value in dense.items())
        parts.append(f"{described(setting)}. Dense perplexity: {texts}.\n")
        cells: Cells = {}
        for row in group:
            if "dense" not in row["key"]:
                key = row["key"]
                cell = (key["calibration"], key["method"], key["shape"], key["ratio"])
                cells.setdefault(cell, []).append(row["found"])
        for calibration, title in CALIBRATED.items():
            if any(cell[0] == calibration for cell in cells):
                parts.append(f"**Calibrated on {title}: {' / '.join(dense)}**\n\n{_shapes_table(cells, calibration)}")
        parts.append("".join(_pruning_verdicts(cells, list(dense))))
    return "\n".join(parts)


Cells = dict[tuple[str, str, str, float], list[Row]]  # (calibration, method, shape, ratio) -> one row a seed


def _shapes_table(cells: Cells, calibration: str) -> str:
    own = {cell[1:]: found for cell, found in cells.items() if cell[0] == calibration}
    columns = sorted({cell[1:] for cell in own}, key=lambda column: (list(SHAPES).index(column[0]), column[1]))
    body = []
    for method, name in METHODS.items():
        if any(cell[0] == method for cell in own):
            body.append((name, *(_ratios(own.get((method, *column), [])) for column in columns)))
    return table(("", *(f"{SHAPES[shape]}, {ratio:.0%}" for shape, ratio in columns)), body)


def _ratios(found: list[Row]) -> str:
    """`1.49 / 1.57`: one number a text."""
    return " / ".join(_ratio(name, found) for name in found[0]["ratio"]) if found else ""


def _ratio(text: str, found: list[Row]) -> str:
    values = [row["ratio"][text] for row in found]
    if len(values) == 1:
        error = f" ±{found[0]['error'][text]:.1%}" if "error" in found[0] else ""
        return f"{values[0]:.3f}{error}"
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f}; {len(values)} seeds)"


def _pruning_verdicts(cells: Cells, texts: list[str]) -> Iterable[str]:
    """The best method of a calibration on WikiText-2 against what is to be met, FFN alone, and how far it carries."""
    for (calibration, ratio), musts in PRUNING_MUST.items():
        found = {
            cell[1]: [sum(row["ratio"][text] for row in rows) / len(rows) for text in texts]
            for cell, rows in cells.items()
            if (cell[0], *cell[2:]) == (calibration, "ffn", ratio)
        }
        if not found:
            continue
        method = min(found, key=lambda name: found[name][0])
        near, far = found[method]
        what = f"{CALIBRATED[calibration]}, {ratio:.0%}, {METHODS[method]}"
        yield verdict(f"{what}: WikiText-2", near, musts[0], "times dense", 3)
        if musts[1] is not None:
            yield verdict(f"{what}: {texts[1]}", far, musts[1], "times dense", 3)
    for ratio, most in FAR.items():
        best = {
            (cell[0], cell[1]): sum(row["ratio"][texts[1]] / row["ratio"][texts[0]] for row in rows) / len(rows)
            for cell, rows in cells.items()
            if cell[2:] == ("ffn", ratio) and cell[0] != "builtin" and cell[1] in ("wanda", "obs")
        }
        for (calibration, method), value in sorted(best.items()):
            what = f"{CALIBRATED[calibration]}, {ratio:.0%}, {METHODS[method]}: {texts[1]} against WikiText-2"
            yield verdict(what, value, most, "", 3)


def pruning_speed(rows: list[Row]) -> str:
    """Medians of pruning against the forward pass, where the time went, and plans from one analysis."""
    parts = []
    for row in rows:
        key, found = row["key"], row["found"]
        title = f"{key['model']}, {key['samples']} x {key['length']} tokens, {key['threads']} threads"
        lines = [
            ("bare forward pass, float32", number(found["forward"], 1)),
            ("`prune`, whole", number(found["prune"], 1)),
        ]
        lines += [(f"- {task}", number(value, 1)) for task, value in found["tasks"].items()]
        lines += [("`sensitivity`, whole", number(found["sensitivity"], 1))]
        lines += [("`plan` from it", ", ".join(number(value, 2) for value in found["plans"]))]
        parts.append(f"{title}, medians of {key['rounds']}:\n\n{table(('', 's'), lines)}\n")
        parts.append(verdict("pruning against the forward pass", found["prune"] / found["forward"], 3, "times", 2))
        parts.append(verdict("the slowest plan", max(found["plans"]), 5, "s", 2))
    return "".join(parts)


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
