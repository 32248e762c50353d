"""Chats: `messages` of {role, content}, checked where they are read and rendered by the model's own template.

Content is a string or a list of text and image parts. Other keys of a message go to the template as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.headers import read_json
from compress.data.images import Picture, picture
from compress.errors import UserError

# what a template writes around the text, generously: a system prompt of its own, and the marks of a message
CHAT_BYTES, MESSAGE_BYTES = 512, 32
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


@dataclass(frozen=True)
class Chat:
    """One conversation; every message has a role and a content: text, or parts where it holds `images`, which stand in
    the order of their parts. `where` is its file and line."""

    messages: tuple[Mapping[str, Any], ...]
    where: str
    images: tuple[Picture, ...] = ()

    @property
    def nbytes(self) -> int:
        """About the most bytes that a template makes of it, images left out."""
        said = sum(len(message["role"].encode()) + len(said_in(message).encode()) for message in self.messages)
        return said + CHAT_BYTES + MESSAGE_BYTES * len(self.messages)


Document = str | Chat


def encoded(text: str, what: str, where: str) -> str:
    """`text`, which must have a UTF-8 form: JSON can write half of a surrogate pair, tokenizers cannot read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {what} holds half of a surrogate pair") from None
    return text


def said_in(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def chat(found: Any, where: str, folder: Path | None = None) -> Chat:
    """The chat of a value of `messages`, whose images lie in `folder`; UserError opens with `where` and says what is
    wrong with which message."""
    if not isinstance(found, (list, tuple)) or not found:
        shown = "an empty list" if isinstance(found, (list, tuple)) else type(found).__name__
        raise UserError(f"{where}: 'messages' must be a list of {{role, content}}, found {shown}")
    images: list[Picture] = []
    messages = [_message(message, f"{where}, message {i}", folder, images) for i, message in enumerate(found, 1)]
    return Chat(tuple(messages), where, tuple(images))


def _message(found: Any, where: str, folder: Path | None, images: list[Picture]) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: expected {{role, content}}, found {type(found).__name__}")
    kept = {key: value for key, value in found.items() if value is not None}  # a table has null for a missing key
    role = kept.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where}: 'role' must be text, found {role!r}")
    if "content" not in kept and not kept.get("tool_calls"):
        raise UserError(f"{where}: no 'content', found keys {', '.join(map(repr, kept))}")
    content = _content(kept.get("content", ""), where, folder, images)
    return kept | {"role": encoded(role, "'role'", where), "content": content}


def _content(content: Any, where: str, folder: Path | None, images: list[Picture]) -> str | list[dict[str, str]]:
    """The text of a content, its parts one after the other; with images, whose files go to `images`, the parts."""
    if isinstance(content, str):
        return encoded(content, "'content'", where)
    if not isinstance(content, (list, tuple)):
        raise UserError(f"{where}: 'content' must be text or a list of parts, found {type(content).__name__}")
    parts, shown = [], len(images)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(kind, str) and kind.startswith(("video", "audio", "input_audio")):
            raise UserError(f"{where}: {kind} part; only text and images are read")
        if isinstance(part, Mapping) and isinstance(kind, str) and kind.startswith("image"):
            images.append(picture(part, folder, where))
            parts.append({"type": "image"})
            continue
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise UserError(f"{where}: a part must be {{type: text, text: ...}}, found a part of type {kind!r}")
        parts.append({"type": "text", "text": encoded(text, "'content'", where)})
    return parts if len(images) > shown else "".join(part["text"] for part in parts)


def has_template(folder: Path) -> bool:
    """Whether a checkpoint folder holds a chat template, in any of the places where transformers looks for one."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def no_template(folder: Path, where: str) -> UserError:
    """What is said where `messages` meet a tokenizer without a template."""
    return UserError(
        f"{where}: 'messages' need a chat template, and the tokenizer in {folder} has none",
        hint="give the conversations as plain text, in the string 'text'",
    )


def render(found: Chat, tokenizer: Any, folder: Path) -> str:
    """The chat as its model sees it, whole, without a prompt for a next answer."""
    whole = str(_applied(found, found.messages, tokenizer, folder))
    return encoded(whole, "what the template makes of it", found.where)


def answers(found: Chat, tokenizer: Any, folder: Path) -> list[tuple[int, int]]:
    """Where in the rendered chat the model's own words stand: [start, end) in characters, ascending.

    As the template marks them ({% generation %}), else from what it makes of the messages up to each answer: an answer
    begins where the prompt for it ends and ends with its message, the mark of its end included. UserError where that
    cannot be told, because the template writes earlier messages otherwise once later ones follow.
    """
    if _MARKED.search(str(tokenizer.chat_template)):
        return _marked(found, tokenizer, folder)
    whole, spans = render(found, tokenizer, folder), []
    for index, message in enumerate(found.messages):
        if message["role"] != "assistant":
            continue
        asked, before, after = (
            str(_applied(found, found.messages[:end], tokenizer, folder, add_generation_prompt=prompt)) if end else ""
            for end, prompt in ((index, True), (index, False), (index + 1, False))
        )
        begin, end = _shared(asked, whole), _shared(after, whole)
        # white space at an end may go when something follows: it is no sign that the template forgets
        if begin < len(before.rstrip()) or end < len(after.rstrip()):
            raise UserError(
                f"{found.where}, message {index + 1}: where this answer begins and ends cannot be told, because the "
                "chat template writes it otherwise once other messages follow",
                hint="give conversations with one answer, or mark answers in the template with {% generation %}",
            )
        # a prompt may hold what this answer lacks, as the beginning of a thought
        spans.append((min(begin, end), end))
    return spans


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _marked(found: Chat, tokenizer: Any, folder: Path) -> list[tuple[int, int]]:
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    tokens = _applied(
        found, found.messages, tokenizer, folder, **how, tokenizer_kwargs={"return_offsets_mapping": True}
    )
    pairs = zip(tokens["assistant_masks"], tokens["offset_mapping"], strict=True)
    return [(start, end) for own, (start, end) in pairs if own]


def _applied(
    found: Chat,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    folder: Path,
    *,
    tokenize: bool = False,
    **how: Any,
) -> Any:
    """What the template makes of some of the chat's messages."""
    if not tokenizer.chat_template:
        raise no_template(folder, found.where)
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=tokenize, **how)
    except Exception as error:  # a template is a program: it refuses with jinja's errors or dies of any other
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{found.where}: the chat template refuses these messages ({line})") from None
