"""A sensitivity folder, read back: what every unit costs, in which order units go, and what a group loses by it.

Allocation and `prune --from-sensitivity` stand on it. numpy only; whatever is wrong with the files is one clear line.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import read_json
from compress.errors import UserError

if TYPE_CHECKING:  # numpy is a fifth of what --help takes
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

FORMAT = 1
DOCUMENT, TENSORS = "sensitivity.json", "sensitivity.safetensors"
KINDS = ("cost", "order", "loss", "curve.removed", "curve.loss", "curve.error")
Key = tuple[int, str]  # (layer, group)


@dataclass(frozen=True, eq=False)
class Curve:
    """What one group of one layer loses by a growing cut.

    removed [m]: units that have gone, ascending from 0, which is all there is where none can go alone (heads that have
    a KV head each). loss [m]: predicted rise of the loss after the refit, nats a token, 0 at 0. error [m]: the relative
    output error of the refitted reader, ||Y' - Y||^2 / ||Y||^2.
    """

    removed: Ints
    loss: Floats
    error: Floats

    def at(self, removed: float) -> float:
        """The predicted loss of so many units; on the line between the neighbours where it was not computed."""
        import numpy as np

        return float(np.interp(removed, self.removed, self.loss))


@dataclass(frozen=True)
class Units:
    """Sizes of a group, layer by layer: its units, and how many in a row lose equally many; `width`: columns of the
    reader a unit owns."""

    units: tuple[int, ...]
    balance: tuple[int, ...]
    width: int


@dataclass(frozen=True, eq=False)
class Curves:
    """All of a sensitivity folder. Layers and units count from 0, arrays are by (layer, group).

    digest: of the folder's two files. model: of the files of the model (checkpoint.digests.model_digest).
    about: sensitivity.json. cost [units]: in the criterion's own measure; order [units]: the units from the first to
    go; unit_loss [units]: the predicted rise of the loss when that unit alone goes, nats a token.
    Beside heads, cost and unit_loss hold (layer, "kv"), [KV heads]: what all query heads of each cost together.
    """

    folder: Path
    digest: str
    model: str
    about: Mapping[str, Any]
    layers: int
    groups: Mapping[str, Units]
    curves: Mapping[Key, Curve]
    cost: Mapping[Key, Floats]
    order: Mapping[Key, Ints]
    unit_loss: Mapping[Key, Floats]

    @property
    def criterion(self) -> str:
        """The criterion that ranked the units, as recipes name it."""
        return str(self.about["criterion"])

    @property
    def tokens_per_column(self) -> float:
        """Calibration tokens for every column of the widest Gram matrix."""
        return min(float(group["tokens_per_column"]) for group in self.about["groups"].values())


def read_curves(folder: Path) -> Curves:
    """The folder that `autoglm-compress sensitivity` wrote.

    Raises UserError: no such folder, another format, a file that is missing, damaged, or contradicts the other.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = folder / DOCUMENT
    if not path.is_file():
        hint = "autoglm-compress sensitivity MODEL -o OUT writes such a folder"
        raise UserError(f"{folder}: no {DOCUMENT}", hint=hint)
    about = read_json(path)
    groups = _groups(path, about)
    stored = folder / TENSORS
    try:
        data = stored.read_bytes()
    except OSError as error:
        raise UserError(f"{stored}: not readable ({error.strerror or error})") from None
    if hashlib.sha256(data).hexdigest() != about["tensors_sha256"]:
        raise UserError(f"{stored}: damaged: not the file that {DOCUMENT} was written with")
    found = _arrays(stored, data, groups, len(about["layers"]))
    keys = [(layer, name) for layer in range(len(about["layers"])) for name in groups]
    return Curves(
        folder=folder,
        digest=hashlib.sha256(path.read_bytes() + data).hexdigest(),
        model=about["model"]["digest"],
        about=about,
        layers=len(about["layers"]),
        groups=groups,
        curves={key: Curve(*(found[f"curve.{kind}"][key] for kind in ("removed", "loss", "error"))) for key in keys},
        cost=found["cost"],
        order=found["order"],
        unit_loss=found["loss"],
    )


def _groups(path: Path, about: Mapping[str, Any]) -> dict[str, Units]:
    """The groups that sensitivity.json promises, after a look at everything that is read from it."""
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: format {about.get('format')!r}; this version reads format {FORMAT}")
    model, groups, layers = about.get("model"), about.get("groups"), about.get("layers")
    fine = (
        isinstance(about.get("criterion"), str)
        and _positive(about.get("damping"))
        and isinstance(about.get("tensors_sha256"), str)
        and isinstance(model, dict)
        and isinstance(model.get("digest"), str)
        and isinstance(model.get("name"), str)
        and _calibrated(about.get("calibration"))
        and isinstance(groups, dict)
        and groups
        and isinstance(layers, list)
        and layers
        and all(isinstance(g, dict) and _sized(g, len(layers)) for g in groups.values())
        and all(isinstance(layer, dict) and _names(layer.get("groups"), groups) for layer in layers)
    )
    if not fine or not isinstance(groups, dict) or not isinstance(layers, list):
        raise UserError(f"{path}: not what sensitivity writes (model, criterion, damping, calibration, groups, layers)")
    found: dict[str, Units] = {}
    for name, group in groups.items():
        units, balance = (each(group[key], len(layers)) for key in ("units", "balance"))
        assert units is not None and balance is not None
        found[name] = Units(units, balance, group["width"])
    return found


def _calibrated(said: Any) -> bool:
    """Whether it names a source, or several with their shares, and counts tokens."""
    source = said.get("source") if isinstance(said, dict) else None
    several = isinstance(source, dict) and all(isinstance(share, (int, float)) for share in source.values())
    return (isinstance(source, str) or several) and isinstance(said.get("tokens"), int)


def each(value: Any, layers: int) -> tuple[int, ...] | None:
    """A count of every layer, from one number or one a layer (checkpoint.per_layer.one_or_each); None if it is
    neither."""
    counts = value if isinstance(value, list) else [value] * layers
    return tuple(counts) if len(counts) == layers and all(type(one) is int and one > 0 for one in counts) else None


def _sized(group: Mapping[str, Any], layers: int) -> bool:
    units, balance = each(group.get("units"), layers), each(group.get("balance"), layers)
    fine = units and balance and all(not one % block for one, block in zip(units, balance, strict=True))
    counted = type(group.get("width")) is int and group["width"] > 0
    return bool(fine) and counted and _positive(group.get("tokens_per_column"))


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _names(entry: Any, groups: Mapping[str, Any]) -> bool:
    return (
        isinstance(entry, dict) and entry.keys() == groups.keys() and all(isinstance(e, dict) for e in entry.values())
    )


def _arrays(path: Path, data: bytes, groups: Mapping[str, Units], layers: int) -> dict[str, dict[Key, Any]]:
    """The tensors `layers.N.GROUP.KIND`, each with the right size and content."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserError(f"{path}: not readable ({error})") from None
    found: dict[str, dict[Key, Any]] = {kind: {} for kind in KINDS}
    for layer in range(layers):
        for name, units in groups.items():
            for kind in KINDS:
                tensor = tensors.get(f"layers.{layer}.{name}.{kind}")
                if tensor is None:
                    raise UserError(f"{path}: tensor 'layers.{layer}.{name}.{kind}' is missing")
                whole = kind in ("order", "curve.removed")
                found[kind][layer, name] = tensor.astype(np.int64 if whole else np.float64)
            size = units.units[layer]
            wrong = _wrong({kind: found[kind][layer, name] for kind in KINDS}, size)
            if name == "heads" and not wrong:
                wrong = _add_kv(found, tensors, layer, size // units.balance[layer])
            if wrong:
                raise UserError(f"{path}: layers.{layer}.{name}: {wrong}")
    return found


def _add_kv(found: Mapping[str, dict[Key, Any]], tensors: Mapping[str, Any], layer: int, count: int) -> str | None:
    """What the heads of each KV head cost together; what is wrong with it, or None."""
    import numpy as np

    for kind in ("cost", "loss"):
        tensor = tensors.get(f"layers.{layer}.kv.{kind}")
        if tensor is None or tensor.shape != (count,) or not np.isfinite(tensor).all():
            return f"kv.{kind} is not a number for each of {count} KV heads"
        found[kind][layer, "kv"] = tensor.astype(np.float64)
    return None


def _wrong(one: Mapping[str, Any], units: int) -> str | None:
    """What contradicts sensitivity.json, or makes no sense; None when all is well."""
    import numpy as np

    removed = one["curve.removed"]
    for kind in ("cost", "order", "loss"):
        if one[kind].shape != (units,):
            return f"{list(one[kind].shape)} values of {kind}, {DOCUMENT} says {units} units"
    for kind in ("cost", "loss", "curve.loss", "curve.error"):
        if not np.isfinite(one[kind]).all() or (kind != "cost" and (one[kind] < 0).any()):
            return f"a value of {kind} is NaN, infinite or negative"
    if not np.array_equal(np.sort(one["order"]), np.arange(units)):
        return f"order is not a permutation of {units} units"
    if removed.ndim != 1 or not len(removed) or removed[0] != 0 or (np.diff(removed) <= 0).any():
        return "curve.removed does not ascend from 0"
    if removed[-1] >= units or any(one[f"curve.{kind}"].shape != removed.shape for kind in ("loss", "error")):
        return f"a curve of other lengths, or beyond {units} units"
    if one["curve.loss"][0] != 0:
        return "a loss where nothing is removed"
    return None
