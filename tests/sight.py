"""A pico glm4v that can be shown images: its tokenizer has the marks, a chat template writes them, a processor cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import Glm4vImageProcessorPil

from compress.data import processor_of
from compress.data.tokens import Tokens
from tests import tiny

# as that of GLM-4.1V: the marks around an image, and a prompt for an answer
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST = 258  # the first id that the pico tokenizer does not have


def can_see(folder: Path) -> Path:
    """Give the pico glm4v in `folder` what a chat with images needs."""
    tokenizer = tiny.tokenizer()
    names = [f"<unused{index}>" for index in range(FIRST, tiny.IMAGE_TOKEN)]
    marks = ["<|image|>", "<|begin_of_image|>", "<|end_of_image|>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in [*names, *marks]])
    assert tokenizer.convert_tokens_to_ids(marks) == [tiny.IMAGE_TOKEN, 301, 302]
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    Glm4vImageProcessorPil(size={"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 84 * 84}).save_pretrained(folder)
    return folder


def stock_inputs(model: Path, tokens: Tokens) -> dict[str, torch.Tensor]:
    """What a stock model takes for these windows, from its own image processor."""
    pixels, grids = processor_of(model).pixels([image for window in tokens.images for image in window])
    ids = torch.from_numpy(tokens.ids)
    return {
        "input_ids": ids,
        "pixel_values": torch.from_numpy(pixels),
        "image_grid_thw": torch.from_numpy(grids),
        "mm_token_type_ids": (ids == tiny.IMAGE_TOKEN).long(),
    }


def chats(folder: Path, count: int = 10, text: str = "what is it? ") -> Path:
    """A .jsonl file of conversations with one or two noisy images each, of several sizes, beside it."""
    draw = np.random.default_rng(0)
    (folder / "shots").mkdir(parents=True)
    lines = []
    for index in range(count):
        parts: list[dict[str, Any]] = []
        for name in (f"shots/{index}.png", f"shots/{index}b.png")[: 1 + index % 2]:
            size = (int(draw.integers(20, 90)), int(draw.integers(20, 90)), 3)
            Image.fromarray(draw.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
            parts += [{"type": "text", "text": text[: 3 + index]}, {"type": "image", "image": name}]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}
        lines.append({"messages": [asked, {"role": "assistant", "content": f"a picture, number {7**index}"}]})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
