"""Documents of a dataset on the Hugging Face hub: `hub:NAME[@REVISION][/CONFIG]:SPLIT`, through `datasets`.

The revision is pinned to its commit first, once a process; the rows then come in their order, from the beginning. A
small dataset is fetched whole and kept in the cache of `datasets`, a large one is streamed: the text is the same. No
code of a dataset is run, and nothing is asked of the network but for a hub: source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress.checkpoint.hub import NETWORK, told_in_one_line
from compress.data.chat import Document
from compress.data.files import ROWS, rows, text_column
from compress.data.quiet import quiet
from compress.errors import UserError
from compress.machine import Progress

WHOLE = 2**30  # bytes: files of a dataset up to which it is fetched, and text up to which it is read whole
END = object()  # what no row is
_NAME = re.compile(
    r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<config>[^/:@]+))?:(?P<split>\w+(?:\.\w+)*)"
)


@dataclass(frozen=True)
class HubText:
    """`documents` of a split at a `commit`; `whole`: no row is left."""

    documents: list[Document]
    commit: str
    whole: bool


@dataclass(frozen=True)
class _Dataset:
    """What a hub: source names. `choices`: repository and config; `a/b` is a repository, else config `b` of `a`."""

    source: str
    choices: tuple[tuple[str, str | None], ...]
    revision: str | None
    split: str


def parse(source: str) -> _Dataset:
    """The dataset of a hub: source; UserError for any other form."""
    found = _NAME.fullmatch(source)
    if found is None:
        raise UserError(
            f"data source '{source}': expected hub:NAME[@REVISION][/CONFIG]:SPLIT, as in hub:org/name:train",
            hint="SPLIT is one split, whole; samples says how much of it is taken" if "[" in source else None,
        )
    name, config = found["name"], found["config"]
    choices: list[tuple[str, str | None]] = [(name, config)]
    if config is None and found["revision"] is None and "/" in name:
        first, second = name.split("/")
        choices.append((first, second))
    return _Dataset(source, tuple(choices), found["revision"], found["split"])


def of_hub(source: str, limit: int | None, progress: Progress) -> HubText:
    """The first documents of a split that hold `limit` bytes together; None: all of them.

    Raises UserError: no such dataset, revision, config, split or text column, gated, not in the cache while offline,
    or more than 1 GiB of text without a limit. MachineError: the network or the disk is in the way.
    """
    dataset = parse(source)
    import datasets  # heavy: only for a hub: source
    import huggingface_hub.utils.logging

    with (
        quiet(datasets.utils.logging, huggingface_hub.utils.logging),
        told_in_one_line(source, dataset.revision, "dataset"),
    ):
        name, config, commit = _pinned(dataset)
        with _refused_in_one_line(source):
            table = _table(dataset, name, config, commit, progress)
            return _read(source, table, commit, limit, progress)


def commit_of(source: str) -> str | None:
    """The commit at which this process reads a hub: source; two small files are fetched, none of its data.

    None where HF_HUB_OFFLINE is set and the cache does not tell. Raises otherwise as `of_hub` does for a dataset or a
    revision that is not there, and for the network.
    """
    import huggingface_hub.utils.logging

    dataset = parse(source)
    try:
        with quiet(huggingface_hub.utils.logging), told_in_one_line(source, dataset.revision, "dataset"):
            return _pinned(dataset)[2]
    except UserError:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return None
        raise


@cache  # a plan, a key and the steps of one run mean the same text, whatever is pushed while they work
def _pinned(dataset: _Dataset) -> tuple[str, str | None, str]:
    """Repository, config and commit of the first choice that there is; the error of the first one if there is none."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    problem: Exception | None = None
    for name, config in dataset.choices:
        try:
            if "/" not in name and not huggingface_hub.constants.HF_HUB_OFFLINE:
                # a name without its owner is one of the hub's first datasets, which have moved: the hub knows where
                name = huggingface_hub.HfApi().dataset_info(name, revision=dataset.revision).id
            # two small files: asking for them tells the commit, and leaves it in the cache for a run without network
            folder = huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=dataset.revision, allow_patterns=["README.md", ".gitattributes"]
            )
        except RepositoryNotFoundError as error:
            problem = problem or error
        else:
            return name, config, Path(folder).name
    assert problem is not None
    raise problem


def _table(dataset: _Dataset, name: str, config: str | None, commit: str, progress: Progress) -> Any:
    """The split as `datasets` has it: prepared in its cache, or streamed."""
    import datasets

    if os.path.exists(name):  # `datasets` would read it instead
        raise UserError(f"{dataset.source}: '{name}' stands in the current directory and hides the hub's dataset")
    builder = datasets.load_dataset_builder(name, config, revision=commit)
    if builder.hash != commit:  # offline, whatever revision was prepared last
        raise UserError(
            f"{dataset.source}: the cache of datasets holds commit {str(builder.hash)[:12]}, not {commit[:12]}; "
            "HF_HUB_OFFLINE forbids to fetch it"
        )
    size = _bytes(builder, name, commit)
    if size > WHOLE:
        return builder.as_streaming_dataset(split=dataset.split)
    if not os.path.isdir(builder.cache_dir):
        progress.note(f"{dataset.source}: fetching {size / 1e6:.1f} MB")
    builder.download_and_prepare()
    return builder.as_dataset(split=dataset.split)


def _bytes(builder: Any, name: str, commit: str) -> int:
    """Bytes of the files that preparing the dataset would fetch; 0 when it is prepared already."""
    import huggingface_hub

    if os.path.isdir(builder.cache_dir):
        return 0
    listed = builder.config.data_files or {}
    wanted = {str(file).split(f"@{commit}/", 1)[-1] for files in listed.values() for file in files}
    info = huggingface_hub.HfApi().dataset_info(name, revision=commit, files_metadata=True)
    return sum(file.size or 0 for file in info.siblings or () if file.rfilename in wanted)


def _read(source: str, table: Any, commit: str, limit: int | None, progress: Progress) -> HubText:
    column = _column(table, source)
    # that column alone: images and sounds beside it would be fetched and decoded
    values = (value for batch in table.select_columns([column]).iter(batch_size=ROWS) for value in batch[column])
    documents: list[Document] = []
    read, known = 0, (table.info.splits or {}).get(str(table.split))
    total = min(limit or WHOLE, known.num_bytes if known and known.num_bytes else WHOLE)
    with progress.task(f"reading {source} (KiB)", total=-(-total // 1024)) as task:
        for document in rows(values, column, source):
            documents.append(document)
            size = len(document.encode()) if isinstance(document, str) else document.nbytes
            task.advance((read + size) // 1024 - read // 1024)
            read += size
            if limit is not None and read >= limit:
                return HubText(documents, commit, next(values, END) is END)
            if read > WHOLE:
                raise UserError(f"{source}: more than 1 GiB of text", hint="give samples, the number of windows")
    if not documents:
        raise UserError(f"{source}: empty, no text found")
    return HubText(documents, commit, True)


def _column(table: Any, source: str) -> str:
    """The column that is read, by the table's types, or by the first row of a stream that does not know its types."""
    if table.features is not None:
        kinds = {name: getattr(kind, "dtype", None) for name, kind in table.features.items()}
        strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
        return text_column(list(kinds), strings, source)
    first = next(iter(table), None)
    if first is None:
        raise UserError(f"{source}: empty, no rows found")
    return text_column(list(first), [name for name, value in first.items() if isinstance(value, str)], source)


@contextmanager
def _refused_in_one_line(source: str) -> Iterator[None]:
    """What `datasets` says against a dataset, a config or a split, as one line; what the network says passes on."""
    import datasets.config
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        yield
    except DatasetGenerationError as error:  # wraps whatever happened while files were fetched and read
        cause = error.__cause__ or error
        if isinstance(cause, OSError) or type(cause).__module__.split(".")[0] in NETWORK:
            raise cause from None
        raise UserError(f"{source}: {_line(cause)}") from None
    except ConnectionError:
        if not datasets.config.HF_HUB_OFFLINE:
            raise
        raise UserError(f"{source}: not in the cache of datasets; HF_HUB_OFFLINE forbids to fetch it") from None
    except (DatasetsError, ValueError, NotImplementedError) as error:
        raise UserError(f"{source}: {_line(error)}") from None
    except RuntimeError as error:  # the one that speaks of the dataset: one that only code of its own can load
        if not str(error).startswith("Dataset scripts"):
            raise
        raise UserError(f"{source}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """The words of an error on one line; `datasets` adds an example of Python code, which helps nobody here."""
    words = " ".join(str(error).split("Example of usage", 1)[0].split())
    return words if len(words) <= 300 else words[:297] + "..."
