"""What is a prompt and what an answer: by the template's own marks or by the messages before it, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from compress.data import TOKEN_KINDS, DataSpec, occurring, windows
from compress.errors import UserError
from tests import tiny

MESSAGE = "<{{ m.role }}>{{ m.content }}<eos>"
PLAIN = "{% for m in messages %}" + MESSAGE + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
THINKS = PLAIN.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
ENDS = (  # as GLM-4.1V's: what a prompt ends with is white space where messages end
    "{%- for m in messages %}<{{ m.role }}>\n{{ m.content }}<eos>{%- endfor %}\n"
    "{%- if add_generation_prompt %}<assistant>\n{% endif %}\n"
)
FORGETS = (  # as templates do that drop what an earlier answer thought
    "{% for m in messages %}"
    + MESSAGE.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}")
) + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = [
    {"role": "user", "content": "Open the sëttings"},
    {"role": "assistant", "content": "do(1)"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "finish(«2»)"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("kinds") / "pico")


def told(model: Path, tmp_path: Path, template: str, *lines: Any, length: int = 8) -> dict[str, str]:
    """The text of each kind in all windows, in order."""
    (model / "chat_template.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = DataSpec(source=str(tmp_path / "a.jsonl"), length=length)
    found = windows(spec, "evaluation", model, 0, kinds=True)
    assert found.kinds is not None and found.kinds.shape == found.ids.shape
    np.testing.assert_array_equal(found.ids, windows(spec, "evaluation", model, 0).ids)
    tokenizer = AutoTokenizer.from_pretrained(model)
    kinds = {name: found.ids[found.kinds == code] for code, name in enumerate(TOKEN_KINDS)}
    assert found.record["kinds"] == {name: len(ids) for name, ids in kinds.items() if len(ids)}
    return {name: tokenizer.decode(ids) for name, ids in kinds.items() if len(ids)}


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKS], ids=["prefixes", "marked", "prompt with a thought"])
def test_answers_are_what_the_model_says(template: str, model: Path, tmp_path: Path) -> None:
    found = told(model, tmp_path, template, {"messages": CHAT})
    assert found["answer"].startswith("do(1)<eos>finish(«2»)")
    assert found["prompt"] == "<user>Open the sëttings<eos><assistant><user>and now<eos><assistant>"
    assert found.keys() == {"prompt", "answer"}


def test_white_space_at_the_end_of_a_template_is_no_matter(model: Path, tmp_path: Path) -> None:
    found = told(model, tmp_path, ENDS, {"messages": CHAT}, length=9)
    assert found["answer"].startswith("do(1)<eos>finish(«2")
    assert found["prompt"].count("<assistant>\n") == 2


def test_text_and_chats_stand_beside_each_other(model: Path, tmp_path: Path) -> None:
    found = told(
        model, tmp_path, PLAIN, {"text": "plain text"}, {"messages": CHAT[:2]}, {"text": "and more"}, length=10
    )
    assert found["text"].startswith("plain text<eos>and m")
    # what stands between documents is of the one it ends
    assert found["prompt"] == "<user>Open the sëttings<eos><assistant><eos>" and found["answer"] == "do(1)<eos>"


def test_a_template_that_rewrites_earlier_answers_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a.jsonl, line 1, message 2: where this answer begins and ends cannot be told"
    ):
        told(model, tmp_path, FORGETS, {"messages": CHAT})
    assert told(model, tmp_path, FORGETS, {"messages": CHAT[:2]})["answer"].startswith("do(1")


def test_kinds_go_with_their_tokens_through_a_mix(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(PLAIN)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "b.txt").write_text("UPPER CASE ALONE, AND NOTHING ELSE " * 9)
    names = {str(tmp_path / "a.jsonl"): 1.0, str(tmp_path / "b.txt"): 2.0}
    spec = DataSpec(source=names, length=16, samples=9)
    found = windows(spec, "calibration", model, 3, kinds=True)
    assert found.kinds is not None
    upper = [set(row) for row in found.kinds.tolist()]
    assert [kinds == {TOKEN_KINDS.index("text")} for kinds in upper].count(True) == 6
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, kinds in zip(found.ids, upper, strict=True):
        assert (tokenizer.decode(row).isupper()) == (kinds == {TOKEN_KINDS.index("text")})
    assert occurring(spec, "calibration") == {"text", "prompt", "answer"}
