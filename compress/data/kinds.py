"""Kinds of tokens: plain text, and in chats what the model is shown and told and what it answers. Torch-free.

Token weights give each kind its share (the prune step); what a kind is stands in docs/data.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.chat import Chat, Document, answers
from compress.data.sources import hub_limit, read
from compress.data.spec import SELF, DataSpec, Part, counts
from compress.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A token's kind is its index here. padding: what fills a window up; nobody gives it a share.
TOKEN_KINDS = ("padding", "text", "image", "prompt", "answer")
PADDING, TEXT, IMAGE, PROMPT, ANSWER = range(len(TOKEN_KINDS))


def occurring(spec: DataSpec, part: Part) -> set[str]:
    """The kinds that the tokens of `spec` have, from its documents: without a tokenizer or a model."""
    found: set[str] = set()
    for source, count in counts(spec).items():
        if source == SELF:
            found.add(TOKEN_KINDS[TEXT])
            continue
        for document in read(source, part, hub_limit(count, spec.length)).documents:
            found |= {TOKEN_KINDS[kind] for kind in _of(document)}
    return found


def _of(document: Document) -> set[int]:
    if not isinstance(document, Chat):
        return {TEXT}
    answered = any(message["role"] == "assistant" for message in document.messages)
    return {PROMPT} | ({ANSWER} if answered else set()) | ({IMAGE} if document.images else set())


def count_of(kinds: npt.NDArray[np.int8]) -> dict[str, int]:
    """How many tokens there are of each kind that occurs."""
    return {name: n for index, name in enumerate(TOKEN_KINDS) if (n := int((kinds == index).sum()))}


def characters(
    documents: Sequence[Document], texts: Sequence[str], between: str, tokenizer: Any, folder: Path
) -> npt.NDArray[np.int8]:
    """The kind of every character of `texts`, the documents as they are rendered, joined by `between`, which is of the
    kind of what it follows."""
    import numpy as np

    parts = []
    for index, (document, text) in enumerate(zip(documents, texts, strict=True)):
        is_chat = isinstance(document, Chat)
        length = len(text) + (len(between) if index + 1 < len(documents) else 0)
        kinds = np.full(length, PROMPT if is_chat else TEXT, dtype=np.int8)
        if isinstance(document, Chat):
            for start, end in answers(document, tokenizer, folder):
                kinds[start:end] = ANSWER
        parts.append(kinds)
    return np.concatenate(parts)


def of_tokens(kinds: npt.NDArray[np.int8], offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int8]:
    """The kind of every token: that of the first character it stands for."""
    import numpy as np

    starts = np.fromiter((start for start, _ in offsets), dtype=np.int64, count=len(offsets))
    found: npt.NDArray[np.int8] = kinds[np.minimum(starts, len(kinds) - 1)]
    return found


def check_offsets(tokenizer: Any, folder: Path) -> None:
    """UserError for a tokenizer that does not say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: token_shares need a tokenizer.json: this tokenizer does not tell which characters a token is"
        )
