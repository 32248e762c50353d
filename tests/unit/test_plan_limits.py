"""Plans against the folder and the machine: shapes that contradict the config, memory, disk, and what is read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compress.cli import main
from compress.errors import MachineError, UserError
from compress.machine import Machine
from compress.needs import SPARE
from compress.plan import Plan, make_plan
from compress.recipe import loads
from tests import sparse


def recipe_text(model: Path, *steps: str) -> str:
    return f"model: {model}\nsteps:\n" + "".join(f"  - {step}\n" for step in steps)


def planned(text: str) -> Plan:
    return make_plan(loads(text), Machine(1), check_machine=False)


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        planned(text)
    return caught.value.message


def edit(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"intermediate_size": 1000},
            "tensor 'model.layers.0.mlp.down_proj.weight' is [576, 1536], but config.json implies [576, 1000] "
            "(and 5 more)",
        ),
        ({"num_attention_heads": 6}, "'model.layers.0.self_attn.o_proj.weight' is [576, 576], but config.json"),
        ({"vocab_size": 49000}, "tensor 'model.embed_tokens.weight' is [49152, 576], but config.json implies"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' [576] is missing (and 8 more)"),
        (
            {"num_hidden_layers": 1},
            "tensor 'model.layers.1.self_attn.q_proj.weight' has no place in the model that config.json describes "
            "(and 8 more)",
        ),
        ({"attention_bias": True}, "tensor 'model.layers.0.self_attn.q_proj.bias' [576] is missing (and 7 more)"),
        ({"tie_word_embeddings": False}, "tensor 'lm_head.weight' [49152, 576] is missing"),
    ],
)
def test_shapes_that_contradict_the_config_are_refused(changes: dict[str, object], line: str, tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model", num_hidden_layers=2)
    edit(model, **changes)
    said = refusal(recipe_text(model, "prune: {ffn: 0.2}"))
    assert said.startswith(f"recipe: model: {model}: ") and line in said


def test_stored_rotary_frequencies_have_their_place(tmp_path: Path) -> None:
    shapes = sparse.llama_shapes(sparse.SMOLLM2_135M)
    old = {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (32,)}
    model = sparse.save(tmp_path / "model", sparse.SMOLLM2_135M, old)
    assert planned(recipe_text(model, "prune: {ffn: 0.2}")).parameters == 134_515_008


def test_the_teachers_folder_is_checked_as_well(tmp_path: Path) -> None:
    model, teacher = sparse.llama(tmp_path / "model"), sparse.llama(tmp_path / "teacher")
    edit(teacher, intermediate_size=1528)
    said = refusal(f"teacher: {teacher}\n" + recipe_text(model, "distill: {}"))
    assert f"{teacher}: tensor 'model.layers.0.mlp.down_proj.weight' is [576, 1536]" in said


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """Pretend that disks have `free` bytes; the folders asked about."""
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(Path(folder))
        return SimpleNamespace(total=free, used=0, free=free)

    assert sys.modules["compress.needs"].shutil is shutil
    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def test_memory_and_disk_are_those_of_the_largest_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse.llama(tmp_path / "model")
    recipe = loads(recipe_text(model, "prune: {ffn: 0.2}", "distill: {}", "quantize: {format: int8}"))
    asked = disk_of(monkeypatch, 10**12)
    out = tmp_path / "deep" / "not" / "yet" / "there"
    plan = make_plan(recipe, Machine(1, memory=2**40), out=out)
    largest = max(step.memory for step in plan.steps)
    assert plan.memory is not None and plan.memory > largest  # and the evaluation's hidden states besides
    unmeasured = recipe.model_copy(update={"evaluate": "never"})
    assert make_plan(unmeasured, Machine(1, memory=2**40), out=out).memory == largest
    prune, distill, quantize = plan.steps
    # what a step reads, unless it is the source, what it writes, and its saved states
    held = [prune.nbytes, prune.nbytes + distill.nbytes, distill.nbytes + quantize.nbytes]
    assert [plan.disk_of(i) for i in range(3)] == [a + b.scratch for a, b in zip(held, plan.steps, strict=True)]
    assert plan.disk == max(plan.disk_of(i) for i in range(3)) + SPARE
    assert prune.scratch == 2 * 4 * 64 * 512 * 576 and distill.scratch > 2 * 12 * 110_000_000 > quantize.scratch
    assert set(asked) == {tmp_path}  # the nearest folder that exists
    assert {"memory", "disk"} <= plan.as_dict().keys()
    without = make_plan(recipe, Machine(1, memory=1), check_machine=False)
    assert (without.memory, without.disk) == (None, None)
    assert not {"memory", "disk"} & without.as_dict().keys()
    assert "memory" not in without.as_dict()["steps"][0]


def test_memory_just_enough_is_enough(tmp_path: Path) -> None:
    recipe = loads(recipe_text(sparse.llama(tmp_path / "model"), "prune: {ffn: 0.2}"))
    need = make_plan(recipe, Machine(1, memory=2**40)).memory
    assert need is not None
    make_plan(recipe, Machine(1, memory=need))
    said = r"the plan needs about \d+\.\d MiB of memory, most of all for 1-prune;"
    with pytest.raises(MachineError, match=said) as caught:
        make_plan(recipe, Machine(1, memory=need - 1))
    assert caught.value.hint is not None and "--no-machine" in caught.value.hint


CALIBRATION = "what helps: fewer or shorter calibration windows (data.calibration.samples, data.calibration.length)"


@pytest.mark.parametrize(
    ("more", "steps", "what", "helps"),
    [
        ("", ["prune: {ffn: 0.2}", "quantize: {format: int8}"], "1-prune", CALIBRATION),
        ("keep_intermediate: false\n", ["prune: {ffn: 0.2}", "quantize: {format: int8}"], "1-prune", CALIBRATION),
        (
            "",
            ["prune: {ffn: 0.2}", "distill: {batch: 64}"],
            "2-distill",
            "what helps: a smaller batch or shorter training windows (steps.1.distill.batch, data.training.length)",
        ),
        (
            "evaluate: never\n",
            ["quantize: {format: int8}"],
            "1-quantize",
            "1-quantize holds one layer at a time; less text",
        ),
        (
            "",
            ["quantize: {format: int8}"],
            "evaluation",
            "what helps: fewer or shorter evaluation windows (data.evaluation.samples, data.evaluation.length)",
        ),
        (
            "data: {calibration: {source: self, samples: 64, length: 8192}, evaluation: {samples: 4}}\n",
            ["prune: {ffn: 0.2}"],
            "self",
            "what helps: text that the model does not sample itself",
        ),
    ],
)
def test_too_little_memory_says_which_step_and_what_makes_it_need_less(
    more: str, steps: list[str], what: str, helps: str, tmp_path: Path
) -> None:
    recipe = loads(more + recipe_text(sparse.llama(tmp_path / "model"), *steps))
    need = make_plan(recipe, Machine(1, memory=2**42)).memory
    assert need is not None
    with pytest.raises(MachineError) as caught:
        make_plan(recipe, Machine(1, memory=need - 1))
    assert f"most of all for {what};" in caught.value.message
    assert (caught.value.hint or "").startswith(helps)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["prune", "--ratio", "0.3"], "what helps: fewer or shorter calibration windows (--samples, --length)"),
        (["distill"], "what helps: a smaller batch or shorter training windows (--batch, --length)"),
        (["quantize", "--format", "int8"], "1-quantize holds one layer at a time"),
    ],
)
def test_a_lone_command_names_its_flags_and_no_size_is_nothing(
    arguments: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    model = str(sparse.llama(tmp_path / "model"))
    teacher = ["--teacher", model] if command == "distill" else []
    line = [command, model, *teacher, "-o", str(tmp_path / "out"), *options, "--memory", "1500KiB", "-q"]
    assert main(line) == 4
    error, told = capsys.readouterr().err.splitlines()
    assert error.endswith("1.5 MiB are available") and " 0.0 " not in error
    assert told.startswith(f"hint: {hint}") and "--no-machine" not in told


def test_disk_just_enough_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = loads(recipe_text(sparse.llama(tmp_path / "model"), "quantize: {format: int8}"))
    need = make_plan(recipe, Machine(1, memory=2**40)).disk
    assert need is not None
    disk_of(monkeypatch, need)
    make_plan(recipe, Machine(1, memory=2**40))
    disk_of(monkeypatch, need - 1)
    with pytest.raises(MachineError, match=r"the plan needs \d+\.\d MiB of disk, .* has \d+\.\d MiB free"):
        make_plan(recipe, Machine(1, memory=2**40))


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_machine_is_exit_4_and_only_without_complaints(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, recipe, out = sparse.llama(tmp_path / "model"), tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(recipe_text(model, "prune: {ffn: 0.2}"))
    arguments = [command, str(recipe), "--memory", "1MB", "-q", *(["-o", str(out)] if command == "run" else [])]
    assert main(arguments) == 4
    assert capsys.readouterr().err.startswith("error: the plan needs about ")
    assert main([*arguments, "--set", "steps.0.ffn=0.0001"]) == 2
    assert "removes nothing" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml"]
    if command == "plan":
        assert main([*arguments, "--no-machine"]) == 0


def bytes_read() -> int:
    """What this process has read from files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of the bytes read")
def test_a_plan_reads_no_weight(tmp_path: Path) -> None:
    model = sparse.glm41v_9b(tmp_path / "model")
    before = bytes_read()
    plan = planned(recipe_text(model, "prune: {keep_ffn: 11008}", "quantize: {format: w8a16}"))
    assert plan.steps[-1].parameters == 8_971_571_712
    assert bytes_read() - before < 10 * 2**20  # of 20.6 GB: headers, config, the builtin text
