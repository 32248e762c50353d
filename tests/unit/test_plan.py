"""Plans, on checkpoints that have headers only: the arithmetic of shares and widths, and the steps that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.headers import Header
from compress.checkpoint.layout import files_bytes
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import Plan, make_plan
from compress.recipe import loads
from compress.steps.prune.plan import PrunePlan
from tests import sparse, tiny

WIDE = {  # from hidden size 2048 on, widths are multiples of 256
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"num_hidden_layers": 2},
    "wide": WIDE,
    "just-below": {**WIDE, "hidden_size": 2040, "head_dim": 102, "num_attention_heads": 20},
}


def recipe_text(model: Path, *steps: str, **keys: str) -> str:
    top = "".join(f"{key}: {value}\n" for key, value in keys.items())
    return f"model: {model}\n{top}steps:\n" + "".join(f"  - {step}\n" for step in steps)


def planned(model: Path, *steps: str, where: str | None = "recipe", **keys: str) -> Plan:
    """The plan without the machine."""
    return make_plan(loads(recipe_text(model, *steps, **keys)), Machine(1), check_machine=False, where=where)


def pruned(model: Path, options: str) -> PrunePlan:
    (step,) = planned(model, f"prune: {{{options}}}").steps
    assert isinstance(step, PrunePlan)
    return step


def refusal(model: Path, *steps: str, where: str | None = "recipe", **keys: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        planned(model, *steps, where=where, **keys)
    return caught.value.message.splitlines()


def matrices(header: Header) -> int:
    """Attention + FFN matrix parameters of all decoder layers, counted from the shapes in `header`."""
    layers = [t for name, t in header.tensors.items() if ".layers." in name and ".visual." not in name]
    return sum(t.parameters for t in layers if len(t.shape) == 2)


# The arithmetic of shares.


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_ratio_without_heads_is_taken_from_the_ffn(model: str, ratio: float, tmp_path: Path) -> None:
    step = pruned(sparse.llama(tmp_path / "model", **MODELS[model]), f"ratio: {ratio}")
    before, after = matrices(step.before), matrices(step.after)
    assert step.removed == pytest.approx((before - after) / before, rel=1e-12)
    config = step.before.config
    multiple = 256 if config["hidden_size"] >= 2048 else 8
    width = step.after.config["intermediate_size"]
    assert width % multiple == 0 and width == step.keep[0]["ffn"]
    assert step.keep[0]["heads"] == config["num_attention_heads"]
    one_step = config["num_hidden_layers"] * 3 * config["hidden_size"] * multiple / before
    assert abs(step.removed - ratio) <= one_step / 2 * (1 + 1e-9)
    assert f"{step.removed:.2%} of the decoder layers' matrix parameters go" in step.notes


@pytest.mark.parametrize(("ratio", "heads", "left"), [(0.2, 0.3334, 6), (0.35, 0.3334, 6), (0.5, 0.6667, 3)])
def test_ratio_with_heads_takes_the_rest_from_the_ffn(ratio: float, heads: float, left: int, tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    step = pruned(model, f"ratio: {ratio}, heads: {heads}")
    assert step.keep[0]["heads"] == step.after.config["num_attention_heads"] == left
    assert (step.after.config["head_dim"], step.after.config["num_key_value_heads"]) == (64, 3)
    assert step.removed == pytest.approx(1 - matrices(step.after) / matrices(step.before), rel=1e-12)
    assert abs(step.removed - ratio) <= 3 * 576 * 8 / 2 / (matrices(step.before) / 30)
    alone = pruned(model, f"ratio: {ratio}")
    assert step.keep[0]["ffn"] > alone.keep[0]["ffn"]  # the heads gave a part of it
    assert abs(step.removed - alone.removed) <= 3 * 576 * 8 / (matrices(step.before) / 30)


def test_the_shapes_of_a_planned_cut_by_hand(tmp_path: Path) -> None:
    step = pruned(sparse.llama(tmp_path / "model"), "keep_ffn: 1000, keep_heads: 6")
    prefix = "model.layers.29."
    shapes = {n.removeprefix(prefix): t.shape for n, t in step.after.tensors.items() if n.startswith(prefix)}
    assert shapes == {
        "input_layernorm.weight": (576,),
        "mlp.down_proj.weight": (576, 1000),
        "mlp.gate_proj.weight": (1000, 576),
        "mlp.up_proj.weight": (1000, 576),
        "post_attention_layernorm.weight": (576,),
        "self_attn.k_proj.weight": (192, 576),
        "self_attn.o_proj.weight": (576, 384),
        "self_attn.q_proj.weight": (384, 576),
        "self_attn.v_proj.weight": (192, 576),
    }
    gone = 30 * (3 * 576 * (1536 - 1000) + 2 * 576 * 3 * 64)
    before = sum(t.parameters for t in step.before.tensors.values())
    assert before == 134_515_008
    assert step.parameters == before - gone
    assert step.removed == gone / (30 * (3 * 576 * 1536 + 2 * 576 * 9 * 64 + 2 * 576 * 192))


def test_fused_gate_and_up_lose_both_halves(tmp_path: Path) -> None:
    step = pruned(sparse.glm41v_9b(tmp_path / "model"), "keep_ffn: 11008")
    assert step.after.tensors["model.language_model.layers.0.mlp.gate_up_proj.weight"].shape == (22016, 4096)
    assert step.after.tensors["model.language_model.layers.39.mlp.down_proj.weight"].shape == (4096, 11008)
    vision = [name for name in step.before.tensors if name.startswith("model.visual.")]
    assert len(vision) == 24 * 7 + 13
    assert all(step.after.tensors[name] == step.before.tensors[name] for name in vision)


@pytest.mark.parametrize(
    ("model", "options", "width"),
    [
        ("smollm2", "ffn: 0.35", 1000),  # 998.4
        ("smollm2", "ffn: 0.5", 768),
        ("smollm2", "ffn: 0.003", 1528),  # 1531.4: down, not back to the full width
        ("wide", "ffn: 0.35", 3584),  # 3660.8: down to 14 * 256
        ("wide", "ffn: 0.33", 3840),  # 3773.4: up to 15 * 256
        ("just-below", "ffn: 0.35", 3664),  # 3660.8, in eights
        ("smollm2", "keep_ffn: 1001", 1001),  # what is said exactly is taken exactly
        ("wide", "keep_ffn: 5000", 5000),
        ("smollm2", "keep_ffn: 1536, keep_heads: 9", 1536),
    ],
)
def test_widths(model: str, options: str, width: int, tmp_path: Path) -> None:
    step = pruned(sparse.llama(tmp_path / "model", **MODELS[model]), options)
    assert step.keep[0]["ffn"] == step.after.config["intermediate_size"] == width


def test_each_step_is_planned_on_what_the_one_before_leaves(tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    first, second, third = planned(model, "prune: {ffn: 0.25}", "prune: {ffn: 0.25}", "quantize: {format: int8}").steps
    assert second.before is first.after and third.before is second.after
    widths = [step.after.config["intermediate_size"] for step in (first, second, third)]
    assert widths == [1152, 864, 864]
    assert (first.nbytes, third.nbytes) == tuple(files_bytes(s.after.tensors.values()) for s in (first, third))
    assert third.parameters == second.parameters < first.parameters
    assert third.nbytes < second.nbytes < first.nbytes
    assert first.before.config["intermediate_size"] == 1536  # the source's own config is not written into


# What is refused.


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "",
            "steps.0.prune: nothing to prune: give one of ratio, ffn, heads, keep_ffn, keep_heads, ",
        ),
        (
            "ratio: 0.2, keep_ffn: 8",
            "steps.0.prune.keep_ffn: 'keep_ffn' (what stays) and 'ratio' (share removed) exclude each other",
        ),
        ("ratio: 0.2, ffn: 0.2", "steps.0.prune.ffn: 'ratio' and 'ffn' exclude each other"),
        ("keep_ffn: 1537", "steps.0.prune.keep_ffn: 1537 neurons cannot stay: the model has 1536"),
        ("keep_heads: 5", "steps.0.prune.keep_heads: 5 heads cannot stay: the model has 9, and every one of 3 KV"),
        ("keep_heads: 12", "steps.0.prune.keep_heads: 12 heads cannot stay"),
        ("heads: 0.1", "the shares that can go are 0.3333, 0.6667"),
        ("heads: 0.9", "rounds to 3 of them"),
        ("ratio: 0.01, heads: 0.3334", "steps.0.prune.ratio: the heads alone remove 0.0625; ratio must be at least"),
        (
            "ratio: 0.9",
            "steps.0.prune.ratio: 0.9 cannot be reached: 8 of 1536 FFN neurons, the fewest, make it 0.7461",
        ),
        ("ffn: 0.998", "steps.0.prune.ffn: 0.998 cannot be reached: 8 of 1536 FFN neurons, the fewest, make it 0.9948"),
        ("ffn: 0.001", "steps.0.prune.ffn: 0.001 removes nothing: FFN widths are multiples of 8 below 1536"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options: str, line: str, tmp_path: Path) -> None:
    (said,) = refusal(sparse.llama(tmp_path / "model"), f"prune: {{{options}}}")
    assert said.startswith("recipe: steps.0.prune") and line in said


def test_a_lone_command_names_its_flags(tmp_path: Path) -> None:
    (said,) = refusal(sparse.llama(tmp_path / "model"), "prune: {keep_ffn: 2000}", where=None)
    assert said.startswith("--keep-ffn: 2000 neurons cannot stay")


def test_head_counts_that_stock_transformers_does_not_load_get_the_label_that_it_does(tmp_path: Path) -> None:
    step = pruned(sparse.glm41v_9b(tmp_path / "glm"), "keep_heads: 28")
    config = step.after.config
    assert (config["model_type"], config["architectures"]) == ("glm46v", ["Glm46VForConditionalGeneration"])
    text = config["text_config"]
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "model_type")
    assert [text[key] for key in sizes] == [28, 2, 128, True, "glm_image_text"]
    reason = "stock transformers' glm4v derives head_dim as hidden_size // heads and would not load 28 heads of 128"
    said = " ".join(step.notes)
    assert f"written as glm46v, because {reason}" in said and "from interleaved to half-split" in said
    assert "loaded by stock transformers (Glm46VForConditionalGeneration) and vLLM" in said
    ten = sparse.llama(tmp_path / "ten", hidden_size=640, num_attention_heads=10, num_key_value_heads=1)
    step = pruned(ten, "heads: 0.1")
    config = step.after.config
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert (config["sliding_window"], config["head_dim"], config["num_attention_heads"]) == (None, 64, 9)
    (said,) = [note for note in step.notes if note.startswith("written as")]
    assert said.startswith("written as mistral, because stock transformers loads a llama only if its heads divide hidd")
    assert "9 does not divide 640; 8 and 10 do; mistral is the same block" in said
    eight = pruned(ten, "heads: 0.2")
    assert eight.after.config["model_type"] == "llama" and eight.keep[0]["heads"] == 8
    assert not [note for note in eight.notes if note.startswith("written as")]


def test_every_complaint_comes_at_once(tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    teacher = sparse.llama(tmp_path / "teacher", vocab_size=50000, num_hidden_layers=1)
    (model / "tokenizer.json").unlink()
    lines = refusal(
        model,
        "prune: {ratio: 0.2, keep_ffn: 8}",
        "distill: {}",
        teacher=str(teacher),
        evaluate="never",
        gates="{max_kl: 0.1}",
        data="{calibration: nowhere.txt, training: {samples: 100000}}",
    )
    assert lines[0] == f"{len(lines) - 1} problems:"
    expected = [
        "recipe: data.calibration: nowhere.txt: no such data file",
        "recipe: data.training: builtin: at most ",
        f"recipe: model: {model}: no tokenizer (",
        "recipe: gates.max_kl: needs an evaluation, but evaluate is 'never'",
        "recipe: steps.0.prune.keep_ffn: 'keep_ffn' (what stays) and 'ratio' (share removed) exclude each other",
    ]
    for line in expected:
        assert len([said for said in lines if said.startswith(line)]) == 1, (line, lines)
    assert len(lines) - 1 >= len(expected)


def test_a_missing_model_does_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path / "nowhere",
        "distill: {}",
        teacher=str(tmp_path / "no-teacher"),
        data="{training: nowhere.txt}",
        evaluate="never",
        gates="{max_kl: 0.1}",
    )
    keys = [line.split(": ")[1] for line in lines[1:]]
    assert keys == ["model", "teacher", "data.training", "gates.max_kl"]


def test_a_refit_on_documentation_alone_is_told(tmp_path: Path) -> None:
    model, text = sparse.llama(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("some other prose\n" * 4000)
    of = {"builtin": {}, "both": {"data": f"{{calibration: {{source: {{builtin: 1, {text}: 1}}, samples: 8}}}}"}}
    of["text"] = {"data": f"{{calibration: {{source: {text}, samples: 8}}}}"}
    for name, data in of.items():
        (step,) = planned(model, "prune: {ffn: 0.2}", **data).steps
        assert any(note.startswith("calibrated on builtin") for note in step.notes) == (name == "builtin")
    (step,) = planned(model, "prune: {ffn: 0.2, criterion: magnitude, refit: false}").steps
    assert not any(note.startswith("calibrated on builtin") for note in step.notes)  # it looks at no text


def test_fewer_tokens_than_columns_are_refused_but_by_force(tmp_path: Path) -> None:
    model, data = sparse.llama(tmp_path / "model"), "{calibration: {samples: 2}}"
    (line,) = refusal(model, "prune: {ffn: 0.2}", data=data)
    assert "steps.0.prune: 1024 calibration tokens for a Gram matrix of 1536 columns: 0.67 a column" in line
    (step,) = planned(model, "prune: {ffn: 0.2, force: true}", data=data).steps
    assert any("0.7 calibration tokens per column" in note for note in step.notes)
    planned(model, "prune: {ffn: 0.2, refit: false}", data=data)  # no matrix, nothing to be singular
    wide = tiny.llama(tmp_path / "wide", num_attention_heads=16, head_dim=8)  # 128 columns of o_proj, which stays whole
    planned(wide, "prune: {ffn: 0.4}", data="{calibration: {samples: 2, length: 50}}")
    (line,) = refusal(wide, "prune: {ffn: 0.4, heads: 0.5}", data="{calibration: {samples: 2, length: 50}}")
    assert "100 calibration tokens for a Gram matrix of 128 columns" in line
    (line,) = refusal(model, "prune: {ffn: 0.2, held_out: 0.1}", data="{calibration: {samples: 4}}")
    assert "held_out: 0.1 of 4 calibration windows is none" in line
    (line,) = refusal(model, "prune: {ffn: 0.2, held_out: 0.2, refit: false}")
    assert "held_out: chooses the damping of refits, which refit: false leaves out" in line
    (line,) = refusal(model, "prune: {keep_layers: 20, held_out: 0.2}")
    assert "held_out: chooses the damping of refits, and no units go" in line


@pytest.mark.parametrize("part", ["calibration", "training"])
def test_judging_on_what_the_result_was_made_with_is_noted(part: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words that stand for a text. " * 2000)
    step = "prune: {ffn: 0.2}" if part == "calibration" else "distill: {max_steps: 1}"
    data = f"{{{part}: {{source: {text}, samples: 4}}, evaluation: {{source: {text}, samples: 2}}}}"
    made = planned(sparse.llama(tmp_path / "model"), step, data=data, evaluate="last")
    assert made.notes == (
        f"evaluation and {part} read the same text ({text}): the result is judged on what it was made with",
    )


@pytest.mark.parametrize(
    ("steps", "keys", "line"),
    [
        (("prune: {ffn: 0.2}",), {"teacher": "{teacher}"}, "recipe: teacher: no step uses it"),
        (("distill: {}",), {"teacher": "{teacher}"}, "the teacher has another vocabulary: 50000 tokens, the model has"),
        (("quantize: {format: int8}", "prune: {ffn: 0.2}"), {}, "steps.1.prune: the model is already quantized"),
        (("quantize: {format: int8}", "distill: {}"), {}, "steps.1.distill: the model is already quantized"),
        (
            ("quantize: {format: int8}", "quantize: {format: w8a16}"),
            {},
            "steps.1.quantize: the input is quantized already (bnb-int8)",
        ),
    ],
)
def test_steps_that_do_not_fit_together(
    steps: tuple[str, ...], keys: dict[str, str], line: str, tmp_path: Path
) -> None:
    teacher = sparse.llama(tmp_path / "teacher", vocab_size=50000)
    model = sparse.llama(tmp_path / "model")
    given = {key: value.format(teacher=teacher) for key, value in keys.items()}
    (said,) = refusal(model, *steps, **given)
    assert line in said


def test_what_keeps_all_there_is_says_so(tmp_path: Path) -> None:
    model, line = sparse.llama(tmp_path / "model"), "nothing goes: the model has no more than that as it is"
    whole = ("keep_ffn: 1536", "keep_heads: 9, keep_layers: 30", "keep_kv_heads: 3")
    for options in whole:
        assert line in pruned(model, options).notes, options
    for options in ("keep_ffn: 1528", "keep_layers: 29", "keep_kv_heads: 1", "keep_ffn: 1536, pin: {layers.1.mlp: 8}"):
        assert line not in pruned(model, options).notes, options


@pytest.mark.parametrize("given", ["steps.0.ffn=", "steps.0.ffn= "])
def test_a_key_that_is_set_to_nothing_is_refused(given: str, tmp_path: Path) -> None:
    text = recipe_text(sparse.llama(tmp_path / "model"), "prune: {ffn: 0.2}")
    with pytest.raises(UserError, match=r"--set steps\.0\.ffn: found nothing, expected a value; null leaves"):
        loads(text, overrides=[given])
    assert loads(text, overrides=["steps.0.ffn=null", "steps.0.keep_ffn=8"]).steps[0].options.ffn is None  # type: ignore[attr-defined]
