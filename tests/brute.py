"""Statistics as they are defined, judges of the streamed ones: of a Linear's inputs in float64 over all tokens at once;
of gradients by autograd on the whole stock model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.arch import family_of
from compress.checkpoint.headers import read_header
from compress.stream import Statistic
from tests.stock import load

Gradients = list[dict[str, dict[Statistic, torch.Tensor]]]  # a map of groups a layer


def statistics(inputs: torch.Tensor, width: int, weights: torch.Tensor | None = None) -> dict[Statistic, torch.Tensor]:
    """All statistics of inputs [windows, L, n] whose units own `width` columns each; weights [windows, L]."""
    x = inputs.double().numpy()
    flat = x.reshape(-1, x.shape[-1])
    w = np.ones(x.shape[:2]) if weights is None else weights.double().numpy()
    each, windows = w.flatten(), w.sum(1)
    norms = np.stack([np.linalg.norm(unit, axis=-1) for unit in np.split(x, x.shape[-1] // width, axis=-1)])
    per_window = np.einsum("unl,nl->un", norms, w) / np.maximum(windows, 1e-300)  # [units, windows]
    mean = np.average(flat, axis=0, weights=each)
    found: dict[Statistic, npt.NDArray[Any]] = {
        "gram": flat.T @ (flat * each[:, None]) / each.sum(),
        "square": np.average(flat**2, axis=0, weights=each),
        "variance": np.average((flat - mean) ** 2, axis=0, weights=each),
        "activity": np.sqrt(np.average(per_window**2, axis=1, weights=windows)),
    }
    return {kind: torch.from_numpy(value).float() for kind, value in found.items()}


def gradients(
    folder: Path,
    ids: torch.Tensor,
    more: Sequence[Mapping[str, torch.Tensor]] | None = None,
    counted: torch.Tensor | None = None,
) -> tuple[Gradients, dict[tuple[int, str], torch.Tensor]]:
    """The same by the definitions, window by window, with the whole stock model; and every E[g g^T]. more: what the
    model takes beside the ids of each window; counted [N, L]: the tokens whose prediction is part of the loss."""
    stock, header = load(folder), read_header(folder)
    family, sizes = family_of(header), family_of(header).sizes(header)
    groups = family.groups(sizes, header.text_config)
    labels = ids if counted is None else ids.where(counted, -100)
    tokens = int((labels[:, 1:] != -100).sum())
    layers = [stock.get_submodule(f"{family.text}.layers.{index}") for index in range(sizes.layers)]
    weights = {
        (i, cut.tensor): layers[i].get_parameter(cut.tensor)
        for i in range(len(layers))
        for g in groups
        for cut in g.cuts
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    masks = {(i, g.name): torch.ones(g.units, requires_grad=True) for i in range(len(layers)) for g in groups}
    outs: dict[tuple[int, str], torch.Tensor] = {}
    for i, layer in enumerate(layers):
        for g in groups:
            reader = layer.get_submodule(g.reader)
            reader.register_forward_pre_hook(
                lambda m, a, k=(i, g.name), w=g.width: (a[0] * masks[k].repeat_interleave(w),)
            )
            reader.register_forward_hook(lambda m, a, o, k=(i, g.name): outs.update({k: o}))
    slopes = {key: torch.zeros_like(value) for key, value in weights.items()}
    fisher = {key: torch.zeros_like(value) for key, value in masks.items()}
    matrices: dict[tuple[int, str], torch.Tensor] = {}
    for index, label in enumerate(labels[:, 1:]):
        given = {} if more is None else more[index]
        logits = stock(input_ids=ids[index : index + 1], **given, use_cache=False).logits[0, :-1].float()
        summed = torch.nn.functional.cross_entropy(logits, label, reduction="sum")
        keys, leaves = [*weights, *masks, *outs], [*weights.values(), *masks.values(), *outs.values()]
        got = torch.autograd.grad(summed, leaves)
        for key, slope in zip(keys[: len(weights)], got, strict=False):
            slopes[key] += slope / tokens
        for key, slope in zip(masks, got[len(weights) :], strict=False):
            fisher[key] += (slope / int((label != -100).sum())).square() / len(ids)
        for key, slope in zip(outs, got[len(weights) + len(masks) :], strict=True):
            matrices[key] = matrices.get(key, 0) + slope[0].T @ slope[0] / tokens
    expected: Gradients = []
    for i in range(len(layers)):
        expected.append({})
        for g in groups:
            taylor = torch.zeros(g.units)
            for unit in range(g.units):
                for cut in g.cuts:
                    mine = slice(cut.offset + unit * cut.width, cut.offset + (unit + 1) * cut.width)
                    product = (weights[i, cut.tensor].detach() * slopes[i, cut.tensor]).abs()
                    taylor[unit] += (product[mine] if cut.axis == 0 else product[:, mine]).sum()
            seen: dict[Statistic, torch.Tensor] = {
                "taylor": taylor,
                "fisher": fisher[i, g.name],
                "output_fisher": matrices[i, g.name].diagonal(),
            }
            expected[i][g.name] = seen
    return expected, matrices
