"""Options of the prune step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from compress.arch import FLAVOURS
from compress.criteria import CRITERIA
from compress.data import PADDING, TOKEN_KINDS
from compress.errors import did_you_mean
from compress.limits import DAMPINGS
from compress.numbers import COUNTS, SIZES, number_or
from compress.steps.types import StepOptions, one_of

ALLOCATIONS = (UNIFORM, PER_LAYER) = ("uniform", "per-layer")
SHARED = tuple(name for name in TOKEN_KINDS if name != TOKEN_KINDS[PADDING])  # kinds of tokens that can have a share
TOKEN_WEIGHTS = ("none", "norm")


def _patterns(found: Any) -> Any:
    """A list, or text with commas between: patterns of modules."""
    if found is None:
        return None
    given = found.split(",") if isinstance(found, str) else found
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) and each.strip() for each in given):
        raise ValueError(f"found {found!r}, allowed: a list of patterns, or text such as layers.11.mlp,layers.0-3.*")
    return tuple(each.strip() for each in given)


def _widths(found: Any) -> Any:
    """A map, or text with commas between: patterns of modules and the units that stay."""
    if found is None:
        return None
    wrong = ValueError(f"found {found!r}, allowed: a map of patterns to widths, or text such as layers.5.mlp=1024")
    given = found
    if isinstance(found, str):
        pairs = [[side.strip() for side in each.split("=")] for each in found.split(",")]
        if not all(len(pair) == 2 for pair in pairs):
            raise wrong
        given = {name: int(width) if width.isascii() and width.isdigit() else width for name, width in pairs}
        if len(given) < len(pairs):
            raise ValueError(f"found {found!r}, where a pattern stands twice")
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given):
        raise wrong
    for name, width in given.items():
        if type(width) is not int or width <= 0:
            raise ValueError(f"the width of '{name}' is {width!r}, allowed: a whole number above 0")
    return dict(given)


def _token_shares(found: Any) -> Any:
    """A map, or text with commas between: kinds of tokens and their shares of the weight."""
    if found is None:
        return None
    pairs: list[Any] = list(found.items()) if isinstance(found, Mapping) else []
    if isinstance(found, str):
        pairs = [[side.strip() for side in each.split("=")] for each in found.split(",")]
    wrong = ValueError(f"found {found!r}, allowed: a map of kinds to shares, or text such as prompt=0.4,answer=0.6")
    if not pairs or not all(len(pair) == 2 for pair in pairs):
        raise wrong
    shares: dict[str, float] = {}
    for name, share in pairs:
        if name not in SHARED:
            raise ValueError(f"unknown kind of token '{name}'{did_you_mean(str(name), SHARED)}")
        if name in shares:
            raise ValueError(f"{name} stands twice")
        try:
            shares[name] = float(share)
        except (TypeError, ValueError):
            raise wrong from None
        if isinstance(share, bool) or not 0 <= shares[name] < math.inf:
            raise ValueError(f"the share of {name} is {share!r}, allowed: a number, 0 or above")
    if not any(shares.values()):
        raise ValueError(f"found {found!r}, where nothing has a share")
    return shares


def _as_text(found: Any) -> Any:
    """A path as recipes write it."""
    return os.fspath(found) if isinstance(found, os.PathLike) else found


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
Patterns = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_patterns),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _TEXT}, _TEXT, {"type": "null"}]}),
]
Widths = Annotated[
    dict[str, int] | None,
    BeforeValidator(_widths),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "integer", "exclusiveMinimum": 0}},
                _TEXT,
                {"type": "null"},
            ]
        }
    ),
]
TokenShares = Annotated[
    dict[str, float] | None,
    BeforeValidator(_token_shares),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {name: {"type": "number", "minimum": 0} for name in SHARED},
                    "additionalProperties": False,
                },
                _TEXT,
                {"type": "null"},
            ]
        }
    ),
]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


LAYER_CRITERIA = {  # how decoder layers are chosen: name -> paper; compress/steps/prune/depth.py computes them
    "angular": "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887",
    "influence": "Men et al. 2024, ShortGPT: Layers in LLMs are More Redundant Than You Expect, arXiv:2403.03853",
    "loss": "Kim et al. 2024, Shortened LLaMA: Depth Pruning for Large Language Models, arXiv:2402.02834",
}


KV_MERGES = (MEAN, ALIGNED, DROP) = ("mean", "aligned", "drop")


class PruneOptions(StepOptions):
    """Remove query heads, FFN neurons and decoder layers; refit what reads the units."""

    ratio: Share | None = Field(
        None,
        description="Share of the decoder layers' attention + FFN matrix parameters to remove; taken from the FFN "
        "alone, or with heads the FFN takes the rest; with from_sensitivity as its curves say.",
    )
    ffn: Share | None = Field(None, description="Share of the FFN neurons to remove.")
    heads: Share | None = Field(
        None, description="Share of the query heads to remove, equally many from every KV head's group."
    )
    keep_ffn: Count | None = Field(None, description="FFN neurons to keep in every layer, exactly.")
    keep_heads: Count | None = Field(None, description="Query heads to keep in every layer, exactly.")
    keep_layers: Count | None = Field(
        None, description="Decoder layers to keep, exactly; ratio and the targets count what goes with the others."
    )
    keep_vision_layers: Count | None = Field(
        None, description="Blocks of the vision tower to keep, exactly; found on the calibration's images."
    )
    keep_vision_ffn: Count | None = Field(
        None, description="FFN neurons of the vision tower's merger to keep, exactly; ranked and refitted on images."
    )
    keep_kv_heads: Count | None = Field(
        None,
        description="KV heads to keep in every layer, exactly: merged (a divisor of what the model has) or dropped.",
    )
    kv_cache_bytes: Annotated[int | None, *number_or(SIZES, "12KiB or 20480")] = Field(
        None,
        description="Bytes that the keys and values of a token may take in the cache, in the checkpoint's dtype, as in "
        "12KiB: as many KV heads stay as fit.",
    )
    kv_merge: Annotated[str, *one_of("way to merge KV heads", KV_MERGES)] = Field(
        ALIGNED,
        description="What becomes of KV heads: mean (averaged), aligned (turned towards each other, then the best "
        "common head) or drop (the least costly go, with their query heads).",
    )
    layer_criterion: Annotated[str, *one_of("layer criterion", LAYER_CRITERIA)] = Field(
        "angular",
        description="Which layers go: angular (the block whose input and output differ least in angle), influence "
        "(those that change the angle of their input least) or loss (those without which, one at a time, the model's "
        "loss rises least).",
    )
    layer_samples: Count = Field(
        8,
        description="Calibration windows, at most, on which layer_criterion loss measures the model without each "
        "layer: as much work as layers / 2 forward passes over them.",
    )
    params: Annotated[int | None, *number_or(COUNTS, "9B, 8.93B, 900M or 9.0e9")] = Field(
        None,
        description="Parameters of the whole model to stay within, by 1.5 % at most, as in 9B or 900M: the FFN takes "
        "what heads or keep_heads leave.",
    )
    bytes: Annotated[int | None, *number_or(SIZES, "17.9GB or 11GiB")] = Field(
        None, description="Bytes of this step's weight files to stay within, as in 17.9GB or 11GiB; like params."
    )
    allocation: Annotated[str, *one_of("allocation", ALLOCATIONS)] = Field(
        UNIFORM,
        description="Widths alike in all layers (uniform), or by layer (per-layer: needs from_sensitivity, and who "
        "loads the result trust_remote_code).",
    )
    protect: Patterns = Field(
        None,
        description="Decoder modules that are not cut, by name or pattern, as in layers.11.mlp,layers.0-3.*; layers "
        "then differ in width.",
    )
    pin: Widths = Field(
        None,
        description="Units that stay in decoder modules, exactly, as in layers.5.mlp=1024,layers.2?.self_attn=8; "
        "layers then differ in width.",
    )
    flavour: Annotated[str, *one_of("flavour", FLAVOURS)] = Field(
        "portable",
        description="What a glm4v with fewer heads becomes: portable (glm46v, for stock transformers and vLLM) or "
        "native (glm4v, for vLLM alone).",
    )
    criterion: Annotated[str, *one_of("criterion", CRITERIA)] = Field(
        "wanda", description=f"How units are ranked: {', '.join(CRITERIA)}."
    )
    from_sensitivity: Annotated[str, Field(min_length=1), BeforeValidator(_as_text)] | None = Field(
        None,
        description="Folder of the sensitivity command, of this very model: units are ranked as there, and only what "
        "the refit needs is gathered again.",
    )
    gradient_samples: Count = Field(
        16, description="Calibration windows, at most, that the backward pass of taylor, fisher and tp-taylor sees."
    )
    refit: bool = Field(True, description="Refit the reading matrix by least squares from the original weights.")
    joint_refit: Annotated[int, Field(ge=0, le=20)] = Field(
        0,
        description="Gauss-Newton steps, after the refit, that move the FFN's gate, up and down projections together "
        "towards what the whole FFN gave; 2 are worth their time, if quality is.",
    )
    error_propagation: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="How far the FFN's refits are aimed from what the whole layer gives for what it gets from pruned "
        "layers (0) at what it gave in the dense model (1), to make good what those have lost; 0.3 is worth its time, "
        "if quality is.",
    )
    damping: Annotated[float, Field(gt=0, le=10**6)] = Field(
        0.01, description="Ridge of the refit (and of obs), relative to the mean of the Gram matrix' diagonal."
    )
    held_out: Share | None = Field(
        None,
        description="Share of the calibration windows that are kept back: on them the damping of each refit is chosen, "
        f"of values between {DAMPINGS[0]} and {DAMPINGS[-1]}; the refit itself then sees all windows.",
    )
    token_weights: Annotated[str, *one_of("token weights", TOKEN_WEIGHTS)] = Field(
        "none",
        description="What calibration tokens weigh in all statistics: none (all the same) or norm (1 / mean square of "
        "the residual stream that goes into the layer).",
    )
    token_shares: TokenShares = Field(
        None,
        description=f"Share of the weight of all tokens that each kind of token has ({', '.join(SHARED)}), as in "
        "prompt=0.4,answer=0.6; every kind that occurs must be named.",
    )
    force: bool = Field(
        False, description="Prune even with fewer calibration tokens than a refitted matrix has columns."
    )
