"""From a source's name to its documents, and what can be refused without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.data.builtin import builtin_parts
from compress.data.chat import Chat, Document, has_template, no_template
from compress.data.files import READERS, files, of_path
from compress.data.images import Picture, processor_of
from compress.data.spec import BUILTIN, HUB, SELF, DataSpec, Part, counts, sources
from compress.errors import UserError
from compress.machine import Progress, Silent

BYTES_A_TOKEN = 3  # of prose, for estimates: common tokenizers take four and more
# of a hub dataset that much text is read for `samples` windows; a split that is smaller is read whole
HUB_BYTES, HUB_BYTES_A_TOKEN = 16 * 2**20, 16


@dataclass(frozen=True)
class Read:
    """The documents of a source. `revision`: of a hub dataset; `whole`: False when only its beginning was read."""

    documents: Sequence[Document]
    revision: str | None = None
    whole: bool = True


def read(source: str, part: Part, limit: int | None = None, progress: Progress | None = None) -> Read:
    """The documents of a source that is text: a topic of `part`, a file, a line, or a row each.

    `limit`: bytes after which a hub dataset is read no further. Raises UserError and, for a hub dataset, MachineError.
    """
    if source == BUILTIN:
        return Read(builtin_parts()[part])
    if source.startswith(HUB):
        from compress.data.hub import of_hub

        found = of_hub(source, limit, progress or Silent())
        return Read(found.documents, found.commit, found.whole)
    return Read(of_path(source))


def commits(spec: DataSpec) -> dict[str, str | None]:
    """The commit of every hub dataset that `spec` names, without its data; None where offline the cache does not tell.

    Raises UserError, and MachineError for the network. A process asks once for each: all its reading is of that commit.
    """
    from compress.data.hub import commit_of

    return {source: commit_of(source) for source in sources(spec) if source.startswith(HUB)}


def hub_limit(count: int | None, length: int) -> int | None:
    """Bytes of a hub dataset's text that are read for `count` windows."""
    return None if count is None else max(HUB_BYTES, HUB_BYTES_A_TOKEN * count * length)


def check(
    spec: DataSpec,
    part: Part,
    folder: Path | None = None,
    progress: Progress | None = None,
    *,
    images: bool = False,
) -> None:
    """Refuse, without a tokenizer, what cannot give the windows asked for.

    `folder`, where it is known, is the tokenizer's: chats need its template. `images`: whether chats may hold some,
    which are opened then, and counted. Raises one UserError about every source
    that is unknown, missing, empty or broken, or so short that no tokenizer makes enough tokens of it (none makes more
    than one token of a byte); for `self` one that asks for an evaluation or gives no number of samples. MachineError:
    a hub dataset that cannot be reached.
    """
    problems: list[UserError] = []
    for source, count in counts(spec).items():
        try:
            _check(source, count, spec.length, part, folder, progress, images)
        except UserError as problem:
            problems.append(problem)
    if problems:
        hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
        raise UserError("; ".join(problem.message for problem in problems), hint="; ".join(hints) or None)


def _check(
    source: str,
    count: int | None,
    length: int,
    part: Part,
    folder: Path | None,
    progress: Progress | None,
    images: bool,
) -> None:
    if source == SELF:
        check_self(count, part)
        return
    need = length * (count or 1)
    found = read(source, part, None if count is None else need, progress)
    chats = [document for document in found.documents if isinstance(document, Chat)]
    if chats and folder is not None and not has_template(folder):
        raise no_template(folder, chats[0].where)
    shown = [document for document in chats if document.images]
    if shown and not images:
        raise no_images(shown[0])
    if shown:
        _check_images(source, found.documents, shown, count, length, folder)
        return
    most = most_tokens_of(found.documents)
    if most < need:
        raise UserError(
            f"{source}: at most {most} tokens of {part} text, needed {need} ({count or 1} x {length})",
            hint="use a longer text, fewer samples or a shorter length",
        )


def no_images(found: Chat) -> UserError:
    """What is said where a chat with images meets what takes text alone."""
    said = "images are for the calibration of prune and sensitivity, all else takes text"
    return UserError(f"{found.images[0].where}: an image; {said}")


def _check_images(
    source: str,
    documents: Sequence[Document],
    shown: Sequence[Chat],
    count: int | None,
    length: int,
    folder: Path | None,
) -> None:
    """Open every image, count its tokens, and refuse what can fill no window. A window is of whole documents."""
    if count is None:
        raise UserError(f"{source}: holds images, and needs samples, the number of windows")
    if len(documents) < count:
        raise UserError(
            f"{source}: {len(documents)} documents fill at most as many windows, needed {count}: a window is of whole "
            "documents where there are images",
            hint="fewer samples, or more conversations",
        )
    if folder is None:
        return
    processor = processor_of(folder)
    for found in shown:
        tokens = sum(processor.tokens(processor.grid_of(image)) for image in found.images)
        if tokens > length:
            raise UserError(
                f"{found.where}: its images are {tokens} tokens, and a window is {length}", "a larger length"
            )


def pictures_of(spec: DataSpec) -> list[Picture]:
    """All images that the local files of a source name: .jsonl files alone can."""
    found: list[Picture] = []
    for source in sources(spec):
        path = Path(source)
        for file in files(path) if path.is_dir() or path.is_file() else []:
            if file.suffix == ".jsonl":
                found += (image for d in READERS[file.suffix](file) if isinstance(d, Chat) for image in d.images)
    return found


def check_self(count: int | None, part: Part) -> int:
    """How many windows `self` is to give; UserError where it would judge itself, or where no number is given."""
    if part == "evaluation":
        raise UserError(
            f"{SELF}: text that a model samples itself says nothing about its quality; evaluation needs other text"
        )
    if count is None:
        raise UserError(f"{SELF}: needs samples, the number of windows to sample")
    return count


def most_tokens(spec: DataSpec, part: Part) -> int:
    """The most tokens that any tokenizer makes of a source: one of a byte, and one between documents."""
    total = 0
    for source, count in counts(spec).items():
        limit = hub_limit(count, spec.length)
        total += (count or 0) * spec.length if source == SELF else most_tokens_of(read(source, part, limit).documents)
    return total


def expected_tokens(spec: DataSpec, part: Part) -> int:
    """Tokens of the windows asked for; of a whole source an estimate, for prose."""
    return most_tokens(spec, part) // BYTES_A_TOKEN if spec.samples is None else spec.samples * spec.length


def most_tokens_of(documents: Sequence[Document]) -> int:
    """As `most_tokens`, of documents; what a chat template adds is bounded generously, not exactly."""
    return len(documents) + sum(len(d.encode()) if isinstance(d, str) else d.nbytes for d in documents)


def documents(spec: DataSpec, part: Part) -> list[str]:
    """The texts of all sources, in the order of their names; UserError for chats, which need a model's template."""
    found: list[str] = []
    for source, count in counts(spec).items():
        if source == SELF:
            raise UserError(f"{SELF}: sampled as tokens; there is no text of it")
        for document in read(source, part, hub_limit(count, spec.length)).documents:
            if isinstance(document, Chat):
                raise UserError(f"{document.where}: 'messages' are text only with a model's chat template")
            found.append(document)
    return found
