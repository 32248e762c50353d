"""Calibration, training and evaluation tokens: a source of text, its tokens in disjoint windows, and a digest.

What a source is stands in docs/data.md. The same source, length, samples and seed give the same windows; torch and
transformers are not imported before a tokenizer is needed, datasets and pyarrow not before a source needs them.
"""

from __future__ import annotations

from compress.data.builtin import PARAGRAPH, SHARES, builtin_parts, normalised
from compress.data.chat import has_template
from compress.data.images import Picture, Processor, processor_of
from compress.data.kinds import IMAGE, PADDING, TOKEN_KINDS, occurring
from compress.data.sample import sampling_memory
from compress.data.sources import BYTES_A_TOKEN, check, commits, documents, expected_tokens, most_tokens, pictures_of
from compress.data.spec import BUILTIN, KINDS, SELF, DataSpec, Part, counts, local_paths, parse_sources, sources
from compress.data.tokens import TOKENIZERS, Tokens, evenly_spaced, windows

__all__ = [
    "BUILTIN",
    "BYTES_A_TOKEN",
    "IMAGE",
    "KINDS",
    "PADDING",
    "PARAGRAPH",
    "SELF",
    "SHARES",
    "TOKENIZERS",
    "TOKEN_KINDS",
    "DataSpec",
    "Part",
    "Picture",
    "Processor",
    "Tokens",
    "builtin_parts",
    "check",
    "commits",
    "counts",
    "documents",
    "evenly_spaced",
    "expected_tokens",
    "has_template",
    "local_paths",
    "most_tokens",
    "normalised",
    "occurring",
    "parse_sources",
    "pictures_of",
    "processor_of",
    "sampling_memory",
    "sources",
    "windows",
]
