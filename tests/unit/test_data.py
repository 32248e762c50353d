"""Data: disjoint parts, the judge's rows, seeded choices, and one line for every way a text can be unfit."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from compress.data import (
    PARAGRAPH,
    SHARES,
    DataSpec,
    builtin_parts,
    check,
    documents,
    evenly_spaced,
    normalised,
    windows,
)
from compress.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("data") / "pico")


def long_paragraphs(text: str) -> list[str]:
    return [plain for p in re.split(r"\n\s*\n", text) if len(plain := normalised(p)) > PARAGRAPH]


def test_builtin_parts_share_no_paragraph_and_lose_none() -> None:
    from pydoc_data.topics import topics

    parts = {part: [p for text in texts for p in long_paragraphs(text)] for part, texts in builtin_parts().items()}
    together = [p for found in parts.values() for p in found]
    assert len(together) == len(set(together)), "a paragraph stands twice"
    everything = {p for text in topics.values() for p in long_paragraphs(text)}
    assert set(together) == everything
    assert sum(len(p) for p in everything) > 300_000


def test_builtin_parts_have_their_shares() -> None:
    sizes = {part: sum(map(len, texts)) for part, texts in builtin_parts().items()}
    for part, share in SHARES.items():
        assert sizes[part] / sum(sizes.values()) == pytest.approx(share, abs=0.03)


def test_evenly_spaced_is_torch_linspace() -> None:
    cases = [(n, k) for n in range(1, 330, 7) for k in range(1, min(n, 80) + 1)]
    float64_would_differ = 0
    for n, k in cases:
        expected = torch.linspace(0, n - 1, k).long().numpy()
        np.testing.assert_array_equal(evenly_spaced(n, k), expected, err_msg=f"{k} of {n}")
        float64_would_differ += not np.array_equal(np.linspace(0, n - 1, k).astype(np.int64), expected)
    assert float64_would_differ, "the cases no longer show why float32 is used"


def test_evaluation_takes_the_judges_rows(smollm2: Path, tmp_path: Path) -> None:
    text = "\n".join(documents(DataSpec(), "evaluation"))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids[0]
    n = len(ids) // 512
    rows = ids[: n * 512].view(n, 512)[torch.linspace(0, n - 1, 10).long()]
    found = windows(DataSpec(source=str(tmp_path / "a.txt"), samples=10), "evaluation", smollm2, seed=0)
    np.testing.assert_array_equal(found.ids, rows.numpy())
    assert found.tokens == len(ids)
    assert found.digest == hashlib.sha256(text.encode()).hexdigest()


def test_training_windows_are_a_seeded_choice_without_replacement(folder: Path, tmp_path: Path) -> None:
    text = "".join(f"line {i} of a text without repeats\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    spec = DataSpec(source=str(tmp_path / "a.txt"), samples=20, length=32)
    stream = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    every = [tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
    first, again, other = (windows(spec, "training", folder, seed).ids for seed in (1, 1, 2))
    chosen = [tuple(row) for row in first.tolist()]
    assert first.dtype == np.int64 and first.shape == (20, 32)
    assert len(set(chosen)) == 20 and set(chosen) <= set(every)
    assert chosen != sorted(chosen, key=every.index), "the order is seeded too"
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_special_tokens_stand_in_evaluation_only(folder: Path, tmp_path: Path) -> None:
    """As the judge has it: the default call, which begins with <bos> for this tokenizer."""
    tiny.begins_with_bos(folder, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("sixteen letters.")
    spec = DataSpec(source=str(tmp_path / "a.txt"), length=16)
    assert windows(spec, "evaluation", tmp_path, 0).ids[0, 0] == 256
    for part in ("calibration", "training"):
        assert 256 not in windows(spec, part, tmp_path, 0).ids


def test_documents_are_joined_with_eos(folder: Path, tmp_path: Path) -> None:
    lines = [{"text": "first document"}, {"text": "second\u2028document", "id": 7}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(o, ensure_ascii=False) for o in lines) + "\n")
    found = windows(DataSpec(source=str(tmp_path / "a.jsonl"), length=8), "evaluation", folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = (tokenizer(o["text"], add_special_tokens=False).input_ids for o in lines)
    expected = [*first, tokenizer.eos_token_id, *second]
    assert found.tokens == len(expected)
    assert found.ids.reshape(-1).tolist() == expected[: len(expected) // 8 * 8]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text", "data source 'a.csv': expected builtin, self, hub:NAME"),
        ("builtn", None, "data source 'builtn': no such folder; expected builtin, self, "),
        ("builtn", None, "; did you mean 'builtin'?"),
        ("gone.txt", None, "no such data file"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n ", "empty"),
        ("a.txt", b"abc\xff", "not UTF-8 text (byte 3"),
        ("a.jsonl", b"", "empty"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y"}\n',
            "line 2: expected an object with a string field 'text' or a list 'messages', found keys 'txt'",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n["y"]\n',
            "line 3: expected an object with a string field 'text' or a list 'messages', found list",
        ),
        ("a.jsonl", b'{"text": 3}\n', "a list 'messages', found 'text': int"),
        ("a.jsonl", b'{"text": "x"\n', "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: 'text' holds half of a surrogate pair"),
        ("a.txt", b"short", "at most 6 tokens of training text, needed 16 (1 x 16)"),
    ],
)
def test_unfit_sources_are_refused_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        check(DataSpec(source=name, length=16), "training")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_fewer_windows_than_samples(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 100)
    spec = DataSpec(source=str(tmp_path / "a.txt"), length=60, samples=3)
    check(DataSpec(source=spec.source, length=60), "evaluation")
    with pytest.raises(UserError, match="200 tokens of evaluation text make 3 windows of 60, needed 4"):
        windows(spec.model_copy(update={"samples": 4}), "evaluation", folder, seed=0)
    assert len(windows(spec, "evaluation", folder, seed=0).ids) == 3


def test_a_folder_without_a_usable_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"no tokenizer \(tokenizer.json\)"):
        windows(DataSpec(), "training", tmp_path, seed=0)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        windows(DataSpec(), "training", tmp_path, seed=0)


def test_ids_outside_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 50}}')
    with pytest.raises(UserError, match=r"the tokenizer gives id \d+, config.json has vocab_size 50"):
        windows(DataSpec(), "training", tmp_path, seed=0)


def test_neither_torch_nor_transformers_is_imported_at_the_top() -> None:
    code = (
        "import sys, compress.data, compress.losses, compress.steps.distill.plan as p\n"
        "compress.data.check(compress.data.DataSpec(), 'training')\n"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
