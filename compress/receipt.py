"""receipt.json: why a result can be trusted. Everything in it is deterministic; seconds and hosts stand elsewhere."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.arch import family_of
from compress.arch.tower import cut_sizes
from compress.checkpoint.digests import digest
from compress.checkpoint.headers import read_header, read_json
from compress.checkpoint.per_layer import span
from compress.device import described
from compress.errors import MachineError, UserError
from compress.machine import Machine, Progress
from compress.recipe import Recipe
from compress.steps.types import StepPlan

if TYPE_CHECKING:
    from compress.plan import Plan

SCHEMA = 1
DESCRIBED = ("recipe.yaml", "receipt.json", "measured.json", "README.md")  # beside the files whose digests it holds
LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "bitsandbytes",
    "compressed-tensors",
    "tokenizers",
    "torch-pruning",
)
# name of the gate -> (what it looks at, +1: must be at most, -1: must be at least)
GATES = {
    "max_perplexity_ratio": ("perplexity_ratio", 1),
    "max_kl": ("kl", 1),
    "min_top1_agreement": ("top1_agreement", -1),
    "max_bytes": ("bytes", 1),
    "max_parameters": ("parameters", 1),
}


@cache  # each version is a file that is found and parsed
def _installed() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in LIBRARIES)


def own_version() -> str:
    """Version of this package; `compress.__version__` is this."""
    try:
        return version("autoglm-compress")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


def changes(step: StepPlan) -> str:
    """`FFN 1536 -> 1256, heads 9 -> 6`, or the options given when no shape changes."""
    sides = [family_of(header).layers(header) for header in (step.before, step.after)]
    keys = {"FFN": "ffn", "heads": "heads", "KV heads": "kv_heads", "layers": "layers"}
    pairs = {name: [[getattr(s, key) for s in side] for side in sides] for name, key in keys.items()}
    shapes = [f"{name} {span(old)} -> {span(new)}" for name, (old, new) in pairs.items() if span(old) != span(new)]
    seen = cut_sizes(family_of(step.before).tower, step.before.config, step.after.config)
    names = {"vision_layers": "vision layers", "vision_ffn": "vision FFN"}
    shapes += [f"{names[key]} {old} -> {new}" for key, (old, new) in seen.items()]
    options = [f"{key} {value}" for key, value in step.options.model_dump(exclude_defaults=True).items()]
    return ", ".join(shapes or options) or "same shapes"


def step_part(name: str, step: StepPlan, outcome: dict[str, Any], checked: dict[str, Any]) -> dict[str, Any]:
    """One step's part of the receipt."""
    return {
        "step": name,
        "changes": changes(step),
        "options": step.options.model_dump(mode="json"),
        "parameters": step.parameters,
        "bytes": step.nbytes,
        "notes": list(step.notes),
        "self_check": checked,
        **outcome,
    }


def failed_gates(recipe: Recipe, stages: Sequence[dict[str, Any]], last: StepPlan) -> list[str]:
    """One line for every gate that the result fails."""
    if recipe.gates is None:
        return []
    found = {"parameters": last.parameters, "bytes": last.nbytes, **(stages[-1] if stages else {})}
    failed = []
    for gate, (metric, sign) in GATES.items():
        limit = getattr(recipe.gates, gate)
        if limit is None:
            continue
        value = found[metric]
        if not sign * value <= sign * limit:  # a NaN fails as well
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            failed.append(f"gate {gate}: found {shown}, allowed {limit}")
    return failed


def assemble(
    *,
    plan: Plan,
    threads: int,
    device: str,
    shard_bytes: int,
    steps: list[dict[str, Any]],
    stages: list[dict[str, Any]],
    evaluation_digest: str | None,
    evaluation_revisions: Mapping[str, str],
    failed: list[str],
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The whole receipt of a run whose result lies in `folder`."""
    sources = {"model": plan.source} | ({"teacher": plan.teacher} if plan.teacher else {})
    files = {key: _weight_files(source.folder) for key, source in sources.items()}
    with progress.task("digests", sum(map(len, files.values())) + 1) as task:
        parts: dict[str, Any] = {}
        for key, source in sources.items():
            digests = {}
            for path in files[key]:
                digests[path.name] = digest(path)
                task.advance()
            parts[key] = {"name": source.name, "revision": source.revision, "sha256": digests}
        written = {name: digest(path) for name, path in _written(folder)}
        task.advance()
    return {
        "receipt": SCHEMA,
        "autoglm_compress": own_version(),
        "libraries": dict(_installed()),
        "threads": threads,
        "device": described(device),
        "shard_bytes": shard_bytes,
        "recipe": plan.recipe.model_dump(mode="json"),
        **parts,
        "parameters": plan.parameters,
        "evaluation_sha256": evaluation_digest,
        **({"evaluation_revisions": dict(evaluation_revisions)} if evaluation_revisions else {}),
        "steps": steps,
        "stages": stages,
        "gates": {"failed": failed} if plan.recipe.gates else None,
        "files": written,
    }


def unchanged(folder: Path) -> bool:
    """Whether a result's files are those that its receipt names, no more and no fewer, with these digests."""
    try:
        return dict(load_receipt(folder).get("files", {})) == {name: digest(path) for name, path in _written(folder)}
    except (UserError, MachineError):
        return False


def _written(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a result that its receipt answers for, by their names in it."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in DESCRIBED:
            yield name, path


def _weight_files(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted({where.file for where in read_header(folder).locations.values()})]


def measured_host(machine: Machine, started: float) -> dict[str, Any]:
    """Machine, versions and time: what may differ between two runs of the same recipe."""
    return {
        "seconds": round(time.time() - started, 2),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": machine.threads,
    }


def load_receipt(folder: Path | str) -> dict[str, Any]:
    """receipt.json of a result; UserError where there is none."""
    path = Path(folder) / "receipt.json"
    if not path.exists():
        raise UserError(f"{path}: not found; {folder} is not a result of autoglm-compress")
    receipt = read_json(path)
    if receipt.get("receipt") != SCHEMA:
        raise UserError(f"{path}: receipt format {receipt.get('receipt')!r} is not known (this version reads {SCHEMA})")
    return receipt


def finite(value: Any) -> Any:
    """JSON has no infinity: such a number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
