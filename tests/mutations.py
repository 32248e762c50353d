"""How checkpoints and recipes are damaged for tests/fuzz.py: bits, bytes and digits of files, and a recipe's structure.

Everything is drawn from the `Random` that is given: the same one damages the same way anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml

from compress.data import Part
from compress.recipe_schema import recipe_schema
from compress.steps import STEPS


def damaged(file: Path, dice: random.Random) -> str:
    """Change some bytes of a header or of a JSON file, or cut the file off; what was done, in words."""
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
    kind = dice.choice(["bits", "bits", "bytes", "digit", "digit", "cut"])
    if kind == "cut":
        length = dice.choice([dice.randrange(len(content)), dice.randrange(header)])
        file.write_bytes(content[:length])
        return f"cut to {length} of {len(content)} bytes"
    places = [at for at in range(header) if kind != "digit" or chr(content[at]) in "0123456789"]
    changed = []
    for at in dice.sample(places, dice.choice([1, 1, 1, 2, 4])):
        old = content[at]
        if kind == "bits":
            content[at] ^= 1 << dice.randrange(8)
        else:
            content[at] = dice.choice(b"0123456789") if kind == "digit" else dice.randrange(256)
        changed.append(f"{at}: {old:02x} -> {content[at]:02x}")
    file.write_bytes(content)
    return ", ".join(changed)


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 8, 64, 2**31, 2**62, 10**30, 0.0, 0.5, 0.25, 1.0, -0.5, 1e-9, 1e300, 1e999),
    *("", "x", "0.5", "none", "builtin", "no.txt", "demo:x", "org/none", "a\nb", "é\u2028", "\x00"),
    *("prune", "wanda", "obs", "magnitude", "int8", "bf16", "w8a16", "forward-kl", "each", "never", "last", "9B"),
    *([], {}, [1], {"a": 1}, [[]], [{}], {"source": "builtin"}, {"prune": None}, {"builtin": 1}),
)
KEYS = ("version", "model", "teacher", "seed", "data", "steps", "evaluate", "gates", "keep_intermediate", "calibration")


NOISE = (b"", b":", b"-", b" ", b"\n", b"{", b"]", b"&a", b"*a", b"!!", b"\t", b'"', b"%", b"\xff")


def mutated(recipe: dict[str, Any], dice: random.Random) -> bytes:
    """The recipe with one to three changes of its structure, most of them such as a person might make; a quarter of the
    time with damaged bytes besides."""
    tree = deepcopy(recipe)
    for _ in range(dice.choice([1, 1, 2, 3])):
        (change if dice.random() < 0.4 else nudge)(tree, dice)
    text = bytearray(yaml.safe_dump(tree, sort_keys=dice.random() < 0.2, allow_unicode=True).encode())
    if dice.random() < 0.25 and text:
        for _ in range(dice.choice([1, 1, 2, 5])):
            at = dice.randrange(len(text))
            noise = dice.choice(NOISE)
            text[at : at + dice.choice([0, 1, 1, 3])] = noise or bytes([dice.randrange(256)])
    return bytes(text)


def nudge(tree: dict[str, Any], dice: random.Random) -> None:
    """A key of a step, of the data or of the gates with a value that its schema takes; or a step moved or doubled."""
    schema = recipe_schema()
    steps = tree["steps"] if isinstance(tree.get("steps"), list) else []
    kind = dice.choice(["step", "step", "step", "data", "gates", "top", "order"])
    if kind == "order" and steps:
        steps.insert(dice.randrange(len(steps) + 1), deepcopy(dice.choice(steps)))
        del steps[dice.randrange(len(steps)) if dice.random() < 0.5 else 3 :]
    entry = dice.choice(steps) if kind == "step" and steps else None
    if isinstance(entry, dict) and entry and next(iter(entry)) in STEPS:
        name = next(iter(entry))
        holder, keys = entry[name], schema["$defs"][name]["properties"]
    elif kind == "data" and isinstance(tree.get("data"), dict):
        holder, keys = tree["data"].get(dice.choice(get_args(Part))), schema["$defs"]["DataSpec"]["properties"]
    elif kind == "gates":
        holder, keys = tree.setdefault("gates", {}), schema["$defs"]["Gates"]["properties"]
    else:
        names = ("version", "seed", "evaluate", "keep_intermediate")
        holder, keys = tree, {name: schema["properties"][name] for name in names}
    if isinstance(holder, dict):
        key = dice.choice(list(keys))
        holder[key] = deepcopy(_taken(keys[key], dice))


def _taken(schema: dict[str, Any], dice: random.Random) -> Any:
    """A value that a key takes, near a bound or far from it."""
    kind = dice.choice(schema.get("anyOf", [schema]))
    if "enum" in kind:
        return dice.choice(kind["enum"])
    least = kind.get("minimum", kind.get("exclusiveMinimum", 0))
    numbers = [least, least + 1, kind.get("maximum", kind.get("exclusiveMaximum", 100))]
    values: dict[str, list[Any]] = {
        "boolean": [True, False],
        "integer": [*numbers, 2, 4, 8, 16, 64, 96, 1000, 2**62],
        "number": [*numbers, 0.01, 0.25, 0.5, 0.999, 1e-12, 1e12, 1e300, dice.random()],
        "string": ["builtin", "self", "no.txt", "0.1M", "1e5", "90%", ""],
        "object": [{}, {"builtin": 1.0}, {"builtin": 1.0, "no.txt": 2.0}],
    }
    return dice.choice(values.get(kind.get("type", ""), [None]))


def change(tree: dict[str, Any], dice: random.Random) -> None:
    """One change somewhere in the tree, likely a wrong one."""
    holder, key = dice.choice(list(_places(tree)))
    kind = dice.choice(["value", "number", "drop", "rename", "add", "twice", "wrap"])
    old = holder[key]
    if kind == "number" and isinstance(old, (int, float)):
        holder[key] = dice.choice([old * 2, -old, old + 1, old / 3, float(old)])
    elif kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        name = list(key) or ["x"]
        name[dice.randrange(len(name))] = dice.choice("abcdefgx_ ")
        holder["".join(name)] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder[dice.choice([*KEYS, "ratio", "ffn", "keep_ffn", "params", "samples", "format"])] = deepcopy(
            dice.choice(VALUES)
        )
    elif kind == "twice" and isinstance(holder, list):
        holder.insert(dice.randrange(len(holder) + 1), deepcopy(old))
    elif kind == "wrap":
        holder[key] = dice.choice([[old], {"x": old}])
    else:
        holder[key] = deepcopy(dice.choice(VALUES))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, value in items:
        yield tree, key
        yield from _places(value)


def overrides(dice: random.Random) -> list[str]:
    """Now and then a `--set` of some path to some value."""
    if dice.random() < 0.75:
        return []
    parts = (
        "steps",
        "0",
        "1",
        "-1",
        "prune",
        "ratio",
        "data",
        "evaluation",
        "samples",
        "gates",
        "max_kl",
        "model",
        "x",
        "",
    )
    path = ".".join(dice.choice(parts) for _ in range(dice.choice([1, 2, 3, 3, 4])))
    return [f"{path}{dice.choice(['=', '=', '=', ''])}{dice.choice(['0.5', '8', 'x', '', '{}', '[1', '!!x', 'null'])}"]
