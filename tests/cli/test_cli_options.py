"""Wrong input is one `error:` line on stderr and exit code 2; every other way to end has its own code and line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.commands.options import parse_size
from compress.errors import GateError, MachineError, SelfCheckError, UserError
from compress.recipe import Recipe, loads
from tests import tiny

Main = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pruen"], "no such command 'pruen'; did you mean 'prune'?"),
        (["prune", "m", "-o", "o", "--rato", "1"], "--rato: no such option; did you mean '--ratio'?"),
        (["prune", "-o", "o"], "MODEL: missing, required"),
        (["prune", "m"], "--output: missing, required"),
        (["quantize", "m", "-o", "o"], "--format: missing, required"),
        (["quantize", "m", "-o", "o", "--format", "bf16", "--data", "x.txt"], "--data: no such option"),
        (["quantize", "m", "-o", "o", "--format", "bf16", "--samples", "8"], "--samples: no such option"),
        (["quantize", "m", "-o", "o", "--format", "bf16", "--length", "64"], "--length: no such option"),
        (["quantize", "m", "-o", "o", "--format", "bf16", "--seed", "x"], "--seed: found 'x', allowed: a whole number"),
        (["distill", "m", "-o", "o"], "--teacher: missing, required"),
        (["prune", "m", "-o", "o", "extra"], "Got unexpected extra argument(s) (extra)"),
        (["prune", "m", "-o", "o", "--ratio", "1"], "--ratio: found 1.0, allowed: a number above 0 and below 1"),
        (["prune", "m", "-o", "o", "--ratio", "x"], "--ratio: found 'x', allowed: a number above 0 and below 1"),
        (["prune", "m", "-o", "o", "--ratio", "nan"], "--ratio: found 'nan', allowed: a number above 0 and below 1"),
        (["prune", "m", "-o", "o", "--keep-ffn", "8.5"], "--keep-ffn: found '8.5', allowed: a whole number above 0"),
        (
            ["prune", "m", "-o", "o", "--ffn", "2", "--damping", "0"],
            "--ffn: found 2.0, allowed: a number above 0 and below 1; --damping: found 0.0, allowed: a number above 0",
        ),
        (["prune", "m", "-o", "o", "--samples", "0"], "--samples: found 0, allowed: a whole number above 0"),
        (["prune", "m", "-o", "o", "--seed", "-1"], "--seed: found '-1', allowed: a whole number from 0 to 4294967295"),
        (["prune", "m", "-o", "o", "--threads", "0"], "--threads: found '0', allowed: a whole number from 1 to 4096"),
        (
            ["prune", "m", "-o", "o", "--memory", "8gigs"],
            "--memory: found '8gigs', allowed: a size such as 8GiB or 500MB",
        ),
        (["prune", "m", "-o", "o", "-q", "-v"], "-q and -v exclude each other"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["plan", "demo:smollm2-135m"], "demo:smollm2-135m: a model, not a recipe"),
        (["run", "demo", "--set", "steps.0.ratoi=1"], "--set steps.0.ratoi: unknown key; did you mean 'ratio'?"),
    ],
)
def test_wrong_input_is_one_line(main: Main, arguments: list[str], line: str) -> None:
    code, out, err = main(*arguments)
    assert (code, out) == (2, "")
    first, *rest = err.splitlines()
    assert first.startswith(f"error: {line}")
    assert all(other.startswith("hint: ") for other in rest) and len(rest) <= 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a", "b"), 2, "error: a\nhint: b\n"),
        (GateError("perplexity"), 3, "error: perplexity\n"),
        (MachineError("disk"), 4, "error: disk\n"),
        (
            SelfCheckError("not what was meant"),
            1,
            "error: self-check failed, nothing was put in place: not what was meant\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 4, "error: out of memory (MemoryError)\n"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nmore"),
            4,
            "error: out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.)\n",
        ),
        (OSError(28, "No space left on device", "out/x"), 4, "error: no space left for out/x\n"),
        (
            ZeroDivisionError("by zero"),
            1,
            "error: internal error: ZeroDivisionError: by zero (this is our bug; rerun with -v)\n",
        ),
    ],
)
def test_every_way_to_end_has_its_code_and_line(
    main: Main, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fails(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(_module("compress.inspect"), "inspect_model", fails)
    assert main("inspect", "m") == (code, "", line)
    assert "Traceback" not in main("inspect", "m")[2]


def test_a_traceback_only_for_our_bugs_and_only_with_v(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **keywords: Any) -> None:
        raise {"bug": ZeroDivisionError("x"), "user": UserError("x")}[str(arguments[0])]

    monkeypatch.setattr(_module("compress.inspect"), "inspect_model", fails)
    assert "Traceback" in main("inspect", "bug", "-v")[2]
    assert main("inspect", "user", "-v")[2] == "error: x\n"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Recipe, Path, dict[str, Any]]]:
    """What the commands hand to `compress.run.run`, which does nothing here."""
    calls: list[tuple[Recipe, Path, dict[str, Any]]] = []
    module = _module("compress.run")

    def run(recipe: Recipe, out: Path, machine: Any, **keywords: Any) -> Any:
        calls.append((recipe, out, {"machine": machine, **keywords}))
        stage = {"stage": "1-prune", "parameters": 1000, "bytes": 2048, "seconds": 1.0}
        return module.Result(out, {"receipt": 1}, {"seconds": float("inf")}, (stage,))

    monkeypatch.setattr(module, "run", run)
    monkeypatch.chdir(tmp_path)
    for folder in ("o", "out/demo"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    return calls


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (
            ["prune", "m", "-o", "o", "--ratio", "1e-1", "--no-refit", "--samples", "8", "--seed", "3"],
            "{model: m, seed: 3, evaluate: never, data: {calibration: {samples: 8}},"
            " steps: [{prune: {ratio: 0.1, refit: false}}]}",
        ),
        (
            ["distill", "m", "--teacher", "t", "-o", "o", "--max-steps", "5", "--data", "x.txt"],
            "{model: m, teacher: t, evaluate: never, data: {training: x.txt}, steps: [{distill: {max_steps: 5}}]}",
        ),
        (
            ["quantize", "m", "-o", "o", "--format", "bf16", "--seed", "3"],
            "{model: m, seed: 3, evaluate: never, steps: [{quantize: {format: bf16}}]}",
        ),
    ],
)
def test_a_lone_command_is_a_recipe_with_one_step(
    main: Main, ran: list[tuple[Recipe, Path, dict[str, Any]]], arguments: list[str], recipe: str
) -> None:
    code, out, err = main(*arguments, "--threads", "1", "--memory", "2GiB", "--overwrite")
    assert (code, err) == (0, "")
    [(made, folder, given)] = ran
    assert made == loads(recipe)
    assert folder == Path("o")
    assert (given["machine"].threads, given["machine"].memory) == (1, 2 * 2**30)
    assert (given["overwrite"], given["keep_work"], given["where"]) == (True, False, None)
    assert "2.0 KiB" in out and "transformers.AutoModelForCausalLM.from_pretrained('o')" in out


def test_run_writes_to_out_and_the_recipes_name(main: Main, ran: list[tuple[Recipe, Path, dict[str, Any]]]) -> None:
    code, out, err = main("run", "demo", "--set", "steps.0.ratio=0.3", "--json")
    assert (code, err) == (0, "")
    [(made, folder, given)] = ran
    assert folder == Path("out/demo")
    assert made.steps[0].options.ratio == 0.3  # type: ignore[attr-defined]
    assert given["where"].endswith("demo.yaml")
    document = json.loads(out)
    assert (document["out"], document["receipt"]) == ("out/demo", {"receipt": 1})
    assert document["measured"] == {"seconds": None}  # JSON has no infinity


def test_evaluate_does_not_replace_a_file_unasked(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    file.write_text("mine")
    code, _, err = main("evaluate", "m", "-o", str(file))
    assert (code, err.splitlines()[0]) == (2, f"error: {file}: exists already")
    assert "--overwrite" in err
    assert file.read_text() == "mine"
    for more in ([], ["--overwrite"]):
        code, _, err = main("evaluate", "m", "-o", str(tmp_path), *more)
        assert (code, err) == (2, f"error: {tmp_path}: exists already and is a folder\nhint: name a file in it\n")


def test_a_file_in_the_place_of_out_is_refused_without_a_way_that_does_not_help(main: Main, tmp_path: Path) -> None:
    model, file, folder = tiny.llama(tmp_path / "model"), tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "theirs").touch()
    for out, what in ((file, "no folder"), (folder, "no receipt.json")):
        for more in ([], ["--overwrite"]):
            line = ["quantize", str(model), "-o", str(out), "--format", "bf16", "-q"]
            code, _, err = main(*line, *more)
            said = f"error: {out}: exists already and is not a result of ours ({what}); it is not replaced\n"
            assert (code, err) == (2, said + "hint: move it away, or give another output folder\n")
    assert file.read_text() == "mine"
    line[line.index(str(out))] = ours = str(tmp_path / "ours")
    (tmp_path / "ours").mkdir()  # an empty one is as good as none
    assert main(*line)[0] == 0
    assert main(*line)[::2] == (2, f"error: {ours}: exists already\nhint: --overwrite replaces it\n")
    assert main(*line, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["inspect", "nowhere"], 2, "nowhere: no such folder", "MODEL is a folder"),
        (["prune", "m", "-o", "o", "--rato", "1"], 2, "--rato: no such option", "autoglm-compress prune --help"),
        (["run", "demo", "--set", "a=1", "--set", "b=1"], 2, "recipes/demo.yaml: 2 problems", None),
    ],
)
def test_an_error_is_one_json_document_besides_the_line(
    main: Main, arguments: list[str], code: int, message: str, hint: str | None
) -> None:
    found, out, err = main(*arguments, "--json")
    said = json.loads(out)
    assert set(said) == {"error"} and found == said["error"]["exit_code"] == code
    assert message in said["error"]["message"] and (said["error"]["hint"] or "").startswith(hint or "")
    assert err.startswith(f"error: {said['error']['message']}\n")
    assert main(*arguments)[1] == ""


def test_an_error_with_numbers_is_still_one_document(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, error = _module("compress.run"), GateError("gate max_kl", result=None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    error.result = module.Result(tmp_path, {"receipt": 1}, {}, ({"stage": "dense"},))

    def fails(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(module, "run", fails)
    code, out, _ = main("run", "demo", "-o", str(tmp_path / "out"), "--json")
    said = json.loads(out)
    assert (code, said["error"]["exit_code"], said["receipt"], said["out"]) == (3, 3, {"receipt": 1}, str(tmp_path))
    code, out, err = main("run", "demo", "-o", str(tmp_path / "out"))
    assert code == 3 and "result: " in out and err == "error: gate max_kl\n"


def test_more_threads_than_cores_are_noted_once(
    main: Main, ran: list[tuple[Recipe, Path, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    line = ["prune", "m", "-o", "o", "--ratio", "0.1"]
    said = "--threads 4: more than the 3 cores that this process may use\n"
    assert [main(*line, "--threads", n)[2] for n in ("3", "4")] == ["", said]
    assert main(*line, "--threads", "4", "-q")[2] == ""
    assert main("plan", "nowhere", "--threads", "x")[0] == 2


@pytest.mark.parametrize("arguments", [["recipes", "list"], ["recipes", "show", "demo"], ["run", "--help"]])
def test_no_color_leaves_no_escape_at_all(main: Main, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    from typer import rich_utils

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "300")  # a table, not one key a line
    monkeypatch.setattr(rich_utils, "FORCE_TERMINAL", True)
    monkeypatch.setattr(rich_utils, "COLOR_SYSTEM", "auto")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in main(*arguments)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = main(*arguments)
    assert code == 0 and out and "\x1b" not in out


def test_gates_without_an_evaluation_say_what_to_change(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {tiny.llama(tmp_path / 'model')}\nsteps: [{{quantize: {{format: int8}}}}]\n"
        "evaluate: never\ngates: {max_kl: 1}\n"
    )
    code, _, err = main("plan", str(file))
    assert (code, err) == (
        2,
        f"error: {file}: gates.max_kl: needs an evaluation, but evaluate is 'never'\n"
        "hint: let evaluate be 'last' or 'each', or take the gate out\n",
    )
    assert main("plan", str(file), "--set", "evaluate=last")[0] == 0


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 2**33), ("8g", 2**33), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("12", 12), ("7B", 7), ("1kib", 1024)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "0", "8 gigs", "1e3"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UserError, match="--memory"):
        parse_size(text)


def test_public_functions_are_not_shadowed_by_the_modules_of_their_name() -> None:
    import compress

    _module("compress.plan")
    assert callable(compress.plan) and callable(compress.inspect) and callable(compress.run)
    assert set(compress.__all__) <= set(dir(compress))
    for name in compress.__all__:
        assert callable(getattr(compress, name)), name


def test_the_public_api_refuses_what_the_commands_refuse() -> None:
    import compress

    with pytest.raises(UserError, match="prune: ratoi: unknown key; did you mean 'ratio'"):
        compress.prune("m", "o", ratoi=0.2)
    with pytest.raises(UserError, match="data: samples: found 0, allowed: a whole number above 0"):
        compress.evaluate("m", data={"samples": 0})


def _module(name: str) -> Any:
    """The module itself: `compress.run` as an attribute is the public function."""
    import importlib

    return importlib.import_module(name)


def test_a_step_says_what_its_plan_warns_of(main: Main, tmp_path: Path) -> None:
    model = str(tiny.llama(tmp_path / "model"))
    line = "prune", model, "--ffn", "0.4", "--samples", "4", "--length", "32"
    code, _, err = main(*line, "-o", str(tmp_path / "out"))
    assert code == 0
    assert "\n  refit: 1.3 calibration tokens per column (under 4: the refit will be poor; give more samples)\n" in err
    assert main(*line, "-o", str(tmp_path / "quiet"), "-q")[::2] == (0, "")


def test_a_dry_run_is_the_plan_and_writes_nothing(main: Main, tmp_path: Path) -> None:
    model, out = tiny.llama(tmp_path / "model"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nsteps:\n- prune: {{ffn: 0.5}}\ngates: {{max_kl: 1}}\n")
    before = sorted(tmp_path.rglob("*"))
    code, planned, _ = main("plan", str(recipe), "--json")
    assert code == 0
    assert main("run", str(recipe), "-o", str(out), "--dry-run", "--json")[:2] == (0, planned)
    code, found, _ = main("prune", str(model), "-o", str(out), "--ffn", "0.5", "--dry-run", "--json")
    assert code == 0 and json.loads(found)["steps"] == json.loads(planned)["steps"]
    code, _, said = main("run", str(recipe), "-o", str(out), "--dry-run", "--set", "gates.max_parameters=1")
    assert code == 3 and "gate max_parameters: the plan gives" in said
    code, _, said = main("prune", str(model), "-o", str(model), "--ffn", "0.5", "--dry-run")
    assert code == 2 and "is not a result of ours" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_that_take_several_may_be_repeated(main: Main, tmp_path: Path) -> None:
    """A second one that replaced the first would cut what was to be protected."""
    model = tiny.llama(tmp_path / "model")
    given = [
        "--protect",
        "layers.0",
        "--protect",
        "layers.1.mlp",
        "--pin",
        "layers.2.mlp=40",
        "--pin=layers.1.self_attn=6",
    ]
    few = ["--samples", "8", "--length", "64", "--heads", "0.5", "--dry-run", "--json"]
    code, planned, _ = main("prune", str(model), "-o", str(tmp_path / "out"), *few, *given)
    (step,) = json.loads(planned)["steps"]
    assert code == 0 and step["options"]["protect"] == ["layers.0", "layers.1.mlp"]
    assert step["options"]["pin"] == {"layers.2.mlp": 40, "layers.1.self_attn": 6}
    assert step["ffn"][1] == [96, 96, 40] and step["heads"][1] == [8, 6, 4]
