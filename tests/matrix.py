"""The checkpoints that formats are tried on: families, dtypes, shards and ties, in few cases that show every pair.

A family that `compress.arch` lists takes part by itself, once tests/tiny.py has a pico model of its name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress.arch import FAMILIES, family_of
from compress.checkpoint.headers import read_header
from compress.formats import FORMATS
from tests import tiny

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what stock transformers loads, and so can judge
LOADED = [name for name, family in FAMILIES.items() if family.stock is None]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis, so that any two values of two axes meet in one: greedily few, evenly mixed."""
    rows = {row: _pairs(row) for row in itertools.product(*axes)}
    times = dict.fromkeys((pair for pairs in rows.values() for pair in pairs), 0)
    chosen = []
    while not all(times.values()):
        best = max(rows, key=lambda row: [sum(not times[p] for p in rows[row]), -sum(times[p] for p in rows[row])])
        times.update({pair: times[pair] + 1 for pair in rows[best]})
        chosen.append(best)
    return chosen


def _pairs(row: tuple[Any, ...]) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(row), 2))


@dataclass(frozen=True)
class Case:
    """One checkpoint and the format it is to get; `load`: the dtype that stock transformers is asked for."""

    how: str
    family: str
    dtype: str
    sharded: bool
    tied: bool
    load: str

    def __str__(self) -> str:
        layout = f"{'shards' if self.sharded else 'file'}-{'tied' if self.tied else 'untied'}"
        return f"{self.how}-{self.family}-{self.dtype}-{layout}-{self.load}"

    def source(self, folder: Path) -> Path:
        """The pico model, made in `folder` or found there."""
        name = f"{self.family}-{self.dtype}-{self.sharded}-{self.tied}"
        if not (folder / name).exists():
            getattr(tiny, self.family)(folder / name, dtype=DTYPES[self.dtype])
            if self.tied:
                tie(folder / name)
            if self.sharded:
                shard(folder / name)
        return folder / name


CASES = [
    Case(*row) for row in pairwise(list(FORMATS), LOADED, list(DTYPES), (False, True), (False, True), ["F32", "BF16"])
]


def tie(folder: Path) -> None:
    """Make lm_head the embedding, in config and weights."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = True
    tensors = load_file(folder / "model.safetensors")
    family = family_of(read_header(folder))
    del tensors[f"{family.head}.weight"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Deal the tensors out to three files, without regard for layers."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(3):
        file = f"model-{index + 1:05d}-of-00003.safetensors"
        part = dict(list(tensors.items())[index::3])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
