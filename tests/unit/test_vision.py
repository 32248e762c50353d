"""Images through the executor: the hidden states of every layer are those of the stock model that sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.arch import FAMILIES, family_of
from compress.checkpoint.reader import Reader
from compress.data import TOKEN_KINDS, DataSpec, processor_of, windows
from compress.data.images import PROCESSORS
from compress.data.tokens import Tokens
from compress.machine import Silent
from compress.stream import GRADIENTS
from compress.stream.backward import gradients
from compress.stream.forward import Stream
from compress.stream.vision import show, sight_of, token_positions
from tests import brute, sight, tiny
from tests.stock import load


def tokens_of(model: Path, chats: Path, **how: Any) -> Tokens:
    return windows(DataSpec(source=str(chats), samples=4, length=64), "calibration", model, 0, images=True, **how)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sight.chats(tmp_path_factory.mktemp("sight"))


@pytest.mark.parametrize("family", ["glm4v", "glm46v", "glm46v_interleaved"])
def test_hidden_states_are_those_of_the_stock_model(family: str, chats: Path, tmp_path: Path) -> None:
    model = sight.can_see(getattr(tiny, family)(tmp_path / "model"))
    tokens = tokens_of(model, chats)
    ids = torch.from_numpy(tokens.ids)
    expected = stock_states(model, tokens)
    with Reader(model) as reader:
        stream = Stream(reader, family_of(reader.header), dtype=torch.float32)
        positions = token_positions(stream, ids, tokens.images)
        assert positions is not None and positions.shape == (3, *ids.shape)
        hidden = stream.embed(ids)
        blind = hidden.clone()
        show(stream, hidden, ids, tokens.images, Silent())
        assert all(value.is_meta for value in stream.model.get_submodule("model.visual").parameters())
        for index in range(stream.layers):
            torch.testing.assert_close(hidden, expected[index], rtol=1e-4, atol=1e-4)
            with stream.layer(index) as layer:
                stream.advance(layer, hidden, positions=positions)
                stream.advance(layer, blind)
        torch.testing.assert_close(hidden, expected[-1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(blind, expected[-1], rtol=0.1, atol=0.1)


def stock_states(model: Path, tokens: Tokens) -> list[torch.Tensor]:
    """Inputs of every layer, and the output of the last, of the stock model with pixel values and grids."""
    whole = load(model)
    seen: list[torch.Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values())[0])

    layers = whole.get_submodule("model.language_model.layers")
    for layer in layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        whole(**sight.stock_inputs(model, tokens), use_cache=False)
    return seen


def test_gradients_are_autograd_of_the_stock_model_that_sees(chats: Path, tmp_path: Path) -> None:
    """The loss of what is said: image tokens and padding are seen, and not predicted."""
    model = sight.can_see(tiny.glm4v(tmp_path / "model"))
    tokens = tokens_of(model, chats)
    ids, seen = torch.from_numpy(tokens.ids), sight_of(tokens)
    assert seen.counted is not None and not seen.counted.all()
    single = [replace(tokens, ids=tokens.ids[i : i + 1], images=tokens.images[i : i + 1]) for i in range(len(ids))]
    given = [{k: v for k, v in sight.stock_inputs(model, one).items() if k != "input_ids"} for one in single]
    expected, _ = brute.gradients(model, ids, given, seen.counted)
    with Reader(model) as reader:
        family = family_of(reader.header)
        groups = [family.groups(sizes, reader.header.text_config) for sizes in family.layers(reader.header)]
        stream = Stream(reader, family, dtype=torch.float32)
        found = gradients(stream, ids, groups, GRADIENTS, sight=seen)
    for layer, wanted in zip(found, expected, strict=True):
        for group, kinds in wanted.items():
            for kind, value in kinds.items():
                torch.testing.assert_close(layer[group][kind], value, rtol=1e-3, atol=1e-4 * float(value.mean()))


def test_every_window_is_whole_documents_and_padding(chats: Path, tmp_path: Path) -> None:
    model = sight.can_see(tiny.glm4v(tmp_path / "model"))
    tokens = tokens_of(model, chats, kinds=True)
    assert tokens.kinds is not None
    processor, image = processor_of(model), TOKEN_KINDS.index("image")
    np.testing.assert_array_equal(tokens.kinds == image, tokens.ids == tiny.IMAGE_TOKEN)
    for row, kinds, window in zip(tokens.ids, tokens.kinds, tokens.images, strict=True):
        sizes = [processor.tokens(processor.grid_of(each)) for each in window]
        assert (kinds == image).sum() == sum(sizes)
        padding = np.flatnonzero(kinds == 0)
        assert not len(padding) or (padding[0] + len(padding) == len(row) and (row[padding] == 257).all())
        begins, ends = (np.flatnonzero(row == mark) for mark in (301, 302))
        assert [int(n) for n in ends - begins - 1] == sizes
    assert tokens.record["kinds"].keys() == {"padding", "image", "prompt", "answer"}


def test_what_divides_two_conversations_is_no_answer(chats: Path, tmp_path: Path) -> None:
    model = sight.can_see(tiny.glm4v(tmp_path / "model"))
    spec = DataSpec(source=str(chats), samples=2, length=256)
    tokens = windows(spec, "calibration", model, 0, images=True, kinds=True)
    assert tokens.kinds is not None
    told = [[TOKEN_KINDS[kind] for kind in kinds] for kinds in tokens.kinds]
    twice = [  # the mark of an answer's end, and what divides two conversations
        kinds[at : at + 2]
        for row, kinds in zip(tokens.ids.tolist(), told, strict=True)
        for at in range(len(row) - 1)
        if row[at : at + 2] == [257, 257] and kinds[at + 1] != "padding"
    ]
    assert twice and all(kinds == ["answer", "prompt"] for kinds in twice)


def test_grids_are_those_of_the_stock_processor(tmp_path: Path) -> None:
    """The plan counts without transformers; so its numbers must be the processor's."""
    from transformers import Glm4vImageProcessorPil

    for sizes in ({"shortest_edge": 12544, "longest_edge": 47040000}, {"shortest_edge": 6000, "longest_edge": 20000}):
        model = sight.can_see(tiny.glm4v(tmp_path / f"{sizes['longest_edge']}"))
        stock = Glm4vImageProcessorPil(size=sizes)
        stock.save_pretrained(model)
        processor = processor_of(model)
        draw = np.random.default_rng(0)
        for width, height in draw.integers(1, 3000, (200, 2)).tolist():
            if max(width, height) / min(width, height) < 50:
                assert np.prod(processor.grid(width, height)) == stock.get_number_of_image_patches(height, width)


def test_families_that_see_are_those_whose_processor_is_known() -> None:
    assert {family.model_type for family in FAMILIES.values() if family.vision} == PROCESSORS.keys()
