"""Who may import whom, and who never imports torch: read from every file of the package, and tried in a process.

`LAYERS` is the table of docs/architecture.md: a part (a module or a folder of compress/) imports parts of lower
layers only, never one of its own layer. Imports inside functions and for type checkers count as well.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import compress

PACKAGE = Path(compress.__file__).parent
ROOT = PACKAGE.parent

LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("api", "report"),
    ("run", "analysis"),
    ("resume", "prepare"),
    ("receipt",),
    ("plan", "check", "card", "inspect", "output", "recipe_schema", "sensitivity"),
    ("needs",),
    ("recipe",),
    ("trace",),
    ("steps",),
    ("criteria", "losses", "formats"),
    ("stream", "eliminate"),
    ("solve",),
    ("complaints", "data", "arch", "curves"),
    ("checkpoint", "recipe_yaml", "signatures"),
    ("device", "progress"),
    ("errors", "limits", "machine", "numbers"),
)
# What imports a module by a name that only a variable holds, and why that may be.
COMPUTED = {
    "compress": "the public functions, when they are first used",
    "compress.arch": "compress.trace, for a model_type that nobody described: it proves families, so it stands above",
    "compress.sensitivity": "packages of the extra `notebook`",
}
RANK = {part: rank for rank, layer in enumerate(reversed(LAYERS)) for part in layer}

# What imports one of LIBRARIES, itself or through another module of this list, when it is imported. No other module
# does: help, inspect and plan answer without torch.
HEAVY = {
    "compress.analysis",
    "compress.check",
    "compress.checkpoint.gguf",
    "compress.checkpoint.reader",
    "compress.checkpoint.writer",
    "compress.criteria.magnitude",
    "compress.criteria.obs",
    "compress.criteria.random",
    "compress.eliminate",
    "compress.formats.packing",
    "compress.losses.forward_kl",
    "compress.resume",
    "compress.run",
    "compress.sensitivity.figures",
    "compress.sensitivity.measure",
    "compress.sensitivity.plots",
    "compress.solve",
    "compress.steps.distill.run",
    "compress.steps.distill.saved",
    "compress.steps.distill.trainer",
    "compress.steps.evaluate.run",
    "compress.steps.prune.coupled",
    "compress.steps.prune.depth",
    "compress.steps.prune.gauss_newton",
    "compress.steps.prune.gradients",
    "compress.steps.prune.inputs",
    "compress.steps.prune.joint",
    "compress.steps.prune.kv",
    "compress.steps.prune.propagation",
    "compress.steps.prune.run",
    "compress.steps.prune.scores",
    "compress.steps.prune.surgery",
    "compress.steps.prune.vision",
    "compress.steps.prune.vision_depth",
    "compress.steps.prune.weights",
    "compress.steps.quantize.run",
    "compress.stream.arranged",
    "compress.stream.backward",
    "compress.stream.calls",
    "compress.stream.fed",
    "compress.stream.forward",
    "compress.stream.loss",
    "compress.stream.shown",
    "compress.stream.statistics",
    "compress.stream.stock",
    "compress.trace.family",
    "compress.trace.find",
    "compress.trace.prove",
    "compress.trace.small",
    "compress.stream.tape",
    "compress.stream.vision",
}
LIBRARIES = {"torch", "transformers", "accelerate", "bitsandbytes", "datasets", "matplotlib", "pandas"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@dataclass(frozen=True)
class Import:
    """One import: the module it names, its line, and whether it happens when the file is imported."""

    target: str
    line: int
    at_once: bool


@cache
def imports(source: str) -> tuple[Import, ...]:
    """All imports in `source`, those in functions and under TYPE_CHECKING included, and literal `import_module`s."""
    tree = ast.parse(source)
    at_once = set(_at_once(tree))
    return tuple(
        Import(target, node.lineno, node in at_once)  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        for target in _targets(node)
    )


def _at_once(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_once(node)


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        module = str(node.module)
        full = [f"{module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else module for name in full]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        argument = node.args[0]
        if isinstance(argument, ast.JoinedStr):
            argument = argument.values[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return [argument.value.rstrip(".")]
        return [f"? {ast.unparse(argument)}"]
    return []


def part(module: str) -> str:
    """`compress.steps.prune.run` -> `steps`; the package itself is `compress`."""
    return module.split(".")[1] if "." in module else module


def step_of(module: str) -> str | None:
    """The step that a module belongs to: `compress.steps.prune.run` -> `prune`."""
    parts = module.split(".")
    is_step = parts[:2] == ["compress", "steps"] and len(parts) > 2 and parts[2] != "types"
    return parts[2] if is_step else None


def violations(module: str, source: str) -> list[str]:
    """What `source`, as the file of `module`, imports against the rules."""
    found = []
    for item in imports(source):
        if item.target.startswith("?") and module not in COMPUTED:
            found.append(f"{module}:{item.line}: imports by a computed name, {item.target}")
        if item.target.split(".")[0] != "compress" or part(item.target) == part(module) != "steps":
            continue
        if item.target == "compress":
            if module != "compress.cli":  # --version
                found.append(f"{module}:{item.line}: imports the package itself, whose functions stand above it")
        elif part(item.target) != part(module):
            if RANK[part(item.target)] >= RANK[part(module)]:
                found.append(f"{module}:{item.line}: {part(module)} imports {item.target}, which is no lower layer")
        elif module == "compress.steps":
            if item.target.endswith(".run") and item.at_once:
                found.append(f"{module}:{item.line}: imports a step's work at once, {item.target}")
        elif item.target == "compress.steps":
            found.append(f"{module}:{item.line}: a step imports the table of steps")
        elif step_of(item.target) not in (None, step_of(module)):
            found.append(f"{module}:{item.line}: imports another step, {item.target}")
    return found


def test_the_table_names_every_part_of_the_package() -> None:
    assert sorted(RANK) == sorted({part(module) for module in MODULES} - {"compress"})


def test_the_table_is_that_of_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = page.split("## Who may import whom", 1)[1].split("```", 2)[1]
    shown = tuple(tuple(line.split("#")[0].split()) for line in block.strip().splitlines())
    assert shown == LAYERS


@pytest.mark.parametrize("module", [name for name in MODULES if name != "compress"])
def test_imports_point_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_the_package_itself_imports_its_public_functions_only_when_they_are_used() -> None:
    found = [i for i in imports(MODULES["compress"].read_text(encoding="utf-8")) if i.target.startswith("compress")]
    assert not {part(i.target) for i in found} & {"commands", "cli", "__main__"}
    assert len(found) > 3 and not any(i.at_once for i in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("compress.errors", "from compress.run import run"),
        ("compress.checkpoint.reader", "def f():\n    from compress.data import windows"),
        ("compress.data", "from compress import arch"),
        ("compress.stream.forward", "if TYPE_CHECKING:\n    from compress.formats import Format"),
        ("compress.formats.plain", "import compress.losses"),
        ("compress.criteria.obs", "from compress.formats.plain import PLAIN"),
        ("compress.steps.prune.run", "from compress.steps.distill.options import DistillOptions"),
        ("compress.steps.prune.run", "import_module('compress.steps.quantize.run')"),
        ("compress.steps.types", "from compress.steps.prune.options import PruneOptions"),
        ("compress.steps.prune.plan", "from compress.steps import STEPS"),
        ("compress.steps.prune.plan", "from compress.recipe import Recipe"),
        ("compress.steps", "from compress.steps.prune.run import run"),
        ("compress.run", "from compress.commands.options import parse_size"),
        ("compress.api", "from compress.report import Screen"),
        ("compress.report", "from compress.cli import main"),
        ("compress.recipe", "import compress"),
        ("compress.plan", "import_module(name)"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def heavy(module: str, seen: set[str]) -> bool:
    """Whether importing `module` imports one of LIBRARIES, by the imports that files do at once."""
    if module.split(".")[0] in LIBRARIES or module == "safetensors.torch":
        return True
    if module not in MODULES or module in seen:
        return False
    seen.add(module)
    parent = module.rpartition(".")[0]
    targets = [i.target for i in imports(MODULES[module].read_text(encoding="utf-8")) if i.at_once]
    return any([heavy(target, seen) for target in (*targets, *([parent] if parent else []))])


def test_what_imports_torch_is_what_the_list_says() -> None:
    assert {module for module in MODULES if heavy(module, set())} == HEAVY


def test_no_other_module_imports_torch() -> None:
    code = (
        "import sys; from importlib import import_module\n"
        "heavy = set(sys.argv[1].split(','))\n"
        "for name in sys.argv[2:]:\n"
        "    import_module(name)\n"
        "    found = heavy & set(sys.modules)\n"
        "    assert not found, f'{name} imports {found}'\n"
        "print(len(sys.argv) - 2)\n"
    )
    light = [name for name in MODULES if name not in HEAVY and name != "compress.__main__"]
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(sorted(LIBRARIES)), *light],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(light) > 40
