"""The sections on pruning: quality by method and text, and what it takes; each renders the rows of one file."""

from __future__ import annotations

import math
from collections.abc import Iterable

from _far_texts import FAR_TEXTS
from _markdown import Row, by_setting, described, number, table, verdict

METHODS = {
    "wanda": "wanda + refit (default)",
    "wanda-per-layer": "wanda + refit, per-layer widths",
    "wanda-joint": "wanda + joint refit, 2 steps",
    "wanda-propagated": "wanda + refit, propagation",
    "wanda-joint-propagated": "wanda + joint refit, 2 steps, propagation",
    "wanda-joint-per-layer": "wanda + joint refit, 2 steps, per-layer widths",
    "wanda-propagated-per-layer": "wanda + refit, propagation, per-layer widths",
    "wanda-joint-propagated-per-layer": "wanda + joint refit, 2 steps, propagation, per-layer widths",
    "obs-per-layer": "obs + refit, per-layer widths",
    "obs-joint-per-layer": "obs + joint refit, 2 steps, per-layer widths",
    "obs-propagated-per-layer": "obs + refit, propagation, per-layer widths",
    "obs-joint-propagated-per-layer": "obs + joint refit, 2 steps, propagation, per-layer widths",
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
    "wanda-norm": "wanda + refit, tokens weighted by 1 / mean square of the residual stream",
    "wanda-damping-0.001": "wanda + refit, a tenth of the damping",
    "wanda-damping-0.1": "wanda + refit, ten times the damping",
    "wanda-dense-inputs": "wanda + refit, statistics of the dense model's layers",
}
# the ablation: what differs from the default, and the rows that differ in it: methods, or calibration windows
ABLATION: dict[str, tuple[str | int, ...]] = {
    "selection": ("random", "magnitude", "activation", "flap", "obs"),
    "refit": ("wanda-sp", "wanda-joint"),
    "allocation": ("wanda-per-layer",),
    "sequential statistics": ("wanda-dense-inputs",),
    "token weights": ("wanda-norm",),
    "damping": ("wanda-damping-0.001", "wanda-damping-0.1", "wanda-held-out"),
    "calibration size": (64, 32, 16),
}
DEFAULT: tuple[str, int] = ("wanda", 128)
CALIBRATED = {
    "wikitext": "WikiText-2 valid",
    "self+wikitext": "half `self`, half WikiText-2 valid",
    "self": "`self`",
    "builtin": "`builtin` (72 windows, all there are)",
    "self+builtin": "half `self`, half `builtin`",
}
SHAPES = {"ffn": "FFN", "heads": "heads + FFN"}
# the best row of uniform widths has to stay within, and where a far text is named that of widths by layer as well:
# (calibration, ratio) -> (on WikiText-2, on every far text)
PRUNING_MUST: dict[tuple[str, float], tuple[float, float | None]] = {
    ("wikitext", 0.20): (1.47, None),
    ("wikitext", 0.35): (2.18, None),
    ("self+wikitext", 0.20): (1.57, 1.55),
    ("self+wikitext", 0.35): (2.45, 2.45),
}
PER_LAYER_MUST = {0.20: 1.44, 0.35: 2.03}  # calibrated on WikiText-2 valid, judged on its test split
# beyond what is to be met: calibrated on WikiText-2 valid, by whether widths differ by layer
AIM = {(False, 0.20): 1.40, (False, 0.35): 2.0, (True, 0.20): 1.36, (True, 0.35): 1.85}
FAR = {0.20: 1.2, 0.35: 1.35}  # any calibration's ratio on any far text, at most this times its ratio on WikiText-2
BY_LAYER = (
    "wanda-per-layer",
    "wanda-joint-per-layer",
    "wanda-propagated-per-layer",
    "wanda-joint-propagated-per-layer",
    "obs-per-layer",
    "obs-joint-per-layer",
    "obs-propagated-per-layer",
    "obs-joint-propagated-per-layer",
)
# the methods that this is asked of
CARRIES = ("wanda", "obs", "wanda-held-out", "wanda-joint", "wanda-propagated", "wanda-joint-propagated", *BY_LAYER)
PRUNING = """\
One shot, no training; uniform widths but where a row says per-layer (then heads go against FFN as well). Judged by
`bench/judge.py` (stock transformers, nothing of this package) on 64 windows of the WikiText-2 test split and of texts
of other kinds that nothing is calibrated on (`bench/_far_texts.py` tells how they were chosen). Share of the decoder
layers' attention + FFN parameters that goes: from the FFN alone, or with one query head of every KV head's group.
Perplexity times dense; several seeds of the calibration: their mean, and in brackets the least and the most. One seed:
behind it, where it was taken, the standard error over the judged windows in percent. All methods cut to the same
widths.
Wanda-sp and Minitron's importance are our own criteria without the refit (Wanda-sp as published adds up absolute
values of weight times input norm, ours their squares: 47.2 against 47.0 in `docs/experiments.md`); FLAP with its biases
and LLM-Pruner's score are re-implemented; Torch-Pruning is its own code, FFN only. FLAP's biases on o_proj and
down_proj have no slot in stock Llama: its model lives in memory only.
Rows of obs are of the obs that still counted the ridge in what a unit costs, 0 to 3 % worse where both were measured
on the same text (`docs/experiments.md`), but for those by layer at 35 %, those with the joint refit and
those with propagation (`error_propagation: 0.3`).
Judged in the stored bfloat16, on processors that emulate it in float32 (`judged_in` of a row).

![perplexity after 20 % are gone: our default beside peers, and by what was calibrated on](pictures/pruning.png)
"""


ALL = ("wikitext", *FAR_TEXTS)
Cells = dict[tuple[str, str, str, float], list[Row]]  # (calibration, method, shape, ratio) -> one row a seed
ROW = ("method", "calibration", "shape", "ratio", "seed", "dense")  # what tells rows of one setting apart


def pruning(rows: list[Row]) -> str:
    """For every calibration: ratios on all texts by method, shape and share; then the numbers to meet. Rows that were
    judged on different texts are never in one table."""
    parts = [PRUNING]
    judged: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        judged.setdefault(tuple(row["found"].get("ratio", row["found"].get("perplexity"))), []).append(row)
    for texts, same in sorted(judged.items(), key=lambda item: -len(item[0])):
        dense = [row for row in same if "dense" in row["key"]]
        for setting, group in by_setting([row for row in same if row not in dense], ROW).items():
            parts.append(_one_setting(texts, described(setting), group, _dense(group[0], dense)))
    return "\n".join(parts)


def _dense(row: Row, dense: list[Row]) -> dict[str, float]:
    """Perplexity of the model that this row was pruned from, on the same windows: whatever it was calibrated on."""
    same = ("model", "length", "windows")
    found = (other["found"]["perplexity"] for other in dense if all(other["key"][k] == row["key"][k] for k in same))
    return next(found, {})


def _one_setting(texts: tuple[str, ...], setting: str, rows: list[Row], dense: dict[str, float]) -> str:
    told = (f"{name} ({FAR_TEXTS[name].kind})" if name in FAR_TEXTS else "WikiText-2 test" for name in texts)
    named = (f"{text}: {number(dense.get(name), 2) or 'not measured'}" for name, text in zip(texts, told, strict=True))
    parts = [f"{setting}. Dense perplexity: {'; '.join(named)}.\n"]
    cells: Cells = {}
    for row in rows:
        key = row["key"]
        cells.setdefault((key["calibration"], key["method"], key["shape"], key["ratio"]), []).append(row["found"])
    for calibration, title in CALIBRATED.items():
        if any(cell[0] == calibration for cell in cells):
            parts.append(f"**Calibrated on {title}**\n\n{_ratios_table(cells, calibration, texts)}")
    if texts == ALL and rows[0]["key"]["samples"] == DEFAULT[1]:  # what is to be met is asked of these
        parts.append(_musts_table(cells, texts) + _far_table(cells, texts[1:]))
    return "\n".join(parts)


def _ratios_table(cells: Cells, calibration: str, texts: tuple[str, ...]) -> str:
    """A line a method and what it took away, a column a text."""
    own = {cell[1:]: found for cell, found in cells.items() if cell[0] == calibration}
    body = []
    for shape, ratio in sorted({cell[1:] for cell in own}, key=lambda cell: (list(SHAPES).index(cell[0]), cell[1])):
        for method, name in METHODS.items():
            if found := own.get((method, shape, ratio)):
                body.append((f"{SHAPES[shape]}, {ratio:.0%}", name, *(_ratio(text, found) for text in texts)))
    return table(("gone", "", *texts), body)


def _ratio(text: str, found: list[Row]) -> str:
    values = [row["ratio"][text] for row in found]
    if len(values) == 1:
        error = f" ±{found[0]['error'][text]:.1%}" if "error" in found[0] else ""
        return f"{values[0]:.3f}{error}"
    return f"{_mean(values):.3f} ({min(values):.3f} to {max(values):.3f}; {len(values)} seeds)"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _musts_table(cells: Cells, texts: tuple[str, ...]) -> str:
    """What is to be met on WikiText-2 and on every far text, and what was found; FFN alone."""
    body = []
    for what, found, most, most_far, aim in _musts(cells, texts):
        limits = f"{most:g}" if most_far is None else f"{most:g}; far {most_far:g}"
        limits += "" if aim is None else f"; aim {aim:g} {'reached' if found['wikitext'] <= aim else 'not reached'}"
        asked = [most, *[most_far] * (len(texts) - 1)]
        met = (
            "" if limit is None else f"{found[text]:.3f}{'' if found[text] <= limit else ' **missed**'}"
            for text, limit in zip(texts, asked, strict=True)
        )
        body.append((what, limits, *met))
    return "What is to be met, times dense:\n\n" + table(("", "at most", *texts), body) if body else ""


# what, times dense by text, at most on WikiText-2, on others; the aim on WikiText-2
Must = tuple[str, dict[str, float], float, float | None, float | None]


def _musts(cells: Cells, texts: tuple[str, ...]) -> Iterable[Must]:
    """The method of a calibration that comes nearest to what is asked of it on its worst text, of uniform widths and,
    where far texts count, of widths by layer; then every method with widths by layer that is calibrated on
    WikiText-2."""

    def means(rows: list[Row]) -> dict[str, float]:
        return {text: _mean([row["ratio"][text] for row in rows]) for text in texts}

    for (calibration, ratio), musts in PRUNING_MUST.items():
        for by_layer in (False, True)[: 1 if musts[1] is None else 2]:
            found = {
                cell[1]: means(rows)
                for cell, rows in cells.items()
                if (cell[0], *cell[2:]) == (calibration, "ffn", ratio) and (cell[1] in BY_LAYER) == by_layer
            }
            if not found:
                continue
            limits = {text: musts[text != "wikitext"] or math.inf for text in texts}
            worst = {name: max(ratios[text] / most for text, most in limits.items()) for name, ratios in found.items()}
            method = min(worst, key=lambda name: worst[name])
            yield (
                f"{CALIBRATED[calibration]}, {ratio:.0%}, {METHODS[method]}",
                found[method],
                *musts,
                AIM[False, ratio] if calibration == "wikitext" else None,
            )
    for ratio, most in PER_LAYER_MUST.items():
        for method in BY_LAYER:
            if rows := cells.get(("wikitext", method, "ffn", ratio)):
                yield (
                    f"{CALIBRATED['wikitext']}, {ratio:.0%}, {METHODS[method]}",
                    means(rows),
                    most,
                    None,
                    AIM[True, ratio],
                )


def _far_table(cells: Cells, texts: tuple[str, ...]) -> str:
    """How far each calibration carries: the ratio on every far text over that on WikiText-2, and whether it is met."""
    body = []
    for (calibration, method, shape, ratio), rows in sorted(cells.items(), key=lambda item: (item[0][3], item[0])):
        if ratio in FAR and method in CARRIES:
            values = [_mean([row["ratio"][text] / row["ratio"]["wikitext"] for row in rows]) for text in texts]
            met = (f"{value:.3f}{'' if value <= FAR[ratio] else ' **missed**'}" for value in values)
            what = (f"{ratio:.0%}", SHAPES[shape], CALIBRATED[calibration], METHODS[method])
            body.append((*what, f"{FAR[ratio]:g}", *met))
    if not body:
        return ""
    return "\nRatio on a far text over the ratio on WikiText-2:\n\n" + table(
        ("gone", "from", "calibrated on", "", "at most", *texts), body
    )


ABLATED = """\
The default against itself with one thing changed (`--ablation`): FFN only, 20 %, calibrated on WikiText-2 valid. The
first line is times dense; below it, what the change does to that, in percent: above zero is what the default gains.
Rows are those of the section above; gaps under 3 % are noise.
"""


def ablation(rows: list[Row]) -> str:
    """One line a change: how the ratio on each text differs from the default's."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        key = {"calibration": "wikitext", "shape": "ffn", "ratio": 0.20, "seed": 0, "length": 512, "windows": 64}
        if key.items() <= row["key"].items() and tuple(row["found"]["ratio"]) == ALL:
            found[row["key"]["method"], row["key"]["samples"]] = row["found"]["ratio"]
    if DEFAULT not in found:
        return f"{ABLATED}\nNot measured yet.\n"
    default = found[DEFAULT]
    body = [("", f"{METHODS[DEFAULT[0]]}, {DEFAULT[1]} x 512", *(number(value, 3) for value in default.values()))]
    for what, changes in ABLATION.items():
        for change in changes:
            cell = (DEFAULT[0], change) if isinstance(change, int) else (change, DEFAULT[1])
            name = f"{change} x 512" if isinstance(change, int) else METHODS[change]
            if ratios := found.get(cell):
                body.append((what, name, *(f"{ratios[text] / default[text] - 1:+.1%}" for text in default)))
    return f"{ABLATED}\n{table(('changed', 'to', *default), body)}"


MERGING = """\
One shot, no training; calibrated on WikiText-2 valid, judged on its test split. Cache: bytes of the keys
and values of one token. `mean` is plain averaging (Ainslie et al. 2023, before their training), `aligned` turns the
heads towards each other first, `drop` takes the least costly away with their query heads. The refit is o_proj's.
"""


def kv_merging(rows: list[Row]) -> str:
    """A table a setting: what each way to merge leaves, without the refit of o_proj and with it."""
    parts = [MERGING]
    for setting, group in by_setting(rows, ("method", "refit")).items():
        body = []
        for row in sorted(group, key=lambda row: (row["key"]["method"], row["key"]["refit"])):
            found = row["found"]
            before, after = found["kv_cache_bytes"]
            cache = f"{before:,} to {after:,} ({1 - after / before:.0%} saved)"
            ratios = (number(found["ratio"], 2), number(found["perplexity"], 1), f"{found['parameters'] / 1e6:.1f} M")
            body.append((row["key"]["method"], "yes" if row["key"]["refit"] else "no", *ratios, cache))
        dense = number(group[0]["found"]["dense"], 2)
        header = ("KV heads", "refit", "times dense", "perplexity", "parameters", "cache")
        parts.append(f"{described(setting)}. Dense perplexity {dense}.\n\n{table(header, body)}")
    return "\n".join(parts)


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
