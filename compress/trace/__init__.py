"""Families that nobody described: found in the stock model, proved on a small instance of it, then used.

`traced(config)` builds a small instance of the class that a config.json names, finds its decoder and what is coupled to
its FFN neurons and query heads (find.py), and proves it there (prove.py): a cut model computes what the model with the
same units zeroed computes, and stock transformers loads it. What cannot be proved is refused with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from compress.arch import Family

# what says nothing of the decoder: a config that differs in these alone is not traced anew
ASIDE = ("quantization_config", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map")


class Unproved(Exception):
    """Why a model is no decoder that can be streamed and cut, in a few words."""


def traced(config: Mapping[str, Any], known: tuple[str, ...]) -> Family:
    """The family of a raw config.json whose model_type is none of the described ones, `known`.

    UserError with one line: a model_type that transformers lacks, or why the family could not be proved.
    """
    found = config.get("model_type")
    from transformers import CONFIG_MAPPING

    if not isinstance(found, str) or found not in set(CONFIG_MAPPING.keys()):
        raise UserError(f"config.json: model_type {found!r} is not supported{did_you_mean(str(found), known)}")
    text = json.dumps({key: value for key, value in config.items() if key not in ASIDE}, sort_keys=True)
    try:
        return _traced(text)
    except Unproved as why:
        raise UserError(f"config.json: model_type {found!r} is not supported: {why}") from None
    except UserError:
        raise
    except Exception as error:  # stock code of any model, run in ways that its authors did not think of
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"config.json: model_type {found!r} is not supported: it cannot be traced, {said}") from error


@lru_cache(maxsize=64)
def _traced(config: str) -> Family:
    from compress.stream.stock import stock_config
    from compress.trace.family import family_of_found
    from compress.trace.find import find
    from compress.trace.prove import prove
    from compress.trace.small import check_class, instance, smaller

    raw: dict[str, Any] = json.loads(config)
    check_class(raw)
    stock_config(raw)  # what is wrong with it is said of it, and not of the small instance
    try:
        little = smaller(raw)
        found = prove(find(instance(little), little), little)
    except UserError as error:
        raise Unproved(f"a small instance of it fails: {error.message.removeprefix('config.json: ')}") from None
    return family_of_found(found, raw)
