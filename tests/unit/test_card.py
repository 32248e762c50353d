"""The model card names the base model and its licence, whatever the result was made from, and its Python runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import compress
from compress.card import model_card
from tests import tiny

HUB = "zai-org/GLM-4.1V-9B-Thinking"


OPTIONS = {"ffn": 0.25, "heads": None, "kv_merge": "aligned", "damping": 0.02}


def receipt(name: str) -> dict[str, Any]:
    return {
        "model": {"name": name},
        "autoglm_compress": "1.0",
        "steps": [{"step": "1-prune", "changes": "FFN 128 -> 96", "options": OPTIONS, "parameters": 1, "bytes": 2000}],
        "stages": [],
    }


def folder(path: Path, card: str | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if card is not None:
        (path / "README.md").write_text(card, encoding="utf-8")
    return path


def front_of(card: str) -> dict[str, Any]:
    lines = card.split("\n")
    assert lines[0] == "---"
    front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    assert isinstance(front, dict)
    return front


def test_a_step_is_what_it_changed_and_the_options_that_are_no_defaults(tmp_path: Path) -> None:
    card = model_card(receipt("m"), folder(tmp_path / "source"))
    assert "| 1-prune | FFN 128 -> 96; ffn 0.25, damping 0.02 | 1 | 2,000 |" in card.splitlines()


def test_a_hub_model_is_its_own_base(tmp_path: Path) -> None:
    """What the hub's model was made from in its turn is not the base of ours."""
    source = folder(tmp_path / "source", "---\nlicense: mit\nbase_model: org/before-it\n---\n# It\n")
    card = model_card(receipt(f"{HUB}@0123abc"), source)
    front = front_of(card)
    assert (front["base_model"], front["license"]) == (HUB, "mit")
    assert "The licence of the base model applies (mit)." in card
    assert "| 1-prune | FFN 128 -> 96; ffn 0.25, damping 0.02 | 1 | 2,000 |" in card


@pytest.mark.parametrize("name", ["demo:smollm2-135m", "student", "model.gguf"])
@pytest.mark.parametrize(("said", "kept"), [(HUB, HUB), (f"[{HUB}, gpt2]", [HUB, "gpt2"])])
def test_others_say_their_base_in_their_card(tmp_path: Path, name: str, said: str, kept: object) -> None:
    source = folder(tmp_path / "source", f"---\nlicense: apache-2.0\nbase_model: {said}\n---\n")
    card = model_card(receipt(name), source)
    assert front_of(card)["base_model"] == kept
    assert f"The licence of the base model ({HUB}" in card
    assert "applies (apache-2.0)." in card


def test_a_chain_of_commands_keeps_base_and_licence(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", f"---\nlicense: mit\nbase_model: {HUB}\n---\n")
    first = model_card(receipt("source"), source)
    second = front_of(model_card(receipt("first"), folder(tmp_path / "first", first)))
    assert second == front_of(first)
    assert (second["base_model"], second["license"]) == (HUB, "mit")


@pytest.mark.parametrize(
    "said", ["/home/someone/model", "../out/student", "7", "{a: b}", "[]", "[org/model, /tmp/x]", "", "'a b'"]
)
def test_a_base_that_is_no_hub_id_is_left_out(tmp_path: Path, said: str) -> None:
    source = folder(tmp_path / "source", f"---\nlicense: mit\nbase_model: {said}\n---\n")
    front = front_of(model_card(receipt("source"), source))
    assert "base_model" not in front
    assert front["license"] == "mit"


@pytest.mark.parametrize(
    "card", [None, "", "# No front matter", "---\nlicense: mit\n", "---\n- a\n---\n", "---\n: [\n---\n", "---"]
)
def test_a_source_without_front_matter(tmp_path: Path, card: str | None) -> None:
    made = model_card(receipt("student"), folder(tmp_path / "source", card))
    assert front_of(made) == {"library_name": "transformers", "tags": ["autoglm-compress", "compressed"]}
    assert "applies (see its files)." in made


def test_dashes_within_a_value_do_not_end_the_front_matter(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", f"---\ntitle: a --- b\nlicense: mit\nbase_model: {HUB}\n---\n---\n")
    front = front_of(model_card(receipt("student"), source))
    assert (front["base_model"], front["license"]) == (HUB, "mit")


def test_a_rejected_result_says_so_before_all_else(tmp_path: Path) -> None:
    failed = ["gate max_kl: found 0.9, allowed 0.1", "gate max_bytes: found 2,000, allowed 1000"]
    source = folder(tmp_path / "source")
    for gates, said in (({"failed": failed}, True), ({"failed": []}, False), (None, False)):
        card = model_card(receipt("student") | {"gates": gates}, source)
        body = card.split("\n# student, compressed\n", 1)[1].strip()
        assert body.startswith("**Rejected: ") == said
        assert all((f"- {line}\n" in body.split("Made from")[0]) == said for line in failed)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("demo:smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("model.gguf", "model.gguf"),
        ("student", None),
        (HUB, None),
        ("demo", None),
    ],
)
def test_what_was_dequantized_is_no_original(name: str, file: str | None, tmp_path: Path) -> None:
    card = model_card(receipt(name), folder(tmp_path / "source"))
    assert (
        (f"read from the GGUF `{file}`" in card) == ("not against the original model's" in card) == (file is not None)
    )
    assert "](recipe.yaml)" in card and "[autoglm-compress]" not in card, "a name is no link to a recipe"


@pytest.fixture
def bitsandbytes() -> Iterator[logging.Logger]:
    """Its logger, as a process has it that has imported nothing."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


def python_of(card: str) -> str:
    return card.split("```python\n", 1)[1].split("```", 1)[0]


@pytest.mark.parametrize(
    ("family", "chat", "format"),  # every two of them together
    [("llama", True, "bnb-int8"), ("llama", False, "bf16"), ("glm4v", True, "bf16"), ("glm4v", False, "bnb-int8")],
)
def test_its_python_prints_an_answer(
    family: str,
    chat: bool,
    format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    bitsandbytes: logging.Logger,
) -> None:
    source = getattr(tiny, family)(tmp_path / "source")
    if chat:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        (source / "chat_template.jinja").write_text(template)
    out = compress.quantize(source, tmp_path / "out", format=format, machine=compress.Machine(1)).out
    assert bitsandbytes.level == logging.NOTSET, "the caller's log levels were changed"
    code = python_of((out / "README.md").read_text())
    assert ("apply_chat_template" in code) == chat
    monkeypatch.chdir(out)
    caplog.clear()
    exec(code, {})
    assert capsys.readouterr().out, "no answer was printed"
    spoke = [record for record in caplog.records if record.name.startswith("bitsandbytes")]
    assert spoke == []
    if format == "bnb-int8":  # and it would have spoken
        bitsandbytes.setLevel(logging.NOTSET)
        exec("\n".join(line for line in code.splitlines() if "setLevel" not in line), {})
        assert sum("MatMul8bitLt" in record.getMessage() for record in caplog.records) > 100
    else:
        assert "logging" not in code
