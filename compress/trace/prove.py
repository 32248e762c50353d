"""The proof, on a small instance: it streams as the stock model runs, cutting units is zeroing them, and a layer that
goes is the identity.

Both sides are stock transformers: the cut tensors are written under the changed config and loaded by its own class,
which must take every key; the other side is the instance itself with the columns zeroed that read the units, or with
the identity in the place of the layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.arch import Family, Group
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.reader import Reader
from compress.checkpoint.stock import load_stock
from compress.errors import UserError
from compress.steps.prune.surgery import columns, cut
from compress.stream.forward import Stream
from compress.stream.stock import quiet, told
from compress.trace import Unproved
from compress.trace.family import family_of_found, without_heads
from compress.trace.find import Found
from compress.trace.small import VOCAB, instance

EXACT = 1e-5  # largest difference of logits, relative to their spread
TOKENS = (2, 40)  # windows x tokens: longer than a small instance's sliding window
SILENT = 1e-3  # what zeroed units must change at least, relative to the spread of the logits

Tensors = dict[str, torch.Tensor]


def prove(found: Found, config: Mapping[str, Any]) -> Found:
    """`found`, without what does not hold on the small instance of `config`. Unproved where the FFN does not."""
    ids = torch.randint(3, VOCAB, TOKENS, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch) / "whole", instance(config)
        _save(model, folder)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
        family, header = family_of_found(found, config), read_header(folder)
        _names(family, header)
        _streams(folder, family, ids, logits)
        wrong = _is_masking(family, "ffn", model, header, ids, logits, Path(scratch) / "ffn")
        if wrong is not None:
            raise Unproved(f"its FFN neurons cannot be cut: {wrong}")
        if found.no_heads is None:
            wrong = _is_masking(family, "heads", model, header, ids, logits, Path(scratch) / "heads")
            if wrong is not None:
                found = without_heads(found, wrong)
        wrong = _is_skipping(family, model, header, ids, Path(scratch) / "shallow")
    return found if wrong is None else replace(found, no_depth=wrong)


def _save(model: nn.Module, folder: Path) -> None:
    made: Any = model
    with quiet():
        made.save_pretrained(folder)


def _names(family: Family, header: Header) -> None:
    """What the family says of names and shapes is what stock transformers saves."""
    implied = family.shapes(header)
    for name, shape in implied.items():
        stored = header.tensors.get(name)
        if stored is None or stored.shape != shape:
            said = "nothing" if stored is None else list(stored.shape)
            raise Unproved(f"stock transformers saves {said} as {name}, where {list(shape)} was found in the model")


def _streams(folder: Path, family: Family, ids: torch.Tensor, expected: torch.Tensor) -> None:
    try:
        with Reader(folder) as reader:
            found = Stream(reader, family, dtype=torch.float32).logits(ids)
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise Unproved(f"its layers do not run one by one: {said}") from None
    apart = _apart(found, expected)
    if not apart <= EXACT:
        raise Unproved(f"its layers, run one by one, give other logits than the whole model (by {apart:.1e})")


def _is_masking(
    family: Family, name: str, model: nn.Module, header: Header, ids: torch.Tensor, whole: torch.Tensor, folder: Path
) -> str | None:
    """Why cutting half of the units of group `name` is not zeroing them, or None."""
    sizes = family.sizes(header)
    group = next(g for g in family.groups(sizes, header.text_config) if g.name == name)
    keep = _half(group)
    gone = torch.tensor([unit for unit in range(group.units) if unit not in set(keep.tolist())])
    small, masked = dict(model.state_dict()), dict(model.state_dict())
    for index in range(sizes.layers):
        prefix = family.prefix(index)
        layer = {key.removeprefix(prefix): value for key, value in small.items() if key.startswith(prefix)}
        small |= {prefix + key: value.contiguous() for key, value in cut(layer, group, keep).items()}
        reader = f"{prefix}{group.reader}.weight"
        masked[reader] = masked[reader].clone()
        masked[reader][:, columns(gone, group.width)] = 0
    changes = {"intermediate_size": len(keep)}
    if name == "heads":
        fewer = {"num_attention_heads": len(keep), "num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
        changes = fewer
    config = family.with_units(header.config, changes)
    expected = _logits(_filled(instance(header.config), masked), ids)
    if not _apart(expected, whole) >= SILENT:
        return "zeroing them changes nothing"
    return _is("the masked one", small, header, config, folder, ids, expected)


def _is(
    which: str,
    small: Tensors,
    header: Header,
    config: Mapping[str, Any],
    folder: Path,
    ids: torch.Tensor,
    expected: torch.Tensor,
) -> str | None:
    """Why the folder of a cut, loaded by stock transformers, does not give the logits `expected` of which one it is to
    be, or None."""
    try:
        found = _logits(_loaded(small, header, config, folder), ids)
    except UserError as error:
        return error.message.removeprefix(f"{folder}: ")
    except Exception as error:  # whatever a stock class raises for a config that it takes
        return " ".join(str(error).split())[:160]
    apart = _apart(found, expected)
    return None if apart <= EXACT else f"the cut model is not {which} (logits differ by {apart:.1e})"


def _is_skipping(family: Family, model: nn.Module, header: Header, ids: torch.Tensor, folder: Path) -> str | None:
    """Why a model without its first layer is not the one in which the identity takes that layer's place, or None."""
    kept = range(1, family.sizes(header).layers)
    if not kept:
        return None
    small = {name: value for name, value in model.state_dict().items() if not name.startswith(family.inside)}
    for new, old in enumerate(kept):
        small |= {
            family.prefix(new) + name.removeprefix(family.prefix(old)): value
            for name, value in model.state_dict().items()
            if name.startswith(family.prefix(old))
        }
    config = family.shallow(told(family, header), kept)
    handle = model.get_submodule(family.prefix(0)[:-1]).register_forward_hook(_identity, with_kwargs=True)
    try:
        expected = _logits(model, ids)
    finally:
        handle.remove()
    return _is("the one without its first layer", small, header, config, folder, ids, expected)


def _identity(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
    del module
    hidden = args[0] if args else given["hidden_states"]
    return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])


def _half(group: Group) -> torch.Tensor:
    """Half of the units of every balance block, in no regular order."""
    generator = torch.Generator().manual_seed(2)
    blocks = [
        start + torch.randperm(group.balance, generator=generator)[: max(1, group.balance // 2)]
        for start in range(0, group.units, group.balance)
    ]
    return torch.cat(blocks).sort().values


def _filled(model: nn.Module, tensors: Tensors) -> nn.Module:
    model.load_state_dict(tensors)
    return model


def _loaded(tensors: Tensors, header: Header, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The folder that a cut writes, loaded by stock transformers; UserError for a key that it does not take."""
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = {name: tensors[name].clone() for name in header.tensors if name in tensors}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with quiet():
        model: nn.Module = load_stock(folder, torch.float32)
    return model


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float()


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the spread of what was expected."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.std().clamp_min(1e-12))
