"""Folders, .parquet and chats: the same documents whatever file they stand in, and one line for every broken one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from compress.data import DataSpec, check, documents, windows
from compress.errors import UserError
from tests import tiny

TEXTS = ["first document of some length", "second document", "third, with a \u2028 in it"]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Open the settings."}, {"role": "assistant", "content": "do(action='Launch')"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template."""
    return tiny.llama(tmp_path_factory.mktemp("data") / "pico")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one."""
    made = tiny.llama(tmp_path_factory.mktemp("data") / "talker")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def json_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def table(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def spec(path: Path, **more: Any) -> DataSpec:
    return DataSpec(source=str(path), **{"length": 8, **more})


def refusal(source: Path | str, folder: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check(DataSpec(source=str(source), length=8), "training", folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_parquet_and_jsonl_and_a_folder_of_both_give_the_same_windows(folder: Path, tmp_path: Path) -> None:
    lines = json_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    rows = table(tmp_path / "a.parquet", id=[1, 2, 3], text=TEXTS)
    split = tmp_path / "folder"
    (split / "2").mkdir(parents=True)
    (split / "1.txt").write_text(TEXTS[0], encoding="utf-8")
    table(split / "2" / "a.parquet", text=pyarrow.array(TEXTS[1:2], pyarrow.large_string()))
    json_lines(split / "3.jsonl", [{"text": TEXTS[2]}])
    for other in ("notes.md", ".hidden.txt", ".git/x.txt"):
        (split / other).parent.mkdir(exist_ok=True)
        (split / other).write_text("not to be read")
    (split / "empty.txt").write_text(" \n")
    expected = windows(spec(lines), "evaluation", folder, 0)
    for path in (rows, split):
        found = windows(spec(path), "evaluation", folder, 0)
        assert documents(spec(path), "evaluation") == TEXTS
        np.testing.assert_array_equal(found.ids, expected.ids)
        assert found.digest == expected.digest


def test_the_files_of_a_folder_come_by_name(tmp_path: Path) -> None:
    names = ["b/1.txt", "b.txt", "a/z/9.txt", "a/10.txt", "a/9.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(spec(tmp_path), "training") == sorted(names)


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"text": ["a", None, " ", "b"], "title": ["x"] * 4}, ["a", "b"]),
        ({"body": ["a", "b"], "id": [1, 2]}, ["a", "b"]),
        ({"text": ["a"], "messages": [CHATS[0]]}, ["a"]),
    ],
    ids=["text", "only column of strings", "text before messages"],
)
def test_the_text_column_of_a_table(columns: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    assert documents(spec(table(tmp_path / "a.parquet", **columns)), "training") == texts


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"question": ["a"], "answer": ["b"], "id": [1]},
            "no column 'text' of strings, no 'messages', and 2 columns of strings; columns: question, answer, id",
        ),
        ({"text": [1, 2]}, "and no column of strings; columns: text"),
        ({"text": [None, ""]}, "empty, no text found"),
        ({"messages": [[{"role": "user"}]]}, "row 1, message 1: no 'content', found keys 'role'"),
        ({"messages": [CHATS[0], []]}, "row 2: 'messages' must be a list of {role, content}, found an empty list"),
    ],
    ids=["two", "numbers", "empty", "no content", "no messages"],
)
def test_a_table_without_text_names_its_columns(columns: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", **columns)
    message = refusal(path)
    assert message.startswith(str(path)) and said in message


def broken_table(path: Path) -> None:
    table(path / "a.parquet", text=["some text"] * 1000)
    (path / "a.parquet").write_bytes((path / "a.parquet").read_bytes()[:-9])


FOLDERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "empty folder": (lambda path: (path / "deep").mkdir(), "", "no .txt, .jsonl or .parquet file in this folder"),
    "empty files": (lambda path: (path / "a.txt").write_text(""), "", "empty, no text found"),
    "broken table": (broken_table, "a.parquet", "not a readable .parquet file ("),
    "no table": (lambda path: (path / "a.parquet").write_text("text"), "a.parquet", "not a readable .parquet file ("),
    "gone": (lambda path: None, "a.parquet", "no such data file"),
    "a folder named like a file": (lambda path: (path / "a.txt").mkdir(), "a.txt", "in this folder"),
    "a number too long": (lambda path: (path / "a.jsonl").write_text("1" * 5000), "", "a.jsonl, line 1: not JSON"),
    "broken line": (lambda path: (path / "a.jsonl").write_text('{"text"'), "", "a.jsonl, line 1: not JSON"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_broken_files_and_folders_are_one_line(fault: str, tmp_path: Path) -> None:
    breaker, name, said = FOLDERS[fault]
    breaker(tmp_path)
    message = refusal(tmp_path / name)
    assert message.startswith(str(tmp_path)) and said in message


def test_chats_are_rendered_by_the_models_template(talker: Path, tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
    path = json_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0], "id": 3}, {"text": "plain"}, {"messages": parts}])
    rendered = ["<user>Open the settings.<eos><assistant>do(action='Launch')<eos>", "plain", "<user>one two<eos>"]
    tokenizer = AutoTokenizer.from_pretrained(talker)
    stream = tokenizer("<eos>".join(rendered), add_special_tokens=False).input_ids
    check(spec(path), "evaluation", talker)
    found = windows(spec(path), "evaluation", talker, 0)
    assert found.ids.reshape(-1).tolist() == stream[: len(stream) // 8 * 8]
    assert found.digest == hashlib.sha256("\0".join(rendered).encode()).hexdigest()
    rows = table(tmp_path / "a.parquet", messages=[CHATS[0], CHATS[1]])
    again = windows(
        spec(json_lines(tmp_path / "b.jsonl", [{"messages": chat} for chat in CHATS])), "training", talker, 0
    )
    assert windows(spec(rows), "training", talker, 0).digest == again.digest


def test_a_rendered_chat_gets_no_second_beginning(talker: Path, tmp_path: Path) -> None:
    """A default call begins with <bos> for this tokenizer; a template would have written it."""
    tiny.begins_with_bos(talker, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    plain = json_lines(tmp_path / "plain.jsonl", [{"text": "Open the settings"}])
    chats = json_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    assert windows(spec(plain), "evaluation", tmp_path, 0).ids[0, 0] == 256
    assert 256 not in windows(spec(chats), "evaluation", tmp_path, 0).ids


def test_what_a_template_needs_besides_text_reaches_it(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in talker.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m.name }}:{{ m.tool_calls[0].name }}:{{ m.content }}|{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    call = {"role": "assistant", "name": "ann", "tool_calls": [{"name": "tap"}], "content": None}
    path = json_lines(tmp_path / "a.jsonl", [{"messages": [call] * 2}])
    found = windows(spec(path), "training", tmp_path / "model", 0)
    assert found.digest == hashlib.sha256(b"ann:tap:|ann:tap:|").hexdigest()


def test_a_tokenizer_without_template_is_refused_with_and_without_reading_it(folder: Path, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "plain"}, {"messages": CHATS[0]}])
    said = f"{path}, line 2: 'messages' need a chat template, and the tokenizer in {folder} has none"
    assert refusal(path, folder) == said
    with pytest.raises(UserError) as caught:
        windows(spec(path), "training", folder, 0)
    assert caught.value.message == said


def test_a_template_that_refuses_names_the_line(talker: Path, tmp_path: Path) -> None:
    made = tiny.llama(tmp_path / "strict")
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    (made / "chat_template.jinja").write_text(template)
    path = json_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, {"messages": CHATS[1]}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the chat template refuses these messages \(user first\)"):
        windows(spec(path), "training", made, 0)


def test_a_key_that_only_the_template_reads_names_its_line(tmp_path: Path) -> None:
    made = tiny.llama(tmp_path / "named")
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}")
    broken = [{"role": "user", "content": "hello", "name": "\ud83d"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (CHATS[0], broken)))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: what the template makes of it holds half of a surrogate"):
        windows(spec(path), "training", made, 0)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "'messages' must be a list of {role, content}, found str"),
        ([], "found an empty list"),
        (["hello"], "message 1: expected {role, content}, found str"),
        ([{"content": "x"}], "message 1: 'role' must be text, found None"),
        ([{"role": 1, "content": "x"}], "message 1: 'role' must be text, found 1"),
        ([*CHATS[0], {"role": "user", "txt": "x"}], "message 3: no 'content', found keys 'role', 'txt'"),
        ([{"role": "user", "content": 5}], "message 1: 'content' must be text or a list of parts, found int"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: a part must be {type: text, text: ...}"),
        ([{"role": "user", "content": ["x"]}], "message 1: a part must be {type: text, text: ...}"),
        ([{"role": "user", "content": "\ud800"}], "message 1: 'content' holds half of a surrogate pair"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "y"}]}],
            "message 1: an image must be {type: image, image: its path}, found {'type': 'image_url'",
        ),
    ],
)
def test_malformed_messages_name_file_line_and_message(messages: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + json.dumps({"messages": messages}) + "\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 2") and said in message


def test_pyarrow_and_datasets_are_imported_for_their_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    code = (
        "import sys, compress.data as data\n"
        f"data.check(data.DataSpec(source={{{str(tmp_path)!r}: 1, 'builtin': 1}}, samples=2, length=8), 'training')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
