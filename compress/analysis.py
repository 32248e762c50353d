"""`autoglm-compress sensitivity`: checks first, the pass over the dense model, then a folder that appears whole.

sensitivity.json and sensitivity.safetensors are deterministic; what depends on the moment stands in measured.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from compress.arch import Family, Sizes, family_of
from compress.check import check_source
from compress.checkpoint.digests import ahead, model_digest, model_files
from compress.checkpoint.disk import disk_errors, sync
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.ledger import EVERY, Ledger
from compress.checkpoint.per_layer import one_or_each
from compress.checkpoint.reader import Reader
from compress.checkpoint.source import Source, locate
from compress.criteria import CRITERIA
from compress.curves import DOCUMENT, FORMAT, TENSORS
from compress.data import PADDING, DataSpec, check, expected_tokens, local_paths, windows
from compress.data.tokens import Tokens
from compress.device import check_room_on, described, device_of
from compress.errors import MachineError, UserError, size
from compress.formats import is_quantized
from compress.limits import DOUBLE_UP_TO, TAPE_BYTES, VOCAB_BYTES
from compress.machine import Machine, Progress, Silent, peak_memory, reset_peak_memory
from compress.needs import check_disk
from compress.output import check_apart, check_out, claimed, publish, work_folder
from compress.plan import check_shapes
from compress.receipt import LIBRARIES, measured_host, own_version
from compress.resume import Work, data_key, folder_key, key_of, surroundings
from compress.sensitivity import Sensitivity, load_sensitivity, optional
from compress.sensitivity.measure import Measured, Settings, measure
from compress.steps.prune.ahead import batch_memory, sight_memory
from compress.steps.prune.enough import few_tokens
from compress.steps.prune.measuring import SensitivityOptions
from compress.steps.sampling import authors_of
from compress.stream import WHOLE
from compress.stream.vision import sight_of


@dataclass(frozen=True)
class _Asked:
    """What is to be measured, after all checks that headers allow."""

    source: Source
    header: Header
    family: Family
    data: DataSpec
    options: SensitivityOptions
    seed: int

    @property
    def sizes(self) -> Sizes:
        return self.family.sizes(self.header)

    @property
    def widest(self) -> int:
        """Columns of the widest Gram matrix."""
        return max(max(each.ffn, each.heads * each.head_dim) for each in self.family.layers(self.header))


def measure_sensitivity(
    model: str,
    out: Path,
    data: DataSpec,
    options: SensitivityOptions,
    machine: Machine,
    *,
    seed: int = 0,
    overwrite: bool = False,
    fresh: bool = False,
    discard: bool = False,
    wait: bool = False,
    checkpoint_every: float = EVERY,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure `model` and write the folder `out`; returns what it says, as `load_sensitivity` reads it.

    What an earlier analysis of the same left in OUT.work is taken over, unless `fresh`; an interrupted or failed one
    leaves it there, unless `discard`: it is saved about every `checkpoint_every` seconds. `wait` for another run that
    writes `out`. Raises UserError before the first weight is read (everything that is wrong at once), MachineError
    where memory or disk are too small; nothing of `out` exists then.
    """
    told = progress or Silent()
    check_out(out, overwrite, DOCUMENT)
    if options.pictures:
        _check_pictures()
    asked = _asked(model, data, options, seed, told)
    check_apart(out, [asked.source], local_paths(asked.data))
    _check_room(asked, machine, out)
    torch.set_num_threads(machine.threads)
    started = time.time()
    with claimed(out, overwrite, wait, told, DOCUMENT):
        work = Work(work_folder(out, fresh))
        ledger = Ledger(work.folder / "analysis.state", lambda: _key(asked, machine), checkpoint_every)
        with work.keeping(discard):
            result = _write(asked, work.folder, machine, ledger, started, told)
            publish(result, out)
            sync(out.parent)
        work.remove()
    return load_sensitivity(out)


def _key(asked: _Asked, machine: Machine) -> str:
    """Digest of all that the numbers depend on."""
    options = asked.options.model_dump(mode="json", exclude={"pictures", "force"})
    model, data = folder_key(asked.source.folder), data_key(asked.data)
    return key_of({"model": model, "data": data, "options": options} | surroundings(machine, asked.seed))


def _write(asked: _Asked, work: Path, machine: Machine, ledger: Ledger, started: float, progress: Progress) -> Path:
    """WORK/result, whole."""
    folder, device = asked.source.folder, device_of(machine)
    ahead(model_files(folder))
    check_source(folder)
    reset_peak_memory()
    tokens = windows(asked.data, "calibration", folder, asked.seed, images=True, progress=progress)
    progress.note(tokens.note)
    chosen, count = asked.options, _count(tokens)
    if not chosen.force and (few := few_tokens(count, asked.widest)) is not None:
        raise few  # all of a text, or padding among the windows: their number said nothing of it
    ids = torch.from_numpy(tokens.ids)
    settings = Settings(chosen.criterion, chosen.damping, asked.seed, chosen.gradient_samples)
    with Reader(folder, asked.header, device) as reader:
        found = measure(
            reader, asked.family, ids, settings, progress, scratch=work, sight=sight_of(tokens), ledger=ledger
        )
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)  # of a run that was killed while it wrote
    tensors = save(found.tensors, metadata={"format": "pt"})
    document = _document(asked, found, tokens, tensors, machine)
    measured = {**measured_host(machine, started), "memory_peak": peak_memory()}
    with disk_errors(result):
        result.mkdir()
        (result / TENSORS).write_bytes(tensors)
        for name, content in ((DOCUMENT, document), ("measured.json", measured)):
            (result / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if chosen.pictures:
        with progress.task("drawing", 1) as task, disk_errors(result):
            load_sensitivity(result).save_pictures(result / "pictures")
            task.advance()
    for path in sorted(result.rglob("*")):
        sync(path)
    return result


def _document(asked: _Asked, found: Measured, tokens: Tokens, tensors: bytes, machine: Machine) -> dict[str, Any]:
    """sensitivity.json."""
    groups = [asked.family.groups(sizes, asked.header.text_config) for sizes in asked.family.layers(asked.header)]
    count = _count(tokens)
    return {
        "format": FORMAT,
        "autoglm_compress": own_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "model": {
            "name": asked.source.name,
            "revision": asked.source.revision,
            "digest": model_digest(asked.source.folder),
            "family": asked.family.name,
            "dtype": asked.header.dtype,
            "sizes": vars(asked.sizes),
        },
        "criterion": asked.options.criterion,
        "paper": CRITERIA[asked.options.criterion].paper,
        "damping": asked.options.damping,
        "seed": asked.seed,
        "calibration": {
            **asked.data.model_dump(mode="json"),
            **tokens.record,
            "tokens": count,
            "gradient_windows": min(asked.options.gradient_samples, len(tokens.ids)),
        },
        "threads": machine.threads,
        "device": described(device_of(machine)),
        "precision": found.precision,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "groups": {
            g.name: {
                "units": one_or_each([each[index].units for each in groups]),
                "balance": one_or_each([each[index].balance for each in groups]),
                "width": g.width,
                "tokens_per_column": count / max(each[index].units * g.width for each in groups),
            }
            for index, g in enumerate(groups[0])
        },
        "layers": found.layers,
    }


def _count(tokens: Tokens) -> int:
    """Of tokens that are no padding."""
    return int(tokens.ids.size if tokens.kinds is None else (tokens.kinds != PADDING).sum())


def _check_pictures() -> None:
    try:
        optional("matplotlib")
        optional("pandas")
    except UserError as error:
        raise UserError(error.message, hint=f"{error.hint}, or --no-pictures") from None


def _asked(model: str, data: DataSpec, options: SensitivityOptions, seed: int, progress: Progress) -> _Asked:
    """Find the model and refuse, all at once, what its headers and the names of the data show to be wrong."""
    source = locate(model, progress=progress)
    header = read_header(source.folder)
    family = family_of(header)
    lines = check_shapes(source.folder, family, header)
    if is_quantized(header):
        lines = [f"{source.name}: the model is quantized; measure the one it was made from"]
    if CRITERIA[options.criterion].needs & WHOLE:
        lines.append(f"--criterion: {options.criterion} holds the whole model in memory; the analysis streams it")
    if (beside := family.head_beside(header.text_config)) is not None:
        lines.append(f"{source.name}: the gradient of the loss is needed, and it knows none of this: {beside}")
    hint = None
    try:
        check(data, "calibration", source.folder, progress, images=True)
        for author in authors_of({"calibration": data}, ["calibration"], header, None).values():
            author.refuse()
    except UserError as problem:
        lines.append(f"--data: {problem.message}")
        hint = problem.hint
    asked = _Asked(source, header, family, data, options, seed)
    if not lines and data.samples is not None and not options.force:
        few = few_tokens(data.samples * data.length, asked.widest)
        if few is not None:
            lines, hint = [few.message], few.hint
    if lines:
        raise UserError(lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems:", *lines]), hint)
    return asked


def _check_room(asked: _Asked, machine: Machine, out: Path) -> None:
    """MachineError where what is alive at once would not fit: hidden states, a layer and its graph, its Grams, the
    factor and its inverse, the inputs of all layers that the backward pass keeps in memory, the vision tower."""
    sizes = asked.sizes
    tokens = expected_tokens(asked.data, "calibration")
    inner = [sizes.ffn, sizes.heads * sizes.head_dim]
    widest, prefix = max(inner), asked.family.prefix(asked.family.widest(asked.header))
    layer = sum(spec.parameters for name, spec in asked.header.tensors.items() if name.startswith(prefix))
    wide = 8 if widest <= DOUBLE_UP_TO else 4
    solver = wide * (4 * widest**2 + 4 * sizes.hidden * widest)
    batch = 2 * batch_memory(sizes, asked.header.text_config, asked.data.length)
    taped = 4 * min(tokens, asked.options.gradient_samples * asked.data.length) * sizes.hidden
    backward = taped + min(taped * sizes.layers, TAPE_BYTES) + batch + 8 * layer + 2 * VOCAB_BYTES
    forward = 4 * tokens * sizes.hidden + 4 * sum(n * n for n in inner) + max(solver, batch)
    shown = sight_memory(asked.header, asked.family, asked.data)
    alive = 10 * layer + max(backward, forward, shown)
    needed, available = alive + alive // 4 + 128 * 2**20, machine.available_memory()
    if needed > available:
        raise MachineError(
            f"the analysis needs about {size(needed)} of memory, {size(available)} are available",
            hint="fewer --samples or a smaller --length need less",
        )
    check_room_on(machine, needed)
    tape, state = taped * sizes.layers, 4 * tokens * sizes.hidden  # a state replaces the one before it once it is whole
    check_disk((tape if tape > TAPE_BYTES else 0) + 2 * state, out, "the analysis")
    for author in authors_of({"calibration": asked.data}, ["calibration"], asked.header, None).values():
        author.check(machine)
