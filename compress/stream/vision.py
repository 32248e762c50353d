"""Images among the tokens: the stock vision tower's features in the place of their embeddings, and where tokens stand.

The tower is filled once, sees the images window by window, and is emptied before the first decoder layer is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.data import IMAGE, PADDING, Picture, Processor, Tokens, processor_of
from compress.errors import UserError
from compress.machine import Progress, return_freed_memory
from compress.stream.calls import empty, fill_buffers
from compress.stream.forward import Stream, assign

Images = Sequence[Sequence[Picture]]  # of each window, in the order of their tokens


@dataclass(frozen=True)
class Sight:
    """What is to be known of windows whose tokens are not all text: their images; `counted` [N, L], the tokens whose
    prediction is part of a loss (neither an image's nor padding), None: all of them; `weights` [N, L] float32, 0 for
    padding and else 1, None: 1 each."""

    images: Images = ()
    counted: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def first(self, windows: int) -> Sight:
        """Of the first windows alone."""
        parts = (None if each is None else each[:windows] for each in (self.counted, self.weights))
        return Sight(self.images[:windows], *parts)


def sight_of(tokens: Tokens) -> Sight:
    """What calibration tokens say of themselves."""
    if tokens.kinds is None or not tokens.images:
        return Sight()
    real = torch.from_numpy(tokens.kinds != PADDING)
    return Sight(tokens.images, real & torch.from_numpy(tokens.kinds != IMAGE), real.float())


def token_positions(stream: Stream, ids: torch.Tensor, images: Images) -> torch.Tensor | None:
    """Where the tokens of the windows `ids` [N, L] stand in time, height and width, [3, N, L]: as the stock model's own
    get_rope_index says. None where no window has images: the stock model then knows."""
    if not any(images):
        return None
    processor = processor_of(stream.reader.folder)
    grids = torch.tensor([processor.grid_of(image) for window in images for image in window])
    outer: Any = _outer(stream)
    found: torch.Tensor = outer.get_rope_index(ids, _marks(stream, ids).long(), image_grid_thw=grids)[0]
    return found


@torch.no_grad()
def show(stream: Stream, hidden: torch.Tensor, ids: torch.Tensor, images: Images, progress: Progress) -> None:
    """Put what the vision tower makes of the images into the embeddings `hidden` [N, L, hidden] of `ids`, in place.

    Raises UserError for an image that can no longer be read, and for weights of the tower as `assign`.
    """
    if not any(images):
        return
    processor, places = processor_of(stream.reader.folder), _marks(stream, ids)
    runs = [_runs(places[row], window, processor) for row, window in enumerate(images)]
    with filled(stream):
        for (row, index), features in looked_at(stream, images, progress):
            hidden[row, runs[row][index]] = features.to(hidden.device, hidden.dtype)


def looked_at(
    stream: Stream, images: Images, progress: Progress, label: str = "images through the vision tower"
) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
    """Every image in its turn: its window and its place among that window's, and what the tower, `filled`, makes of it
    [tokens, hidden]."""
    outer: Any = _outer(stream)
    processor = processor_of(stream.reader.folder)
    with progress.task(label, sum(map(len, images))) as task:
        for row, window in enumerate(images):
            for index, part in enumerate(window):
                pixels, grids = processor.pixels([part])
                if tuple(grids[0]) != processor.grid_of(part):
                    raise AssertionError(f"{part.path}: planned as {processor.grid_of(part)}, cut into {grids[0]}")
                seen = torch.from_numpy(pixels).to(stream.device, stream.dtype)
                features = outer.get_image_features(seen, image_grid_thw=torch.from_numpy(grids).to(stream.device))
                yield (row, index), torch.cat(tuple(features.pooler_output))
                task.advance()


@contextmanager
def filled(stream: Stream) -> Iterator[nn.Module]:
    """The vision tower with its weights; emptied again on exit."""
    tower = _filled(stream)
    try:
        yield tower
    finally:
        empty(tower)
        return_freed_memory()


def _runs(marks: torch.Tensor, window: Sequence[Picture], processor: Processor) -> list[torch.Tensor]:
    """The indices of each image's tokens in one window, from marks [L]."""
    sizes = [processor.tokens(processor.grid_of(image)) for image in window]
    found = marks.nonzero().flatten()
    if len(found) != sum(sizes):
        raise UserError(f"{window[0].where if window else 'a window'}: {len(found)} image tokens, not {sum(sizes)}")
    return list(found.split(sizes))


def _marks(stream: Stream, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens [N, L] stand for images."""
    config: Any = stream.model.config
    marks: torch.Tensor = ids == config.image_token_id
    return marks


def _outer(stream: Stream) -> nn.Module:
    """The stock module that holds vision tower and decoder."""
    return stream.model.get_submodule(stream.family.text.rpartition(".")[0])


def _filled(stream: Stream) -> nn.Module:
    """The vision tower with its weights."""
    path = stream.family.vision
    assert path is not None  # planned
    tower, made = stream.model.get_submodule(path), stream.model
    for name, module in tower.named_modules():
        fill_buffers(module, made._init_weights, stream.device)  # type: ignore[arg-type]
        for key, _ in list(module.named_parameters(recurse=False)):
            full = ".".join(part for part in (path, name, key) if part)
            assign(module, key, stream.reader.tensor(full, stream.dtype))
    return tower
