"""Windows of whole documents, where some show images: an image is one run of tokens that no window may cut.

Documents follow each other, an end-of-sequence token between them; the first one that does not fit begins the
next window, and what remains of a window is padding, which weighs nothing and which no token before it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import read_json
from compress.data.chat import Chat, Document
from compress.data.images import Picture, processor_of
from compress.data.kinds import IMAGE, PADDING, PROMPT, TEXT, characters, of_tokens
from compress.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Packed:
    """ids int64 and kinds int8 [N, length]; `images` of each window, in the order of their tokens; `tokens`: of all
    documents, padding left out."""

    ids: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int8]
    images: list[tuple[Picture, ...]]
    tokens: int


@dataclass(frozen=True)
class _Piece:
    """The tokens of one document; `after`: the kind of what divides it from a next one."""

    ids: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int8]
    images: tuple[Picture, ...]
    after: int


def pack(
    documents: Sequence[Document], texts: Sequence[str], tokenizer: Any, folder: Path, length: int, kinds: bool
) -> Packed:
    """Pack the documents, rendered as `texts`, into windows of `length` tokens. `kinds`: tell prompts from answers.

    A document longer than a window is cut at its end, if no image is lost with it; else UserError. Raises UserError as
    well for a template that does not write one image token for each image.
    """
    import numpy as np

    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(f"{folder}: the tokenizer has no eos_token to put between documents")
    rows: list[list[_Piece]] = []
    room = 0
    for document, text in zip(documents, texts, strict=True):
        piece = _cut(_piece(document, text, tokenizer, folder, kinds), length, document)
        if room < 1 + len(piece.ids):
            rows.append([])
            room = length + 1
        rows[-1].append(piece)
        room -= 1 + len(piece.ids)
    ids = np.full((len(rows), length), end, dtype=np.int64)
    told = np.full((len(rows), length), PADDING, dtype=np.int8)
    for row, pieces in enumerate(rows):
        at, after = 0, TEXT
        for piece in pieces:
            if at:
                told[row, at] = after  # what stands between two documents belongs to the first, and is no answer
                at += 1
            ids[row, at : at + len(piece.ids)] = piece.ids
            told[row, at : at + len(piece.ids)] = piece.kinds
            at, after = at + len(piece.ids), piece.after
    images = [tuple(image for piece in pieces for image in piece.images) for pieces in rows]
    return Packed(ids, told, images, int((told != PADDING).sum()))


def _piece(document: Document, text: str, tokenizer: Any, folder: Path, kinds: bool) -> _Piece:
    """The tokens of a document, each image's as many as the stock processor writes for it."""
    import numpy as np

    how = {"return_offsets_mapping": True} if kinds else {}
    found = tokenizer(text, add_special_tokens=False, verbose=False, **how)
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    told = np.full(len(ids), TEXT, dtype=np.int8)
    if kinds:
        told = of_tokens(characters([document], [text], "", tokenizer, folder), found["offset_mapping"])
    is_chat = isinstance(document, Chat)
    images = document.images if isinstance(document, Chat) else ()
    after, places = PROMPT if kinds and is_chat else TEXT, marks(ids, folder)
    if int(places.sum()) != len(images):
        where = document.where if isinstance(document, Chat) else f"the text {text[:40]!r}"
        raise UserError(f"{where}: {len(images)} images, and {int(places.sum())} image tokens in its text")
    if not images:
        return _Piece(ids, told, (), after)
    processor = processor_of(folder)
    counts = np.ones(len(ids), dtype=np.int64)
    counts[places] = [processor.tokens(processor.grid_of(image)) for image in images]
    told[places] = IMAGE
    return _Piece(np.repeat(ids, counts), np.repeat(told, counts), images, after)


def marks(ids: npt.NDArray[np.int64], folder: Path) -> npt.NDArray[np.bool_]:
    """Which of the ids stand for an image, by the config.json in `folder`."""
    import numpy as np

    mark = read_json(folder / "config.json").get("image_token_id")
    return np.zeros(ids.shape, dtype=np.bool_) if mark is None else ids == mark


def _cut(piece: _Piece, length: int, document: Document) -> _Piece:
    """The document as one window holds it: what is too long loses its end."""
    import numpy as np

    if len(piece.ids) <= length:
        return piece
    shown = np.flatnonzero(piece.kinds == IMAGE)
    if len(shown) and shown[-1] >= length and isinstance(document, Chat):
        raise UserError(
            f"{document.where}: {shown[-1] + 1} tokens up to the end of its last image, and a window is {length}",
            hint="a larger length, or smaller images",
        )
    return replace(piece, ids=piece.ids[:length], kinds=piece.kinds[:length])
