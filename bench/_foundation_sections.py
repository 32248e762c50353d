"""The sections on full width, kills, damaged input, and peers' 8-bit weights; each renders the rows of one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from _markdown import GIB, MIB, Row, by_setting, described, number, table, verdict
from _paired import paired
from peers_quant import ROWS, Ours

FUSED_PEAK, QUANTIZE_PEAK, QUANTIZE_WALL = 6.0, 2.5, 2.0  # GiB, GiB, times plain reading and writing
KILLS, DAMAGED = 20, 300
QUALITY = 1.0  # times a peer's perplexity: not worse in any row

FOUNDATION = """\
A cut of GLM-4.1V-9B at full width with seeded random weights (`bench/make_checkpoint.py`): hidden size 4096, FFN 13696,
32 heads on 2 KV heads, vocabulary 151552, vision tower included. Peaks are of the whole process, libraries and
self-check included.
"""
KILLED = """\
`kill -9` at random moments of a run of three steps (prune, distil, quantize) on a pico glm4v, counted from when its
work folder appears and spread over the whole run; then the same command once more. Every row is a process that the
signal ended: where a run was done before its moment, another one was killed earlier in its place. Same bytes: exit code
0, all of OUT but measured.json as an uninterrupted run leaves it, the source untouched, nothing left beside OUT.
"""
FUZZED = """\
Checkpoints whose headers, index or config have bytes changed or cut off, and damaged recipes, each through the command
line. Done: exit 0, and stock transformers loads the same from the same source; refused: exit 2 with one line or a list
of problems, and OUT absent; gate: exit 3; machine: exit 4. Wrong: anything else, such as a traceback or a hang.
"""
PEERS = """\
SmolLM2-135M, every method a process of its own, others' in an environment of their own (`make peers-env`). Peak: of
the whole process with its children, libraries included. Rounding is to nearest, with one scale a row and without data,
for all: llm-compressor's preset W8A16 and auto-round's default have groups of 128 columns, and their exports refuse
this model's 576. Our seconds and peak contain our self-check, which no peer has. Judged `stock`: the folder that was
written, loaded by stock transformers; `memory`: that load fails or leaves keys over, so the model was judged as its
maker has it in memory. Pruning takes 20 % of the decoder's matrix parameters from the FFN, ours as by default (wanda +
refit, 64 windows of the validation split). Behind a verdict stands the mean difference, ours minus the peer's over the
same windows, and its standard error; within noise: at most 2 standard errors.
"""


def foundation(rows: list[Row]) -> str:
    """For every cut: the fused run beside its arithmetic, quantize beside plain reading and writing."""
    parts = [FOUNDATION]
    works = {"fused": _fused, "quantize": _quantize}
    for work, render in works.items():
        found = [row for row in rows if row["key"]["what"] == work]
        parts += [render(row) for row in found] or [f"**{work}**: not measured yet.\n"]
    return "\n".join(parts)


def _fused(row: Row) -> str:
    key, found = row["key"], row["found"]
    cut = ", ".join(f"{name} {value}" for name, value in key["prune"].items())
    totals: dict[str, float] = {}
    for part in found["operations"]:
        totals[part["part"]] = totals.get(part["part"], 0.0) + part["operations"]
    work = {part: f"{number(count / 1e9, 0)} GFLOP" for part, count in totals.items()}
    work |= {f"disk, {way}": f"{number(size / 1e6, 0)} MB" for way, size in found["bytes"].items()}
    lines = [(part, work[part], number(value, 2)) for part, value in found["beside"].items()]
    least = sum(found["beside"].values())
    lines.append(("together", "", number(least, 2)))
    rates = found["rates"]
    reached = ", ".join(f"{name} {number(rates[name], 0)}" for name in ("bf16", "f32", "f64", "cholesky"))
    title = (
        f"**Prune ({cut}) and {key['format']} in one pass**, {key['layers']} layers, "
        f"{key['samples']} x {key['length']} tokens, {found['threads']} threads: {found['seconds']:.0f} s, "
        f"peak {found['peak'] / GIB:.2f} GiB, planned {found['predicted'] / GIB:.2f} GiB above the libraries.\n"
    )
    times = found["layer_seconds"]
    mean = sum(times) / len(times)
    measured = (
        f"- layer by layer: {', '.join(f'{value:.1f}' for value in times)} s (the last hands nothing on)\n"
        f"- mean: {mean:.1f} s a layer, {mean / least:.2f} times the sum above\n"
    )
    return (
        f"{title}\nOne layer's arithmetic at what this machine reached in the same run ({reached} GFLOP/s; disk "
        f"{rates['read']:.2f} GB/s read, {rates['write']:.2f} GB/s written and synced):\n\n"
        f"{table(('part', 'work', 's'), lines)}\nMeasured:\n\n{measured}"
        + verdict("peak of the whole process", found["peak"] / GIB, FUSED_PEAK, "GiB", 2)
    )


def _quantize(row: Row) -> str:
    key, found = row["key"], row["found"]
    ours, plain = found["rounds"], found["beside"]["plain"]
    took, least = (", ".join(f"{value:.1f}" for value in seconds) for seconds in (ours, plain))
    ratio = median(ours) / median(plain)
    return (
        f"**Quantize alone**, {key['format']}, {key['layers']} layers, {found['threads']} threads: {took} s with "
        f"imports and self-check, peak {found['peak'] / GIB:.2f} GiB; plainly reading the source and writing "
        f"{found['written'] / 1e9:.2f} GB, before, between and after: {least} s.\n\n"
        + verdict("peak of the whole process", found["peak"] / GIB, QUANTIZE_PEAK, "GiB", 2)
        + verdict("wall, median over median", ratio, QUANTIZE_WALL, "times plain reading and writing", 2)
    )


def kills(rows: list[Row]) -> str:
    """One table a run of the script, and whether every trial ended as it must."""
    parts = [KILLED]
    for row in rows:
        found, count = row["found"], row["key"]["killed"]
        lines = []
        for trial in found["trials"]:
            stood = ", ".join(trial["stood"])
            reused = f"{trial['reused']} of {trial['steps']}"
            lines.append((f"{trial['moment']:.2f}", stood, reused, "; ".join(trial["wrong"]) or "same bytes"))
        header = ("killed after, s", "what stood in the work folder", "steps reused", "then")
        met = "met" if found["same"] == count >= KILLS else "**missed**"
        parts.append(
            f"`{row['key']['recipe']}`, seed {row['key']['seed']}:\n\n{table(header, lines)}\n"
            f"- same bytes: {found['same']} of {count}, all of at least {KILLS}: {met}\n"
        )
    return "\n".join(parts)


def fuzz(rows: list[Row]) -> str:
    """One row a kind of input, and whether nothing was wrong with as many as are asked for."""
    endings = list(dict.fromkeys(ending for row in rows for ending in row["found"]["endings"]))
    lines, verdicts = [], []
    for row in rows:
        key, found = row["key"], row["found"]
        counts = (str(found["endings"].get(ending, 0)) for ending in endings)
        lines.append((key["kind"], str(key["count"]), str(key["seed"]), *counts, number(found["slowest_seconds"], 1)))
        met = "met" if not found["wrong"] and key["count"] >= DAMAGED else "**missed**"
        verdicts.append(
            f"- {key['kind']}: {len(found['wrong'])} of {key['count']} wrong, 0 of {DAMAGED} allowed: {met}\n"
        )
    return f"{FUZZED}\n{table(('', 'cases', 'seed', *endings, 'slowest, s'), lines)}\n{''.join(verdicts)}"


def peers_quant(rows: list[Row]) -> str:
    """For every setting a table a group, what is missing, and the numbers to meet against every peer."""
    parts = [PEERS]
    for setting, group in by_setting(rows, ("row",)).items():
        found = {row["key"]["row"]: row["found"] for row in group}
        parts.append(f"{described(setting)}, {_threads(found)}.\n")
        for name in dict.fromkeys(row.group for row in ROWS.values()):
            parts.append(_peers_group(name, found))
    return "\n".join(parts)


def _threads(found: Mapping[str, Row]) -> str:
    return "threads " + ", ".join(sorted({str(one["threads"]) for one in found.values()}))


def _peers_group(group: str, found: Mapping[str, Row]) -> str:
    names = [name for name, row in ROWS.items() if row.group == group]
    ours = next((name for name in names if isinstance(ROWS[name], Ours)), "")
    here = {name: found[name] for name in names if name in found}
    missing = [name for name in names if name not in found]
    lines = [_peers_line(name, one, found.get(ours)) for name, one in here.items()]
    header = ("", "perplexity", "times dense", "KL", "top-1", "peak MiB", "times ours", "s", "s without imports")
    grid = table((*header, "MB written", "judged"), lines) if lines else ""
    versions = dict.fromkeys(_versions(one["peer_versions"]) for one in here.values() if "peer_versions" in one)
    ran = "".join(f"- ran: {line}\n" for line in versions)
    left = f"- not measured: {', '.join(missing)}\n" if missing else ""
    return f"**{group}**\n\n{grid}\n{ran}{left}{''.join(_peers_verdicts(ours, here))}"


def _peers_line(name: str, one: Row, ours: Row | None) -> tuple[str, ...]:
    return (
        name,
        number(one["ppl"], 2),
        number(one["ratio"], 4),
        number(one["kl"], 4),
        number(one["top1"], 3),
        number(one["peak"] / MIB, 0),
        number(one["peak"] / ours["peak"] if ours else None, 2),
        number(one["seconds"], 0),
        number(one.get("work_seconds"), 0),
        number(one["bytes"] / 1e6, 1),
        one["judged"],
    )


def _versions(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _peers_verdicts(ours: str, here: Mapping[str, Row]) -> Iterator[str]:
    """Ours against every peer: memory, perplexity, KL."""
    if ours not in here:
        return
    mine = here[ours]
    for name, one in here.items():
        if name == ours:
            continue
        what = f"{ours} over {name}"
        yield verdict(f"peak, {what}", mine["peak"] / one["peak"], 1.0, "times", 2)
        nll, kl = (_difference(mine, one, kind) for kind in ("window_nll", "window_kl"))
        yield verdict(f"perplexity, {what}", mine["ppl"] / one["ppl"], QUALITY, "times", 4, nll)
        if one["kl"] > 0:
            yield f"- KL, {what}: {mine['kl'] / one['kl']:.4f} times{'; ' + kl if kl else ''}\n"


def _difference(ours: Row, peer: Row, kind: str) -> str:
    """The paired difference in words; empty where a row has no windows on file, or one alone."""
    return str(paired(ours[kind], peer[kind])) if min(len(row.get(kind, ())) for row in (ours, peer)) > 1 else ""
