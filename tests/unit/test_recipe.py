"""Recipes: every mistake is one line with its place, all of them at once; what is written loads to what it was."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.data import DataSpec
from compress.errors import UserError
from compress.formats import FORMATS
from compress.recipe import Recipe, StepEntry, dump, find, load, loads
from compress.steps.distill.options import DistillOptions
from compress.steps.prune.options import PruneOptions
from compress.steps.quantize.options import QuantizeOptions

GOOD = """\
model: demo:smollm2-135m
steps:
  - prune: {ratio: 0.2}
  - distill:
  - quantize: {format: int8}
"""


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        loads(text, "r.yaml", overrides)
    return caught.value.message


def test_a_recipe_with_nothing_but_the_required_has_the_defaults() -> None:
    recipe = loads(GOOD)
    assert [step.kind for step in recipe.steps] == ["prune", "distill", "quantize"]
    assert recipe.steps[0].options == PruneOptions(ratio=0.2)
    assert recipe.steps[1].options == DistillOptions()
    assert (recipe.seed, recipe.evaluate, recipe.gates, recipe.teacher) == (0, "last", None, None)
    assert recipe.data.calibration == DataSpec(source="builtin", samples=64, length=512)
    assert recipe.data.training == recipe.data.evaluation == DataSpec(source="builtin", samples=None, length=512)


def test_a_word_is_short_for_a_source_and_keeps_the_parts_defaults() -> None:
    recipe = loads(GOOD + "data:\n  calibration: a.txt\n  training: {source: b.txt}\n  evaluation: {samples: 3}\n")
    assert recipe.data.calibration == DataSpec(source="a.txt", samples=64)
    assert recipe.data.training == DataSpec(source="b.txt")
    assert recipe.data.evaluation == DataSpec(source="builtin", samples=3)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GOOD + "modle: x\n", "r.yaml:6: modle: unknown key; did you mean 'model'?"),
        (GOOD.replace("ratio:", "ratoi:"), "r.yaml:3: steps.0.prune.ratoi: unknown key; did you mean 'ratio'?"),
        (
            GOOD.replace("0.2", "1.0"),
            "r.yaml:3: steps.0.prune.ratio: found 1.0, allowed: a number above 0 and below 1",
        ),
        (
            GOOD.replace("0.2", "lots"),
            "r.yaml:3: steps.0.prune.ratio: found 'lots', allowed: a number above 0 and below 1",
        ),
        (
            GOOD.replace("0.2", ".nan"),
            "r.yaml:3: steps.0.prune.ratio: found '.nan', allowed: a number above 0 and below 1",
        ),
        (GOOD.replace("int8", "8"), "r.yaml:5: steps.2.quantize.format: found 8, allowed: bf16, fp16"),
        (
            GOOD.replace("{ratio: 0.2}", "{refit: yes}"),
            "r.yaml:3: steps.0.prune.refit: found 'yes', allowed: true or false",
        ),
        (GOOD.replace(" {format: int8}", ""), "r.yaml:5: steps.2.quantize.format: missing; allowed: bf16, fp16"),
        (GOOD.replace("prune", "prnue"), "r.yaml:3: steps.0.prnue: unknown step; did you mean 'prune'?"),
        (
            GOOD.replace("  - distill:", "    distill:"),
            "r.yaml:3: steps.0: found the keys prune, distill, allowed: one key of prune, distill, quantize",
        ),
        (
            "model: x\nsteps: []\n",
            "r.yaml:2: steps: found an empty list, allowed: a list of steps, - prune: {ratio: 0.2}",
        ),
        (
            GOOD + "evaluate: eahc\n",
            "r.yaml:6: evaluate: found 'eahc', allowed: each, last, never; did you mean 'each'?",
        ),
        (
            GOOD + "gates: {}\n",
            "r.yaml:6: gates: no gate is set, allowed: max_perplexity_ratio, max_kl, min_top1_agreement, max_bytes, "
            "max_parameters",
        ),
        (GOOD + "gates:\n  max_kl: -1\n", "r.yaml:7: gates.max_kl: found -1, allowed: a number above 0"),
        (
            GOOD + "data: {training: {length: 4}}\n",
            "r.yaml:6: data.training.length: found 4, allowed: a whole number at least 8",
        ),
        (GOOD + "data: {evalution: x}\n", "r.yaml:6: data.evalution: unknown key; did you mean 'evaluation'?"),
        (GOOD + "data: 3\n", "r.yaml:6: data: found 3, allowed: a map"),
        (GOOD + "model: again\n", "r.yaml:6: model: repeated key, it stands at r.yaml:1 as well"),
        (GOOD + "seed: 1e999\n", "r.yaml:6: seed: found '1e999', which is beyond all numbers that are read"),
        (GOOD + f"seed: {2**63}\n", f"r.yaml:6: seed: found '{2**63}', which is beyond all numbers that are read"),
        (GOOD + f"seed: {'9' * 5000}\n", "r.yaml:6: seed: found '999"),
        (GOOD + "seed: !!int 1_0\n", "r.yaml:6: seed: found '1_0', which is no int"),
        (GOOD + "seed: !!int 0x1f\n", "r.yaml:6: seed: found '0x1f', which is no int"),
        (GOOD + "seed: !!null x\n", "r.yaml:6: seed: found 'x', which is no null"),
        (GOOD + 'teacher: "a\\nb"\n', "r.yaml:6: teacher: found 'a\\nb', which holds the control character '\\n'"),
        (GOOD + 'teacher: "a\\0"\n', "r.yaml:6: teacher: found 'a\\x00', which holds the control character '\\x00'"),
        (GOOD + 'teacher: "\\ud800"\n', "r.yaml:6: teacher: found '\\ud800', which holds the control character"),
        (GOOD + 'teacher: ""\n', "r.yaml:6: teacher: found '', allowed: text that is not empty"),
        (GOOD + '"a\\nb": 3\n', "r.yaml:6: unknown key 'a\\nb'"),
        (GOOD + f"{'k' * 1001}: 3\n", f"r.yaml:6: unknown key '{'k' * 56}..."),
        (GOOD + 'teacher: "\\UFFFFFFFF"\n', "r.yaml: not valid YAML: "),
        (f"%YAML {'9' * 5000}.1\n---\n" + GOOD, "r.yaml: not valid YAML: "),
        (GOOD + "teacher: " + "[" * 2000 + "]" * 2000, "r.yaml: nested too deeply"),
        (GOOD + "data: [" + "1, " * 1000 + "1]\n", "r.yaml: more than 1000 values, which no recipe has"),
        (GOOD + "version: 0\n", "r.yaml:6: version: found 0, allowed: 1"),
        (GOOD + "version: true\n", "r.yaml:6: version: found true, allowed: 1"),
        (GOOD + "version: '1'\n", "r.yaml:6: version: found '1', allowed: 1"),
        (GOOD + "keep_intermediate: no\n", "r.yaml:6: keep_intermediate: found 'no', allowed: true or false"),
        (GOOD + "seed: !!python/name:os.system\n", "the tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "r.yaml:2: not valid YAML: aliases (*name) are not allowed"),
        ("model: [x\n", "r.yaml:2: not valid YAML"),
        ("[" * 5000, "r.yaml: nested too deeply"),
        ("- prune\n", "r.yaml:1: found a list, allowed: a map"),
        ("model: \0\n", "r.yaml: not valid YAML"),
    ],
)
def test_one_mistake_is_one_line(text: str, line: str) -> None:
    message = refusal(text)
    assert line in message
    assert "\n" not in message


@pytest.mark.parametrize("version", ["2", "99", "1.5"])
@pytest.mark.parametrize("rest", ["", "steps: nonsense\nnew: {a: !!binary x}\nmodel: x\n", "modle: x\nmodle: y\n"])
def test_a_newer_recipe_is_refused_before_its_keys(version: str, rest: str) -> None:
    line = f"r.yaml:1: version: found {version}, but this autoglm-compress reads version 1; upgrade it"
    assert refusal(f"version: {version}\n{rest}") == line
    assert refusal(rest, f"version={version}", "steps.9.x=1") == line.replace("r.yaml:1", "--set version")


def test_the_version_of_today_is_not_written() -> None:
    assert loads("version: 1\n" + GOOD) == loads(GOOD)
    assert "version" not in dump(loads("version: 1\n" + GOOD))


def test_all_mistakes_come_at_once_in_the_order_of_the_file() -> None:
    text = "modle: x\nmodel: 3\nsteps:\n  - prune: {ratio: 7, ratoi: 1}\n  - pruen:\nevaluate: 1\n"
    first, *lines = refusal(text, "data.calibration.sampels=3", "steps.7.ratio=1").split("\n")
    assert first == "r.yaml: 8 problems"
    places = [line.split(": ")[0] for line in lines]
    assert places[:6] == ["r.yaml:1", "r.yaml:2", "r.yaml:4", "r.yaml:4", "r.yaml:5", "r.yaml:6"]
    assert sorted(places[6:]) == ["--set data.calibration.sampels", "--set steps.7.ratio"]


@pytest.mark.parametrize(
    "override",
    [
        "steps.0.ratio=0.3",
        "steps.0.prune.ratio=0.3",
        "steps.0.prune={ratio: 0.3}",
        "steps.0={prune: {ratio: 0.3}}",
    ],
)
def test_an_override_addresses_the_options_of_a_step(override: str) -> None:
    recipe = loads(GOOD, "r.yaml", [override])
    assert recipe.steps[0] == StepEntry(kind="prune", options=PruneOptions(ratio=0.3))
    assert recipe.steps[1:] == loads(GOOD).steps[1:]


def test_overrides_reach_what_the_file_leaves_out() -> None:
    given = ["steps.1.learning_rate=1e-4", "data.calibration=a.txt", "data.calibration.samples=8", "gates.max_kl=.5"]
    recipe = loads(GOOD, "r.yaml", [*given, "steps.0.refit=false", "teacher=out/dense"])
    assert recipe.steps[1].options == DistillOptions(learning_rate=1e-4)
    assert recipe.data.calibration == DataSpec(source="a.txt", samples=8)
    assert recipe.gates is not None and recipe.gates.max_kl == 0.5
    assert recipe.steps[0].options == PruneOptions(ratio=0.2, refit=False)
    assert recipe.teacher == "out/dense"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("steps.0.ratoi=0.3", "--set steps.0.ratoi: unknown key; did you mean 'ratio'?"),
        ("steps.0.ratio=3", "--set steps.0.ratio: found 3, allowed: a number above 0 and below 1"),
        ("stpes.0.ratio=0.3", "--set stpes.0.ratio: stpes: unknown key; did you mean 'steps'?"),
        ("steps.3.ratio=0.3", "--set steps.3.ratio: steps is a list: found '3', allowed: an index from 0 to 2"),
        ("steps.1.prune.ratio=0.3", "--set steps.1.prune.ratio: step 1 is 'distill', not 'prune'"),
        ("model.name=x", "--set model.name: model is 'demo:smollm2-135m', which has no key 'name'"),
        ("steps.0.ratio", "--set steps.0.ratio: expected KEY=VALUE, as in steps.0.ratio=0.3"),
        ("gates=[1", "--set gates: not valid YAML"),
        ("gates.max_klx=1", "--set gates.max_klx: unknown key; did you mean 'max_kl'?"),
        ("gates.max_kl.x=1", "--set gates.max_kl.x: gates.max_kl: found a map, allowed: a number above 0"),
        ("data.evaluation.sampels=3", "--set data.evaluation.sampels: unknown key; did you mean 'samples'?"),
        ("data.evaluation.samples.x=3", "--set data.evaluation.samples.x: data.evaluation.samples: found a map"),
        ("data.evaluation.0=3", "--set data.evaluation.0: unknown key; allowed: source, samples, length"),
        ("a.b.c=1", "--set a.b.c: a: unknown key; allowed: version, model,"),
        ("steps.x.ratio=0.3", "--set steps.x.ratio: steps is a list: found 'x', allowed: an index from 0 to 2"),
        ("steps.-1.ratio=0.3", "--set steps.-1.ratio: steps is a list: found '-1', allowed: an index from 0 to 2"),
        ("steps..ratio=0.3", "--set steps..ratio: steps is a list: found '', allowed: an index from 0 to 2"),
        ("steps.ratio=0.3", "--set steps.ratio: steps is a list: found 'ratio', allowed: an index from 0 to 2"),
        ("steps.0.ratio.x=0.3", "--set steps.0.ratio.x: steps.0.prune.ratio is 0.2, which has no key 'x'"),
        ("steps.0.0=0.3", "--set steps.0.0: unknown key; allowed: ratio,"),
        ("steps.1.x.y=0.3", "--set steps.1.x.y: steps.1.distill.x: unknown key; allowed: loss"),
        ("steps=3", "--set steps: found 3, allowed: a list of steps"),
        ("=3", "--set =3: expected KEY=VALUE"),
        (".=3", "--set .: "),
        ("model=", "--set model: found nothing, expected a value; null leaves the key at its default"),
    ],
)
def test_a_wrong_override_names_itself(override: str, line: str) -> None:
    message = refusal(GOOD, override)
    assert message.startswith(line)
    assert "\n" not in message


def test_dump_is_canonical_and_leaves_defaults_out() -> None:
    said = loads(GOOD + "seed: 0\nevaluate: last\ndata: {calibration: {samples: 64}}\n")
    assert dump(said) == dump(loads(GOOD))
    assert dump(loads(GOOD)) == (
        "model: demo:smollm2-135m\nsteps:\n  - prune:\n      ratio: 0.2\n  - distill: {}\n"
        "  - quantize:\n      format: int8\n"
    )


def test_whatever_is_dumped_loads_to_an_equal_recipe() -> None:
    dice = random.Random(0)
    awkward = [
        "1e-4",
        "yes",
        "null",
        "~",
        "0x1f",
        "12",
        "1:30",
        "2020-01-01",
        "a: b",
        "# x",
        "  pad ",
        "é  '\"",
        "*a",
    ]
    for _ in range(200):
        source, model = dice.choice(awkward), dice.choice(awkward)
        steps = [
            StepEntry(kind="prune", options=PruneOptions(ffn=dice.random(), damping=10.0 ** dice.randint(-9, 6))),
            StepEntry(kind="distill", options=DistillOptions(learning_rate=dice.random() * 1e-5 + 1e-9, batch=2)),
            StepEntry(kind="quantize", options=QuantizeOptions(format=dice.choice(list(FORMATS)))),
        ]
        dice.shuffle(steps)
        recipe = Recipe(
            model=model,
            teacher=dice.choice([None, *awkward]),
            seed=dice.choice([0, 2**32 - 1]),
            data=recipes.DataParts(
                calibration=DataSpec(source=source, samples=dice.choice([None, 64, 3])),
                evaluation=DataSpec(source=source, length=dice.choice([8, 512])),
            ),
            steps=tuple(steps),
            evaluate=dice.choice(["each", "last", "never"]),
            keep_intermediate=dice.choice([True, False]),
            gates=dice.choice([None, recipes.Gates(max_bytes=1), recipes.Gates(max_kl=1e-7, max_parameters=10**12)]),
        )
        assert loads(dump(recipe)) == recipe


def test_the_recipe_of_a_lone_command() -> None:
    data = DataSpec(source="x.txt", samples=4)
    recipe = Recipe.single("distill", "m", DistillOptions(), teacher="t", data=data, seed=3)
    assert recipe.data.training == data
    assert recipe.data.calibration == loads(GOOD).data.calibration
    assert (recipe.evaluate, recipe.teacher, recipe.seed, len(recipe.steps)) == ("never", "t", 3, 1)
    assert loads(dump(recipe)) == recipe


def test_a_step_and_its_options_belong_together() -> None:
    with pytest.raises(ValueError, match="takes PruneOptions"):
        StepEntry(kind="prune", options=DistillOptions())


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loads(GOOD).seed = 1  # type: ignore[misc]


def test_recipes_are_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("demo").steps[0].kind == "prune"  # shipped with the package
    (tmp_path / "recipes").mkdir()
    mine = tmp_path / "recipes" / "demo.yaml"
    mine.write_text(GOOD)
    assert find("demo") == Path("recipes/demo.yaml")  # the user's own goes first
    assert load(mine) == loads(GOOD)
    with pytest.raises(UserError, match=r"recipes/dmeo\.yaml: no such recipe; did you mean recipes/demo\.yaml\?"):
        load("recipes/dmeo.yaml")
    with pytest.raises(UserError, match="a folder, not a recipe"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a model, not a recipe"):
        load(tmp_path)
    (tmp_path / "recipe.yaml").write_text(GOOD)  # a result of ours holds one
    with pytest.raises(UserError, match=r"a folder, not a recipe; did you mean .*recipe\.yaml\?"):
        load(tmp_path)


def test_a_file_that_cannot_be_a_recipe_is_refused(tmp_path: Path) -> None:
    big, binary = tmp_path / "big.yaml", tmp_path / "binary.yaml"
    big.write_text("#" * 100_001)
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="larger than 100 kB"):
        load(big)
    with pytest.raises(UserError, match="not UTF-8"):
        load(binary)
