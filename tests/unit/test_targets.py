"""Size targets of prune: the largest reachable model not above N, in parameters or bytes, or one line why none is.

On checkpoints of headers only; what is found is compared with every width that could have been taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.checkpoint.layout import files_bytes
from compress.cli import main
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import dump, loads
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan
from tests import sparse, tiny

GLM_STEP = 40 * 3 * 4096 * 256  # parameters of 256 neurons in every layer


def pruned(model: Path, options: str) -> PrunePlan:
    recipe = loads(f"model: {model}\nsteps:\n  - prune: {{{options}}}\n")
    (step,) = make_plan(recipe, Machine(1), check_machine=False).steps
    assert isinstance(step, PrunePlan)
    return step


def refusal(model: Path, options: str) -> str:
    with pytest.raises(UserError) as caught:
        pruned(model, options)
    return caught.value.message


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse.glm41v_9b(tmp_path_factory.mktemp("models") / "glm")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse.llama(tmp_path_factory.mktemp("models") / "llama")


def note(step: PrunePlan) -> str:
    (said,) = [line for line in step.notes if line.startswith(("params ", "bytes "))]
    return said


@pytest.mark.parametrize(
    ("options", "heads", "ffn", "parameters"),
    [
        ("params: 9B", 32, 11008, 8_971_571_712),
        ("params: 9.0e9, keep_heads: 28", 28, 11264, 8_929_608_192),
        ("params: 8.93B, heads: 0.125", 28, 11264, 8_929_608_192),
        ("params: 8929608192, keep_heads: 28", 28, 11264, 8_929_608_192),  # met exactly
        ("params: 9.02B, keep_heads: 30", 30, 11264, 9_013_504_512),
        ("params: 9.02B, keep_heads: 24", 24, 11776, 9_013_473_792),
        ("params: 9.5B", 32, 12032, 9_474_888_192),
        ("params: 10.292B", 32, 13568, 10_229_862_912),
        ("params: 10.13B, keep_heads: 28", 28, 13696, 10_124_984_832),  # the heads alone, the FFN stays whole
    ],
)
def test_the_widest_ffn_within_a_number_of_parameters(
    options: str, heads: int, ffn: int, parameters: int, glm: Path
) -> None:
    step = pruned(glm, options)
    assert dict(step.keep[0]) == {"heads": heads, "ffn": ffn}
    assert step.parameters == parameters == sum(t.parameters for t in step.after.tensors.values())
    said = note(step)
    assert f"FFN {ffn}: {parameters:,} parameters, the largest not above it" in said
    below = f"FFN {13568 if ffn == 13696 else ffn - 256}: "
    assert below in said
    if ffn < 13696:
        assert f"FFN {ffn - 256}: {parameters - GLM_STEP:,} parameters" in said
        above = min(ffn + 256, 13696)
        assert f"FFN {above}: {parameters + GLM_STEP * (above - ffn) // 256:,} parameters" in said


@pytest.mark.parametrize("target", ["200MB", "0.24GB", "190MiB", "180000000", "209715201"])
@pytest.mark.parametrize("shard", [10**10, 10**7])
def test_the_widest_ffn_within_a_number_of_bytes(target: str, shard: int, llama: Path) -> None:
    recipe = loads(f"model: {llama}\nsteps:\n  - prune: {{bytes: {target}, keep_heads: 6}}\n")
    plan = make_plan(recipe, Machine(1), check_machine=False, shard_bytes=shard)
    (step,) = plan.steps
    limit = PruneOptions.model_validate({"bytes": target}).bytes
    assert limit is not None and isinstance(step, PrunePlan)
    assert step.nbytes == files_bytes(step.after.tensors.values(), shard) <= limit
    width = step.keep[0]["ffn"]
    wider = loads(f"model: {llama}\nsteps:\n  - prune: {{keep_ffn: {width + 8}, keep_heads: 6}}\n")
    assert make_plan(wider, Machine(1), check_machine=False, shard_bytes=shard).steps[0].nbytes > limit
    assert f"FFN {width}: {step.parameters:,} parameters, {step.nbytes:,} bytes, the largest not above it" in note(step)


def test_bytes_count_the_dtype_that_is_written(tmp_path: Path) -> None:
    wide, narrow = (sparse.llama(tmp_path / dtype, dtype=dtype) for dtype in ("F32", "BF16"))
    assert pruned(wide, "bytes: 480MB").keep == pruned(narrow, "bytes: 240MB").keep


@pytest.mark.parametrize("heads", [9, 6, 3])
@pytest.mark.parametrize("params", [80_000_000, 100_000_000, 123_456_789, 110_000_000])
def test_no_other_width_is_nearer_below(heads: int, params: int, llama: Path) -> None:
    """Counted by hand, for every width of eight: 30 layers, 3 matrices of hidden 576."""
    base = 134_515_008 - 30 * 2 * 576 * 64 * (9 - heads)
    sizes = {width: base - 30 * 3 * 576 * (1536 - width) for width in range(8, 1537, 8)}
    fitting = [width for width, size in sizes.items() if size <= params]
    best = max(fitting)
    if sizes[best] < 0.985 * params:
        assert f"is FFN {best}: {sizes[best]:,} parameters" in refusal(llama, f"params: {params}, keep_heads: {heads}")
    else:
        step = pruned(llama, f"params: {params}, keep_heads: {heads}")
        assert (step.keep[0]["ffn"], step.parameters) == (best, sizes[best])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("params: 9B, ratio: 0.2", "prune.params: 'params' and 'ratio' exclude each other: each sets the FFN width"),
        ("bytes: 9GB, ffn: 0.2", "prune.bytes: 'bytes' and 'ffn' exclude each other"),
        ("params: 9B, keep_ffn: 11264", "prune.params: 'params' and 'keep_ffn' exclude each other"),
        ("params: 9B, bytes: 17GB", "prune.params: 'params' and 'bytes' exclude each other"),
        ("params: 9B, keep_heads: 28, heads: 0.125", "prune.keep_heads: 'keep_heads' (what stays) and 'heads' (share"),
        (
            "params: 11B",
            "prune.params: 11,000,000,000 removes nothing: the model stays within it as it is (FFN 13696: 10",
        ),
        (
            "params: 3B",
            "prune.params: 3,000,000,000 cannot be reached: the smallest that 32 heads leave is FFN 256: 3,686,748,672",
        ),
        (
            "params: 10.29B, keep_heads: 2",
            "10,290,000,000 is more than 1.5% away: the largest that 2 heads reach below",
        ),
        ("params: 9X", "prune.params: found '9X', allowed: a whole number above 0, or text such as 9B, 8.93B, 900M or"),
        ("params: 0", "prune.params: found 0, allowed: a whole number above 0"),
        ("params: true", "prune.params: found True, allowed: a whole number above 0"),
        ("bytes: 17G", "prune.bytes: found '17G', allowed: a whole number above 0, or text such as 17.9GB or 11GiB"),
        ("bytes: [1]", "prune.bytes: found [1], allowed: a whole number above 0"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(options: str, line: str, glm: Path) -> None:
    said = refusal(glm, options)
    assert line in said and "\n" not in said


def test_a_step_too_coarse_for_the_target_names_its_neighbours(tmp_path: Path) -> None:
    wide = sparse.llama(
        tmp_path / "wide",
        hidden_size=2048,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=1000,
    )
    sizes = {width: pruned(wide, f"keep_ffn: {width}").parameters for width in (1024, 1280)}
    said = refusal(wide, f"params: {sizes[1280] - 1}")
    assert f"the largest that 32 heads reach below it is FFN 1024: {sizes[1024]:,} parameters" in said
    assert f"; the next is FFN 1280: {sizes[1280]:,} parameters" in said


@pytest.mark.parametrize(
    ("given", "value"),
    [("9B", 9_000_000_000), ("8.93b", 8_930_000_000), ("900M", 900_000_000), ("9.0e9", 9_000_000_000), (".5K", 500)],
)
def test_text_is_read_exactly(given: str, value: int) -> None:
    assert PruneOptions.model_validate({"params": given}).params == value
    assert loads(f"model: m\nsteps:\n  - prune: {{params: {given}}}\n").steps[0].options.params == value
    assert loads(f"model: m\nsteps:\n  - prune: {{params: {value}}}\n").steps[0].options.params == value


@pytest.mark.parametrize(
    ("given", "value"), [("17.9GB", 17_900_000_000), ("11GiB", 11 * 2**30), ("5kb", 5000), ("1.5 MiB", 3 * 2**19)]
)
def test_sizes_are_read_exactly(given: str, value: int) -> None:
    assert PruneOptions.model_validate({"bytes": given}).bytes == value


def test_a_target_survives_the_recipe_that_is_written(llama: Path) -> None:
    recipe = loads(f"model: {llama}\nsteps:\n  - prune: {{params: 0.1B, keep_heads: 6}}\n")
    assert loads(dump(recipe)) == recipe and "params: 100000000" in dump(recipe)


def test_the_schema_says_what_a_target_takes() -> None:
    shown = PruneOptions.model_json_schema()["properties"]["params"]
    kinds = {entry["type"] for entry in shown["anyOf"]}
    assert kinds == {"integer", "number", "string", "null"} and "9B" in shown["description"]


def test_flags_recipe_and_api_take_the_same_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.glm4v(tmp_path / "model")
    whole = compress.inspect(model)["parameters"]
    target = f"{whole * 0.95 / 1000:.1f}K"
    text = ["--samples", "4", "--length", "64", "--threads", "1", "-q"]
    flags = ["prune", str(model), "-o", str(tmp_path / "a"), "--params", target, "--keep-heads", "6", *text]
    assert main(flags) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndata: {{calibration: {{samples: 4, length: 64}}}}\nevaluate: never\n"
        f"steps:\n  - prune: {{params: {target}, keep_heads: 6}}\n"
    )
    assert main(["run", str(recipe), "-o", str(tmp_path / "b"), "--threads", "1", "-q"]) == 0
    data: dict[str, Any] = {"samples": 4, "length": 64}
    machine = compress.Machine(threads=1)
    made = compress.prune(model, tmp_path / "c", params=target, keep_heads=6, data=data, machine=machine)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]
    step = made.receipt["steps"][0]
    assert 0.935 * whole < step["parameters"] <= 0.95 * whole
    capsys.readouterr()
    assert main(["prune", str(model), "-o", str(tmp_path / "d"), "--bytes", "9Q", "-q"]) == 2
    assert "--bytes: found '9Q', allowed: a whole number above 0, or text such as 17.9GB" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "receipt.json").read_text())["steps"][0]["options"]["params"] > 0


def test_a_size_that_is_too_far_away_names_the_width_that_stays_within_it(glm: Path) -> None:
    """Where no head goes: with fewer of them that width alone would be another model."""
    for options, hint in (("params: 11264M, keep_heads: 2", None), ("bytes: 7.6GB", "--keep-ffn 256")):
        with pytest.raises(UserError, match=r"is more than 1\.5% away") as caught:
            pruned(glm, options)
        assert caught.value.hint is None if hint is None else hint in (caught.value.hint or "")
