"""What a criterion takes of the whole model before the first layer is cut stands in the plan: memory, disk, reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.arch import family_of
from compress.checkpoint.headers import read_header
from compress.criteria import CRITERIA
from compress.data import DataSpec
from compress.errors import UserError
from compress.limits import JOINT_BYTES
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.steps.prune.ahead import batch_memory
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.stream import GRADIENTS, WHOLE
from tests import sparse, tiny

DATA = DataSpec(source="builtin", samples=64, length=512)


def planned(model: Path, **options: object) -> PrunePlan:
    recipe = Recipe.single("prune", str(model), PruneOptions(**{"ffn": 0.2, "force": True} | options), data=DATA)
    (step,) = make_plan(recipe, Machine(1), check_machine=False).steps
    assert isinstance(step, PrunePlan)
    return step


def test_of_nine_billion_parameters_the_layers_inputs_lie_on_the_disk(tmp_path: Path) -> None:
    model = sparse.glm41v_9b(tmp_path / "model")
    plain = planned(model)
    for criterion in [name for name, entry in CRITERIA.items() if entry.needs & GRADIENTS]:
        found = planned(model, criterion=criterion)
        tape = 4 * 40 * 16 * 512 * 4096  # float32, layers, windows, tokens, hidden
        assert found.scratch == tape > plain.scratch
        assert plain.memory <= found.memory < 12 * 2**30
        first = f"{criterion}: first a backward pass of the dense model, 16 x 512 tokens"
        assert f"{first}; its layers' inputs lie on the disk meanwhile (5.0 GiB)" in found.notes
        few = planned(model, criterion=criterion, gradient_samples=1)
        assert few.scratch == plain.scratch
        assert f"{criterion}: first a backward pass of the dense model, 1 x 512 tokens" in few.notes
    assert not any("backward" in note for note in plain.notes)


def test_what_needs_the_whole_model_counts_it(tmp_path: Path) -> None:
    model = sparse.glm41v_9b(tmp_path / "model")
    held = {name: planned(model, criterion=name) for name, entry in CRITERIA.items() if entry.needs & WHOLE}
    assert held.keys() == {"tp-magnitude", "tp-taylor"}
    parameters = sparse.GLM41V_9B_PARAMETERS
    assert 4 * parameters < held["tp-magnitude"].memory < 6 * parameters
    assert 8 * parameters < held["tp-taylor"].memory < 14 * parameters
    for name, found in held.items():
        assert any(note.startswith(f"{name}: first the whole stock model is held in float32") for note in found.notes)


@pytest.mark.parametrize("whole", [{"keep_layers": 2}, {"keep_kv_heads": 1}], ids=str)
def test_what_is_not_ranked_takes_no_backward_pass(whole: dict[str, object], tmp_path: Path) -> None:
    step = planned(tiny.llama(tmp_path / "model"), criterion="taylor", ffn=None, **whole)
    assert not any("backward" in note for note in step.notes)


def test_held_out_windows_do_not_choose_the_damping_of_merged_heads(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model")
    with pytest.raises(UserError, match="held_out: not for o_proj of merged KV heads, which is all that is refitted"):
        planned(model, held_out=0.5, ffn=None, keep_kv_heads=1)
    step = planned(model, held_out=0.5, keep_kv_heads=1)
    assert "held_out: not for o_proj of merged KV heads, whose damping is as given" in step.notes


def test_what_a_joint_refit_keeps_of_the_inside_is_counted(tmp_path: Path) -> None:
    """For 1,024 neurons and 32,768 tokens that is most of what is alive; beyond JOINT_BYTES nothing is kept."""
    model = tiny.llama(tmp_path / "model", intermediate_size=1024, num_hidden_layers=1)
    more = planned(model, joint_refit=2).memory - planned(model).memory
    assert 3 * 4 * 64 * 512 * 820 < more < 2 * JOINT_BYTES


def test_the_dense_states_beside_the_pruned_ones_are_counted(tmp_path: Path) -> None:
    """In memory, and in the state that a later run begins with, which the next one replaces only when it is whole."""
    model = tiny.llama(tmp_path / "model")
    one, other = planned(model), planned(model, error_propagation=0.3)
    states = 4 * 64 * 512 * 64
    assert states < other.memory - one.memory < 2 * states
    assert other.scratch - one.scratch == 2 * states


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_capped_logits_have_no_gradient_here(criterion: str, tmp_path: Path) -> None:
    model = tiny.gemma3_text(tmp_path / "model", final_logit_softcapping=2.0)
    with pytest.raises(
        UserError, match=f"criterion: {criterion} needs the gradient of the loss.*final_logit_softcapping"
    ):
        planned(model, criterion=criterion)


@pytest.mark.parametrize(("length", "windows"), [(512, 4), (8192, 1)])
def test_what_grows_with_the_square_of_the_length_is_counted(length: int, windows: int, tmp_path: Path) -> None:
    """A mask where layers see a window, all scores where they are capped; nothing where attention is plainly causal."""
    header = read_header(tiny.gemma3_text(tmp_path / "model"))
    sizes = family_of(header).sizes(header)
    causal = batch_memory(sizes, {}, length)
    pairs = windows * length**2
    assert batch_memory(sizes, header.text_config, length) - causal == 6 * pairs
    assert batch_memory(sizes, {"attn_logit_softcapping": 50.0}, length) - causal == 12 * sizes.heads * pairs
