"""`self`: what a model samples from itself follows its own distribution, repeats exactly, and is refused in time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from compress.checkpoint.headers import read_header
from compress.cli import main
from compress.data import DataSpec, check, windows
from compress.data.sample import BATCH, TOP_P
from compress.errors import MachineError, UserError
from compress.machine import Machine, Silent
from compress.plan import make_plan
from compress.recipe import loads
from compress.steps.sampling import authors_of
from tests import sparse, tiny

SELF = DataSpec(source="self", samples=BATCH + 8, length=32)  # two batches
EOS = 257
pytestmark = pytest.mark.usefixtures("one_thread")  # what is sampled depends on the threads


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What another test has drawn is not read here."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("self") / "llama")


def sampled(folder: Path, seed: int = 0, spec: DataSpec = SELF, **more: Any) -> Any:
    return windows(spec, "calibration", folder, seed, **more)


@pytest.mark.parametrize("family", [tiny.llama, tiny.glm4v])
def test_the_same_seed_gives_the_same_tokens_and_leaves_torchs_own_seed_alone(family: Any, tmp_path: Path) -> None:
    folder = family(tmp_path / "model")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sampled(folder)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again, other = sampled(folder), sampled(folder, seed=1)
    assert first.ids.shape == (BATCH + 8, 32) and first.ids.dtype == np.int64
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.digest == again.digest == hashlib.sha256(first.ids.tobytes()).hexdigest()
    assert not np.array_equal(first.ids, other.ids) and first.digest != other.digest
    assert len({tuple(row) for row in first.ids.tolist()}) == BATCH + 8, "two windows are the same"
    assert first.tokens == first.ids.size and "sampled by the model itself with seed 0" in first.note


def test_batches_are_drawn_apart(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one and the same word, so that nothing but the draws tells the windows of two batches apart."""
    monkeypatch.setattr("compress.data.sample._words", lambda tokenizer, vocabulary: np.array([65]))
    ids = sampled(llama, spec=DataSpec(source="self", samples=2 * BATCH, length=16)).ids
    assert set(ids[:, 0]) == {65} and len({tuple(row) for row in ids.tolist()}) == len(ids)


def test_every_token_is_in_the_nucleus_of_what_the_model_predicts(llama: Path) -> None:
    """The likeliest tokens that make 0.95 together; so neither a temperature below one nor top-k alone would show."""
    ids = torch.from_numpy(sampled(llama).ids)
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        likely = model(ids).logits[:, :-1].softmax(-1)
    likely[..., len(AutoTokenizer.from_pretrained(llama)) :] = 0  # what no text has is never drawn
    likely /= likely.sum(-1, keepdim=True)
    drawn = likely.gather(2, ids[:, 1:, None])
    above = torch.where(likely > drawn, likely, 0.0).sum(-1)
    assert float(above.max()) < TOP_P + 1e-5
    assert float(above.max()) > TOP_P - 0.05, "the tail of the nucleus is drawn as well"
    surprise = -drawn.clamp_min(1e-12).log().mean()
    entropy = -(likely.clamp_min(1e-12).log() * likely).sum(-1).mean()
    assert abs(float(surprise - entropy)) < 0.2, "as surprising as the model expects: temperature 1"


def test_windows_begin_with_a_word_and_hold_only_what_text_can_hold(tmp_path: Path) -> None:
    folder = tiny.glm4v(tmp_path / "model")
    ids = sampled(folder, spec=DataSpec(source="self", samples=100, length=32)).ids
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(tokenizer.decode([token]).isalpha() for token in ids[:, 0])
    assert len(set(ids[:, 0].tolist())) > 20
    assert ids.max() < len(tokenizer) < tiny.VOCAB, "an id above the tokenizer's was drawn"
    ends = np.argwhere(ids[:, :-1] == EOS)
    assert len(ends), "an end of a text is part of what a model writes"
    assert all(ids[row, column + 1] != EOS for row, column in ends[:3]), "after it another text goes on"


def test_a_vocabulary_that_lacks_some_of_the_tokenizers_ids_is_kept_to(tmp_path: Path) -> None:
    """And one that lacks an id of images that the config names."""
    small = tiny.llama(tmp_path / "small", vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"image_token_id": 250}))
    ids = windows(DataSpec(source="self", samples=8, length=8), "calibration", small, 0).ids
    assert ids.shape == (8, 8) and ids.max() < 60


def test_the_tokenizers_beginning_is_seen_and_cut_off(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny.begins_with_bos(llama, tmp_path)
    with_bos, without = sampled(tmp_path).ids, sampled(llama).ids
    assert with_bos.shape == without.shape
    np.testing.assert_array_equal(with_bos[:, 0], without[:, 0])
    assert not np.array_equal(with_bos[:, 1:], without[:, 1:]), "the model did not see what stands before a text"


def test_another_model_may_write_for_the_tokenizer_of_this_one(llama: Path, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", seed=1)
    assert sampled(llama, model=other).digest == sampled(other).digest != sampled(llama).digest


def test_what_was_drawn_for_one_tokenizer_is_not_read_for_another(llama: Path, tmp_path: Path) -> None:
    """A teacher writes for the student's tokenizer: what it wrote for its own begins with other words."""
    other = tiny.llama(tmp_path / "other", seed=1)
    core = json.loads((other / "tokenizer.json").read_text())
    core["model"]["vocab"] = {word: (id + 7) % 256 for word, id in core["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(core))
    fresh = sampled(llama, model=other).ids
    own = sampled(other).ids
    assert not np.array_equal(own, fresh)
    np.testing.assert_array_equal(sampled(llama, model=other).ids, fresh)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path / "cache"))
        np.testing.assert_array_equal(sampled(other).ids, own)
        np.testing.assert_array_equal(sampled(llama, model=other).ids, fresh)


def test_what_was_drawn_is_read_again(llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = sampled(llama).ids
    (kept,) = (own_cache / "sampled").iterdir()

    def never(*arguments: object) -> None:
        raise AssertionError("drawn again")

    with monkeypatch.context() as patched:
        patched.setattr("compress.data.sample._drawn", never)
        np.testing.assert_array_equal(sampled(llama).ids, drawn)
        with pytest.raises(AssertionError, match="drawn again"):
            sampled(llama, seed=1)
    for damaged in (b"", kept.read_bytes()[:200], b"\x80\x04N."):  # the last is a pickle
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(sampled(llama).ids, drawn)
        assert kept.stat().st_size > drawn.nbytes


def test_half_of_a_mix_is_sampled(llama: Path) -> None:
    spec = DataSpec(source={"self": 1, "builtin": 1}, samples=16, length=32)
    own = {tuple(row) for row in sampled(llama, spec=DataSpec(source="self", samples=8, length=32)).ids.tolist()}
    mixed = [tuple(row) in own for row in sampled(llama, spec=spec).ids.tolist()]
    assert sum(mixed) == 8 and mixed not in (sorted(mixed), sorted(mixed, reverse=True))


def test_progress_counts_every_token(llama: Path) -> None:
    seen: dict[str, list[int]] = {}

    class Counting(Silent):
        @contextmanager
        def task(self, label: str, total: int) -> Iterator[Any]:
            counts = seen.setdefault(label, [total, 0])

            class Bar:
                def advance(self, by: int = 1) -> None:
                    counts[1] += by

            yield Bar()

    sampled(llama, progress=Counting())
    [(label, (total, done))] = seen.items()
    assert "sampling" in label and total == done == 2 * 31


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "tensor 'model.norm.weight' holds NaN or infinite values"),
        (3e38, "its logits are NaN or infinite"),
    ],
)
def test_a_model_that_gives_nan_writes_nothing(value: float, said: str, llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"].fill_(value)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        sampled(tmp_path)


@pytest.mark.parametrize(
    ("spec", "part", "said"),
    [
        (SELF, "evaluation", "self: text that a model samples itself says nothing about its quality"),
        (DataSpec(source={"self": 1, "builtin": 1}, samples=4), "evaluation", "self: text that a model samples itself"),
        (DataSpec(source="self"), "training", "self: needs samples, the number of windows to sample"),
    ],
)
def test_what_self_cannot_be(spec: DataSpec, part: Any, said: str, llama: Path) -> None:
    for call in (lambda: check(spec, part), lambda: windows(spec, part, llama, 0)):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.message.startswith(said)


def recipe(model: Path, step: str = "prune: {ffn: 0.5}", data: str = "{calibration: self}") -> str:
    return f"model: {model}\nevaluate: never\nsteps: [{step}]\ndata: {data}\n"


def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    model = sparse.glm41v_9b(tmp_path / "model")  # there are no weights to read: the file is a hole
    text = recipe(model)
    assert make_plan(loads(text), Machine(1), check_machine=False).memory is None
    said = r"self: sampling holds the whole model in memory, about \d\d\.\d GiB, and 16\.0 GiB are available; streamed"
    for part in (text, recipe(model, data="{calibration: {source: {self: 1, builtin: 1}}}")):
        with pytest.raises(MachineError, match=said):
            make_plan(loads(part), Machine(1, memory=16 * 2**30))
    plenty = make_plan(loads(text), Machine(1, memory=100 * 2**30))
    assert plenty.memory is not None and plenty.memory > sparse.GLM41V_9B_BYTES, "the plan counts the writing"


def test_the_teacher_writes_what_distill_trains_on(llama: Path, tmp_path: Path) -> None:
    teacher = tiny.llama(tmp_path / "teacher", seed=1)
    text = recipe(llama, "distill: {max_steps: 1, batch: 2}", "{training: {source: self, samples: 4, length: 16}}")
    text += f"teacher: {teacher}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert main(["run", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out"), "-q", "--threads", "1"]) == 0
    step = json.loads((tmp_path / "out" / "receipt.json").read_text())["steps"][0]
    expected = windows(DataSpec(source="self", samples=4, length=16), "training", teacher, 0)
    assert step["data"]["digest"] == expected.digest
    assert "sampled by the model itself" in step["data"]["note"]


def test_the_memory_of_the_teacher_counts_for_training(llama: Path, tmp_path: Path) -> None:
    small, large = read_header(llama), read_header(tiny.llama(tmp_path / "large", intermediate_size=960))
    authors = authors_of({"calibration": SELF, "training": SELF}, ["calibration", "training"], small, large)
    assert authors["calibration"].memory() < authors["training"].memory()
    assert authors_of({"training": DataSpec()}, ["training"], small, large) == {}


def test_a_quantized_model_does_not_write(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "int8"
    assert main(["quantize", str(llama), "-o", str(small), "--format", "w8a16", "-q", "--threads", "1"]) == 0
    (tmp_path / "r.yaml").write_text(recipe(small))
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "r.yaml")]) == 2
    assert "data.calibration: self: a quantized model samples no text of its own" in capsys.readouterr().err


def test_prune_on_self_repeats_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    options = ["--ffn", "0.5", "--data", "self", "--samples", "4", "--length", "32", "--threads", "1", "-q"]
    for name in ("one", "two"):
        assert main(["prune", str(llama), "-o", str(tmp_path / name), *options]) == 0
    for file in ("receipt.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
