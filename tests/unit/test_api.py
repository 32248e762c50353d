"""The Python functions do what the commands do, byte for byte, quietly, and docs/api.md tells the truth about them."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NotRequired, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from transformers.utils import logging as hf

import compress
from compress import signatures
from compress.cli import main
from compress.data import DataSpec
from compress.errors import GateError, UserError
from compress.steps import STEPS
from tests import tiny
from tests.invariants.test_run import MOMENT, contents

ROOT = Path(compress.__file__).parent.parent
ONE = compress.Machine(1)
DATA = {"samples": 4, "length": 64}
FLAGS = ["--samples", "4", "--length", "64", "--threads", "1", "-q"]
FUNCTIONS = [name for name in compress.__all__ if inspect.isfunction(getattr(compress, name))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with the demo's heads: 9, three to a KV group."""
    folder = tmp_path_factory.mktemp("api") / "source"
    return tiny.llama(folder, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)


@pytest.fixture(scope="module")
def pruned(source: Path) -> Path:
    return compress.prune(source, source.parent / "pruned", ratio=0.3, heads=0.3334, data=DATA, machine=ONE).out


def same(first: Path, second: Path) -> None:
    a, b = contents(first), contents(second)
    assert len(a) > 5 and a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name] and name not in MOMENT] == []


def test_prune_is_the_command(source: Path, pruned: Path, tmp_path: Path) -> None:
    arguments = ["prune", str(source), "-o", str(tmp_path / "b"), "--ratio", "0.3", "--heads", "0.3334", *FLAGS]
    assert main(arguments) == 0
    same(pruned, tmp_path / "b")


def test_distill_is_the_command(source: Path, pruned: Path, tmp_path: Path) -> None:
    options = {"max_steps": 1, "batch": 2}
    compress.distill(str(pruned), str(tmp_path / "a"), teacher=source, data=DATA, seed=5, machine=ONE, **options)
    arguments = ["distill", str(pruned), "--teacher", str(source), "-o", str(tmp_path / "b"), "--max-steps", "1"]
    assert main([*arguments, "--batch", "2", "--seed", "5", *FLAGS]) == 0
    same(tmp_path / "a", tmp_path / "b")


def test_quantize_is_the_command(source: Path, tmp_path: Path) -> None:
    compress.quantize(source, tmp_path / "a", format="int8", machine=ONE)
    assert main(["quantize", str(source), "-o", str(tmp_path / "b"), "--format", "int8", "--threads", "1", "-q"]) == 0
    same(tmp_path / "a", tmp_path / "b")


def test_evaluate_is_the_command(source: Path, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compress.evaluate(pruned, reference=source, data=DATA, machine=ONE)
    assert main(["evaluate", str(pruned), "--reference", str(source), "--json", *FLAGS]) == 0
    said = json.loads(capsys.readouterr().out)
    assert found.keys() <= said.keys() and all(said[key] == value for key, value in found.items())
    assert found.keys() == get_type_hints(compress.Evaluation).keys()
    alone = compress.evaluate(str(pruned), data=DATA, machine=ONE)
    assert alone.keys() == compress.Evaluation.__required_keys__ and alone["perplexity"] == found["perplexity"]


def test_run_and_plan_are_the_commands(source: Path, tmp_path: Path) -> None:
    text = (
        f"model: {source}\ndata: {{calibration: {{samples: 4, length: 64}}, evaluation: {{samples: 2, length: 64}}}}\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text + "steps:\n  - prune: {ratio: 0.2}\n  - quantize: {format: bf16}\n")
    changed = ["steps.0.ratio=0.4"]
    result = compress.run(recipe, tmp_path / "a", changed, machine=ONE)
    arguments = ["run", str(recipe), "-o", str(tmp_path / "b"), "--set", changed[0], "--threads", "1", "-q"]
    assert main(arguments) == 0
    same(result.out, tmp_path / "b")
    plan = compress.plan(str(recipe), changed)
    assert plan.memory is None and [step.nbytes for step in plan.steps][-1] == result.stages[-1]["bytes"]
    assert compress.plan(plan.recipe).as_dict() == plan.as_dict()
    assert compress.plan(recipe, machine=ONE).memory
    with pytest.raises(UserError, match="overrides are for recipe files"):
        compress.plan(plan.recipe, changed)
    with pytest.raises(GateError, match=r"out\.rejected") as failed:
        compress.run(recipe, tmp_path / "out", ["gates.max_kl=1e-9"], machine=ONE)
    assert isinstance(failed.value.result, compress.Result)


def test_inspect_gives_what_its_type_says(source: Path) -> None:
    found = compress.inspect(source)
    assert found == compress.inspect(str(source))
    assert found.keys() == get_type_hints(compress.Inspection).keys()
    assert all(group.keys() == get_type_hints(signatures.InspectedGroup).keys() for group in found["groups"])
    assert found["groups"][0]["step"] == 3


@pytest.mark.parametrize(
    "data", ["text.txt", Path("text.txt"), {"source": Path("text.txt")}, DataSpec(source="text.txt")], ids=repr
)
def test_data_is_text_a_path_a_mapping_or_a_spec(
    data: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    assert compress.evaluate(source, data=data, machine=ONE)["tokens"] == 3 * 511


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rato": 0.2}, "prune: rato: unknown key; did you mean 'ratio'?"),
        ({"ratio": 2.0}, "prune: ratio: found 2.0, allowed: a number above 0 and below 1"),
        ({"ratio": 0.2, "seed": -1}, "prune: seed: found -1, allowed: a whole number at least 0 and below 4294967296"),
        ({"ratio": 0.2, "overwite": True}, "prune: overwite: unknown key; did you mean 'overwrite'?"),
        ({"ratio": 0.2, "data": {"sample": 3}}, "data: sample: unknown key; did you mean 'samples'?"),
        ({"ratio": 0.2, "data": "nowhere.txt"}, "data.calibration: nowhere.txt: no such data file"),
        ({"keep_heads": 5}, "steps.0.prune.keep_heads: 5 heads cannot stay: the model has 9, and "),
    ],
)
def test_what_is_wrong_is_one_user_error(keywords: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        compress.prune(source, tmp_path / "out", machine=ONE, **keywords)
    assert raised.value.message.startswith(message) and raised.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_quantize_takes_no_data_and_run_no_seed(source: Path, tmp_path: Path) -> None:
    given: Any = {"data": "builtin"}
    with pytest.raises(UserError, match="quantize: data: unknown key; allowed: format, machine, overwrite"):
        compress.quantize(source, tmp_path / "out", format="bf16", **given)
    given = {"seed": 1}
    with pytest.raises(UserError, match="run: seed: unknown key; allowed: machine, overwrite"):
        compress.run("demo", tmp_path / "out", **given)
    with pytest.raises(UserError, match="quantize: format: missing; allowed: bf16, "):
        compress.quantize(source, tmp_path / "out")  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


def test_the_keywords_of_a_run_are_those_that_the_work_takes() -> None:
    """`signatures` lists them for type checkers, and their defaults for `help`, without importing torch."""
    from compress.run import run as work

    taken = {n: p for n, p in inspect.signature(work).parameters.items() if p.kind is p.KEYWORD_ONLY and n != "where"}
    taken["machine"] = inspect.signature(compress.evaluate).parameters["machine"]  # here it may be left out
    assert get_type_hints(signatures.RunKeywords).keys() == taken.keys()
    assert {name: parameter.default for name, parameter in taken.items()} | {"seed": 0} == signatures.DEFAULTS
    types = get_type_hints(work) | {"machine": compress.Machine | None}
    assert get_type_hints(signatures.RunKeywords) == {name: types[name] for name in taken}


def test_shards_are_as_large_as_the_command_makes_them(source: Path, tmp_path: Path) -> None:
    result = compress.quantize(source, tmp_path / "a", format="bf16", machine=ONE, shard_bytes=100_000)
    assert result.receipt["shard_bytes"] == 100_000 and len(list(result.out.glob("*.safetensors"))) > 2
    arguments = ["quantize", str(source), "-o", str(tmp_path / "b"), "--format", "bf16", "--shard-size", "100kB"]
    assert main([*arguments, "--threads", "1", "-q"]) == 0
    same(result.out, tmp_path / "b")


def test_a_receipt_has_the_keys_of_its_type(source: Path, pruned: Path, tmp_path: Path) -> None:
    alone = compress.load_receipt(pruned)
    types = get_type_hints(compress.Receipt, include_extras=True)
    assert alone.keys() == {key for key, kind in types.items() if get_origin(kind) is not NotRequired}
    assert alone["model"].keys() == get_type_hints(signatures.ReceiptSource).keys()
    taught = compress.distill(pruned, tmp_path / "a", teacher=source, data=DATA, max_steps=1, machine=ONE)
    assert compress.load_receipt(taught.out).keys() == {*alone, "teacher"} <= types.keys()
    assert compress.load_receipt(taught.out) == taught.receipt
    assert alone["autoglm_compress"] == compress.__version__


def test_a_folder_that_is_no_result_has_no_receipt(source: Path, pruned: Path) -> None:
    assert compress.load_receipt(str(pruned))["steps"][0]["step"] == "1-prune"
    with pytest.raises(UserError, match=r"receipt.json: not found; .*source is not a result"):
        compress.load_receipt(source)


def test_nothing_is_printed(source: Path, tmp_path: Path) -> None:
    """In a process of its own, where no test harness has set a log level."""
    script = """
import sys, compress
source, out = sys.argv[1:]
keywords = {"machine": compress.Machine(1)}
data = {"samples": 2, "length": 64}
compress.inspect(source)
compress.prune(source, out + "/a", ratio=0.3, data=data, **keywords)
compress.distill(out + "/a", out + "/b", teacher=source, data=data, max_steps=1, **keywords)
compress.quantize(out + "/b", out + "/c", format="int8", **keywords)
compress.quantize(out + "/b", out + "/d", format="w8a16", **keywords)
compress.evaluate(out + "/c", reference=source, data=data, **keywords)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    command = [sys.executable, "-c", script, str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # the tests' environment switches them off
def test_the_process_is_left_as_it_was(source: Path, pruned: Path, tmp_path: Path) -> None:
    threads, verbosity, bars = torch.get_num_threads(), hf.get_verbosity(), hf.is_progress_bar_enabled()
    try:
        torch.set_num_threads(2)
        hf.set_verbosity_info()
        hf.enable_progress_bar()
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        compress.distill(pruned, tmp_path / "a", teacher=source, data=DATA, max_steps=1, machine=ONE)
        compress.evaluate(pruned, data=DATA, machine=ONE)
        assert (torch.get_num_threads(), hf.get_verbosity(), hf.is_progress_bar_enabled()) == (2, hf.INFO, True)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    finally:
        torch.set_num_threads(threads)
        hf.set_verbosity(verbosity)
        (hf.enable_progress_bar if bars else hf.disable_progress_bar)()


@pytest.mark.parametrize("kind", STEPS)
def test_help_lists_every_option_of_the_step(kind: str) -> None:
    function = getattr(compress, kind)
    parameters = inspect.signature(function).parameters
    for name, field in STEPS[kind].options.model_fields.items():
        assert parameters[name].default == (inspect.Parameter.empty if field.is_required() else field.default)
        assert f"{name}: {field.description}" in function.__doc__
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_the_package_is_its_public_names() -> None:
    assert set(compress.__all__) <= set(dir(compress)) and all(getattr(compress, name) for name in compress.__all__)
    assert sorted(FUNCTIONS) == sorted(
        [*STEPS, "inspect", "plan", "run", "evaluate", "load_receipt", "load_sensitivity", "measure_sensitivity"]
    )
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        compress.prun  # noqa: B018  # type: ignore[attr-defined]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, compress; print([m for m in ('torch', 'numpy', 'typer') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout == "[]\n"


def test_the_page_of_docs_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compress.Machine, "detect", lambda *_: ONE)  # other tests run at the same time
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    text = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert "demo:smollm2-135m" in text and text.count(">>> ") == page.count(">>> ") > 20
    for name in FUNCTIONS:
        assert re.search(rf"^(>>> .*)?\bcompress\.{name}\(", text, re.MULTILINE), (
            f"docs/api.md has no example of {name}"
        )
        assert f"[`{name}`](#" in page
    test = doctest.DocTestParser().get_doctest(
        text.replace("demo:smollm2-135m", str(source)), {}, "docs/api.md", "docs/api.md", 0
    )
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
