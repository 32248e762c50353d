"""Images of chats: where they lie, how many tokens the model's image processor makes of one, and their pixels.

A plan opens headers only and needs neither torch nor transformers; pixels go through the stock processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import read_json
from compress.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# model_type -> the stock processor that needs no torchvision
PROCESSORS = {"glm4v": "Glm4vImageProcessorPil", "glm46v": "Glm46VImageProcessorPil"}
CONFIG = "preprocessor_config.json"
STRETCH = 200  # the longest shape, width to height, that these processors take
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
Grid = tuple[int, int, int]  # patches in time, height, width


@dataclass(frozen=True)
class Picture:
    """An image that a chat names: its file, and the message that names it."""

    path: Path
    where: str


def picture(found: Any, folder: Path | None, where: str) -> Picture:
    """The image that the part `found` of a message names, as a file in `folder` or below it: paths in files are never
    trusted. UserError for anything else; `folder` is None where images cannot lie beside the data."""
    if folder is None:
        raise UserError(f"{where}: an image, but images are read only beside a .jsonl file")
    name = found.get("image")
    if found.get("type") != "image" or not isinstance(name, str) or not name:
        raise UserError(f"{where}: an image must be {{type: image, image: its path}}, found {found!r:.80}")
    inside = folder.resolve()
    path = (inside / name).resolve() if name.isprintable() else inside
    if "://" in name or name.startswith("data:") or Path(name).is_absolute() or not path.is_relative_to(inside):
        raise UserError(f"{where}: image {name!r:.80} must be a path inside {folder}")
    if not path.is_file():
        raise UserError(f"{where}: no such image, {folder / name}")
    return Picture(path, where)


@dataclass(frozen=True)
class Processor:
    """What a checkpoint says of how it cuts images into patches; the defaults are those of its stock class."""

    folder: Path
    kind: str
    patch: int
    merge: int
    temporal: int
    least: int
    most: int

    def grid(self, width: int, height: int) -> Grid:
        """The patches of an image of these pixels: as `smart_resize` and `patchify` of the stock class. UserError for
        an image that is too long."""
        factor = self.patch * self.merge
        if min(width, height) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > STRETCH:
            raise UserError(f"{width} x {height} pixels, and {STRETCH} times as long as wide is the most")
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        frames = self.temporal
        if frames * rows * columns > self.most:
            shrink = math.sqrt(frames * height * width / self.most)
            rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        elif frames * rows * columns < self.least:
            grow = math.sqrt(self.least / (frames * height * width))
            rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return 1, rows // self.patch, columns // self.patch

    def grid_of(self, image: Picture) -> Grid:
        """The patches of an image, from its header."""
        size = _size(image)
        try:
            return self.grid(*size)
        except UserError as error:
            raise UserError(f"{image.where}: {image.path.name}: {error.message}", error.hint) from None

    def tokens(self, grid: Grid) -> int:
        """How many tokens stand for an image."""
        return math.prod(grid) // self.merge**2

    def pixels(self, images: Sequence[Picture]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Patches [sum of patches, channels * temporal * patch * patch] and grids [images, 3], by the stock class."""
        import transformers
        from transformers.image_utils import load_image

        with self._refused():
            made: Any = getattr(transformers, self.kind).from_pretrained(self.folder)
        read = []
        for image in images:
            with _opened(image) as found:
                read.append(load_image(found))
        with self._refused():
            out = made(images=read, return_tensors="np")
            return out["pixel_values"], out["image_grid_thw"]

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a stock class makes of keys that it does not check
            said = " ".join(str(error).split())[:160]
            raise UserError(f"{self.folder / CONFIG}: the stock processor fails with it: {said}") from error


def processor_of(folder: Path) -> Processor:
    """How the checkpoint in `folder` takes images. UserError where it takes none, or where that was not shown."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in PROCESSORS:
        raise UserError(f"{folder}: a {kind} calibrates on text alone; images are shown to {', '.join(PROCESSORS)}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}, which says how images are cut into patches")
    found = read_json(folder / CONFIG)
    size = found.get("size")
    size = size if isinstance(size, Mapping) else {}
    if found.get("do_resize", True) is not True:
        raise UserError(f"{folder / CONFIG}: do_resize must be true: images of other sizes make no whole patches")
    return Processor(
        folder,
        PROCESSORS[kind],
        _whole(found, "patch_size", 14),
        _whole(found, "merge_size", 2),
        _whole(found, "temporal_patch_size", 2),
        _whole(size, "shortest_edge", 112 * 112),
        _whole(size, "longest_edge", 28 * 28 * 15000),
    )


def _whole(found: Mapping[str, Any], key: str, default: int) -> int:
    value = found.get(key, default)
    if type(value) is not int or value <= 0:
        raise UserError(f"{CONFIG}: {key} must be a whole number above 0, found {value!r}")
    return value


def _size(image: Picture) -> tuple[int, int]:
    """Width and height, as the image is to be seen."""
    with _opened(image) as found:
        width, height = found.size
        turned = found.getexif().get(0x0112) in TURNED
    return (height, width) if turned else (width, height)


@contextmanager
def _opened(image: Picture) -> Iterator[Any]:
    """The image, as pillow reads it; while open, what it cannot read of it is a UserError."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need pillow", hint="pip install 'autoglm-compress[images]'") from None
    try:
        with Image.open(image.path) as found:
            yield found
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{image.where}: {image.path.name} is no image that can be read ({error!s:.100})") from None
