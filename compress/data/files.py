"""Documents of local files: .txt (one document), .jsonl (one a line), .parquet (one a row), folders of these.

Every mistake is one line that names the file and the line. Torch-free; pyarrow is imported for .parquet alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.data.chat import Document, chat, encoded
from compress.data.spec import BUILTIN, KINDS, SELF, SUFFIXES
from compress.errors import UserError, nearest

ROWS = 100  # rows of a table that are read at a time; one may be a book


def of_path(source: str) -> list[Document]:
    """The documents of a file or a folder. UserError: what it is not, missing, unreadable, broken, or without text."""
    path = Path(source)
    folder = path.is_dir()
    if not folder and path.suffix not in READERS:
        missing = "" if path.exists() else "no such folder; "
        name, equals, share = source.rpartition("=")
        if missing and equals and Path(name).exists():
            raise UserError(f"data source '{source}': the share of {name} is '{share}', allowed: a number above 0")
        near = nearest(source, [BUILTIN, SELF])
        raise UserError(
            f"data source '{source}': {missing}expected {KINDS}" + (f"; did you mean '{near}'?" if near else "")
        )
    documents: list[Document] = []
    for file in files(path):
        documents += READERS[file.suffix](file)
    if not any(has_text(document) for document in documents):
        raise UserError(f"{path}: empty, no text found")
    # an empty file among others is no document; one file alone is taken as it stands
    return [document for document in documents if has_text(document)] if folder else documents


def files(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or what a folder holds, by name; hidden files are left out."""
    if not path.is_dir():
        return [path]
    inside = ((file.relative_to(path), file) for file in path.rglob("*") if file.suffix in READERS and file.is_file())
    shown = {name.as_posix(): file for name, file in inside if not any(part.startswith(".") for part in name.parts)}
    if not shown:
        raise UserError(f"{path}: no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file in this folder")
    return [shown[name] for name in sorted(shown)]


def has_text(document: Document) -> bool:
    """Whether there is more in a document than white space; a chat always has roles."""
    return not isinstance(document, str) or bool(document.strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None


def _plain(path: Path) -> list[Document]:
    return [_text(path)]


def _json_lines(path: Path) -> list[Document]:
    documents: list[Document] = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would split at U+2028 inside a string
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        documents.append(_entry(value, where, path.parent))
    return documents


def _entry(value: Any, where: str, folder: Path) -> Document:
    if isinstance(value, Mapping):
        text = value.get("text")
        if isinstance(text, str):
            return encoded(text, "'text'", where)
        if "messages" in value:
            return chat(value["messages"], where, folder)
        found = f"keys {', '.join(map(repr, value)) or 'none'}"
        found = f"'text': {type(text).__name__}" if "text" in value else found
    else:
        found = type(value).__name__
    raise UserError(f"{where}: expected an object with a string field 'text' or a list 'messages', found {found}")


def _parquet(path: Path) -> list[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            kinds = {field.name: field.type for field in table.schema_arrow}
            strings = [name for name, kind in kinds.items() if _is_text(kind)]
            column = text_column(list(kinds), strings, str(path))
            batches = table.iter_batches(batch_size=ROWS, columns=[column])
            values = (value.as_py() for batch in batches for value in batch.column(0))
            return list(rows(values, column, str(path)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except pyarrow.ArrowException as error:  # before OSError: some of them are both
        raise UserError(f"{path}: not a readable .parquet file ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def text_column(names: Sequence[str], strings: Sequence[str], where: str) -> str:
    """The column of a table that is read: `text`, else `messages`, else the only one of strings."""
    if "text" in strings:
        return "text"
    if "messages" in names:
        return "messages"
    if len(strings) == 1:
        return strings[0]
    count = f"{len(strings)} columns of strings" if strings else "no column of strings"
    raise UserError(
        f"{where}: no column 'text' of strings, no 'messages', and {count}; columns: {', '.join(names) or 'none'}"
    )


def rows(values: Iterator[Any], column: str, where: str) -> Iterator[Document]:
    """The documents in a column's values; rows that are null or blank are left out."""
    for number, value in enumerate(values, 1):
        if value is None:
            continue
        if column == "messages":
            yield chat(value, f"{where}, row {number}")
        elif not isinstance(value, str):
            raise UserError(f"{where}, row {number}: column '{column}' holds {type(value).__name__}, not text")
        elif value.strip():
            yield encoded(value, f"column '{column}'", f"{where}, row {number}")


READERS: dict[str, Callable[[Path], list[Document]]] = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
