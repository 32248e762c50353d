"""Calibration, training and evaluation tokens: a source of text, its tokens in disjoint windows, and a digest.

`builtin` is English prose that every CPython carries (`pydoc_data.topics`), split by topic into three parts that
share no paragraph. Everything else is a .txt or .jsonl file. The same source, length, samples and seed give the
same windows; torch and transformers are not imported before a tokenizer is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from compress.checkpoint.headers import read_json
from compress.errors import UserError, did_you_mean

Part = Literal["calibration", "training", "evaluation"]

BUILTIN = "builtin"
SUFFIXES = (".txt", ".jsonl")
SHARES: dict[Part, float] = {"calibration": 0.4, "training": 0.4, "evaluation": 0.2}
PARAGRAPH = 40  # normalised characters; shorter paragraphs ("For example:") may stand in several topics
BYTES_A_TOKEN = 3  # of prose, for estimates: common tokenizers take four and more
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class DataSpec(BaseModel):
    """Where tokens come from: `source` is `builtin` or a .txt / .jsonl file; `samples` windows of `length` tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field("builtin", description="builtin, or the path of a .txt or .jsonl file.")
    samples: Annotated[int, Field(gt=0)] | None = Field(None, description="Number of windows; default all.")
    length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens per window.")


@dataclass(frozen=True, eq=False)
class Tokens:
    """`ids`: int64 windows [N, length]. `digest`: sha256 of the text. `tokens`: of the whole text, before windows were
    chosen. `note`: one line on what was taken from where."""

    ids: npt.NDArray[np.int64]
    digest: str
    tokens: int
    note: str


def most_tokens(spec: DataSpec, part: Part) -> int:
    """The most tokens that any tokenizer makes of a source: one of a byte, and one between documents."""
    texts = documents(spec, part)
    return sum(len(text.encode()) for text in texts) + len(texts)


def check(spec: DataSpec, part: Part) -> None:
    """Refuse, without a tokenizer, what cannot give the windows asked for.

    Raises UserError: unknown source, missing or empty file, invalid UTF-8, a broken .jsonl line, or a text so short
    that no tokenizer makes enough tokens of it (none makes more than one token of a byte).
    """
    most = most_tokens(spec, part)
    need = spec.length * (spec.samples or 1)
    if most < need:
        raise UserError(
            f"{spec.source}: at most {most} tokens of {part} text, needed {need} ({spec.samples or 1} x {spec.length})",
            hint="use a longer text, fewer samples or a shorter length",
        )


def windows(spec: DataSpec, part: Part, folder: Path, seed: int) -> Tokens:
    """Windows of `spec.length` tokens of the tokenizer in `folder`: consecutive, disjoint, the rest is dropped.

    Evaluation takes `samples` of them evenly spaced, in order, from the tokenizer's default call; calibration and
    training a seeded choice without replacement, in seeded order, without the special tokens of a default call.
    Raises UserError for what `check` refuses, for a folder without a tokenizer, for fewer windows than `samples`,
    and for token ids outside the vocabulary of the folder's config.json.
    """
    texts = documents(spec, part)
    stream = _encode(texts, folder, special=part == "evaluation")
    count = len(stream) // spec.length
    need = spec.samples or 1
    if count < need:
        raise UserError(
            f"{spec.source}: {len(stream)} tokens of {part} text make {count} windows of {spec.length}, needed {need}",
            hint="use a longer text, fewer samples or a shorter length",
        )
    taken = spec.samples or count
    if part == "evaluation":
        chosen = evenly_spaced(count, taken)
    else:
        chosen = np.random.Generator(np.random.PCG64(seed)).permutation(count)[:taken]
    _check_vocabulary(stream, folder)
    how = "evenly spaced" if part == "evaluation" else f"chosen with seed {seed}"
    note = (
        f"{part}: {taken} of {count} windows x {spec.length} tokens, {how}, from {spec.source} ({len(stream)} tokens)"
    )
    return Tokens(stream[: count * spec.length].reshape(count, spec.length)[chosen], _digest(texts), len(stream), note)


def evenly_spaced(count: int, taken: int) -> npt.NDArray[np.int64]:
    """`taken` of `range(count)`, as `torch.linspace(0, count - 1, taken).long()` picks them.

    In float32 and from both ends towards the middle, as torch computes it: where a step is a whole number, float64
    would truncate to another row.
    """
    index = np.arange(taken, dtype=np.float32)
    step = np.float32(count - 1) / np.float32(max(taken - 1, 1))
    from_end = np.float32(count - 1) - step * index[::-1]
    picked = np.where(index < taken // 2, step * index, from_end)
    return picked.astype(np.int64) if taken > 1 else np.zeros(1, np.int64)


def documents(spec: DataSpec, part: Part) -> list[str]:
    """The texts of a source: a .txt is one document, a .jsonl one a line, builtin one a topic of `part`."""
    if spec.source == BUILTIN:
        return builtin_parts()[part]
    path = Path(spec.source)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"data source '{spec.source}': expected {BUILTIN} or a {' or '.join(SUFFIXES)} file"
            + (did_you_mean(spec.source, [BUILTIN]) if not path.suffix else "")
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    texts = [text] if path.suffix == ".txt" else _json_lines(path, text)
    if not any(text.strip() for text in texts):
        raise UserError(f"{path}: empty, no text found")
    return texts


def _json_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would split at U+2028 inside a string
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            keys = f"keys {', '.join(map(repr, value)) or 'none'}" if isinstance(value, dict) else type(value).__name__
            raise UserError(f"{path}, line {number}: expected an object with a string field 'text', found {keys}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}, line {number}: 'text' holds half of a surrogate pair") from None
        texts.append(text)
    return texts


def builtin_parts() -> dict[Part, list[str]]:
    """The three parts of `builtin`: lists of topics, about 40 / 40 / 20 by characters.

    A fifth of the topics' text is sections included a second time. Every paragraph is kept once, in the longest topic
    that has it, before topics are dealt out (the longest first, to the part that lacks most), so parts share none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no pydoc_data, so builtin data is not available", hint="name a .txt or .jsonl file"
        ) from None
    seen: set[str] = set()
    left: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [(p, normalised(p)) for p in re.split(r"\n[ \t]*\n", topics[name])]
        fresh = []
        for paragraph, plain in paragraphs:
            if plain and plain not in seen:
                fresh.append(paragraph)
            if len(plain) > PARAGRAPH:
                seen.add(plain)
        if any(len(normalised(p)) > PARAGRAPH for p in fresh):
            left[name] = "\n\n".join(fresh)
    return _deal(left)


def normalised(paragraph: str) -> str:
    """The paragraph with every run of whitespace as one space."""
    return " ".join(paragraph.split())


def _deal(topics: dict[str, str]) -> dict[Part, list[str]]:
    names: dict[Part, list[str]] = {part: [] for part in SHARES}
    size: dict[Part, int] = dict.fromkeys(SHARES, 0)
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        part = min(SHARES, key=lambda part: size[part] / SHARES[part])
        names[part].append(name)
        size[part] += len(topics[name])
    return {part: [topics[name] for name in sorted(chosen)] for part, chosen in names.items()}


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(b"\0".join(text.encode() for text in texts)).hexdigest()


def _encode(texts: list[str], folder: Path, special: bool) -> npt.NDArray[np.int64]:
    """One stream of token ids; documents are joined by the tokenizer's end-of-sequence token."""
    tokenizer = _tokenizer(folder)
    if len(texts) > 1 and not isinstance(tokenizer.eos_token, str):
        raise UserError(f"{folder}: the tokenizer has no eos_token to put between documents", hint="use a .txt file")
    text = (tokenizer.eos_token or "").join(texts) if len(texts) > 1 else texts[0]
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def _tokenizer(folder: Path) -> Any:
    # asked first: AutoTokenizer builds an empty tokenizer for some model types whose files are missing
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{folder}: no tokenizer ({TOKENIZERS[0]}); text cannot be turned into tokens")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files raise anything down there, bare Exception from Rust included
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({line})") from None


def _check_vocabulary(stream: npt.NDArray[np.int64], folder: Path) -> None:
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    size = (nested if isinstance(nested, dict) else config).get("vocab_size")
    if isinstance(size, int) and int(stream.max()) >= size:
        raise UserError(f"{folder}: the tokenizer gives id {int(stream.max())}, config.json has vocab_size {size}")
