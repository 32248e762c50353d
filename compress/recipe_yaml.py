"""YAML text -> a tree that remembers where every value stands, and `--set` overrides on that tree. Torch-free.

The core schema of YAML 1.2 (so `1e-4` is a number and `no` is text), without what a recipe never needs and what bites:
aliases, tags that build objects, repeated keys, numbers that are not finite, control characters, files above 100 kB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.errors import UserError

MAX_BYTES = 100_000
MAX_VALUES = 1000  # of a recipe: more are a file of another kind, and a list of complaints that nobody reads
MAX_KEY = 1000  # characters: a key may be a path
MAX_WHOLE = 2**63  # bound of whole numbers: larger ones overflow whatever they are multiplied with
# what would break a line of output in two, or cannot be written: C0 and C1, line and paragraph separators, surrogates
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"), list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute; filled just below

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark: Any = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or 1.2 would not read as text."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        del indentless  # list items stand one level in, under their key
        super().increase_indent(flow, False)


_PATTERNS = {name: pattern for name, pattern, _ in _CORE}
for _name, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass
class Entry:
    """A value and where it stands: `file:line`, or `--set KEY`. Maps and lists hold entries."""

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def at(self, path: Iterable[str | int]) -> Entry:
        """The deepest entry on `path` that exists: where a problem with that path is shown."""
        here = self
        for part in path:
            items = dict(enumerate(here.value)) if isinstance(here.value, list) else here.value
            if not isinstance(items, dict) or part not in items:
                break
            here = items[part]
        return here


@dataclass
class Problems:
    """Everything wrong with one recipe, raised as one UserError, in the order of the file."""

    source: str
    lines: list[tuple[str, str]] = field(default_factory=list)  # (where, what)
    overridden: dict[tuple[str | int, ...], str] = field(default_factory=dict)
    _told: set[tuple[str | int, ...]] = field(default_factory=set)

    def add(self, where: str, path: Sequence[str | int], text: str) -> None:
        """One line, the first one about a path; a path that `--set` named itself is not said twice."""
        key = tuple(path)
        if key and key in self._told:
            return
        self._told.add(key)
        shown = "" if key in self.overridden else ".".join(map(str, path))
        self.lines.append((where, f"{shown}: {text}" if shown else text))

    def raise_any(self) -> None:
        def line(problem: tuple[str, str]) -> int:
            number = problem[0].removeprefix(f"{self.source}:")
            return int(number) if number.isdecimal() else MAX_BYTES  # overrides come after the file

        lines = [f"{where}: {what}" for where, what in sorted(self.lines, key=line)]
        if len(lines) == 1:
            raise UserError(lines[0])
        if lines:
            raise UserError("\n".join([f"{self.source}: {len(lines)} problems", *lines]))


def show(value: Any) -> str:
    """A value as an error message names it."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a map"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # Python writes no more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def read_text(path: Path) -> str:
    """The file's text; a UserError for a folder, a file above 100 kB, or bytes that are not UTF-8."""
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: larger than 100 kB, which no recipe is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse(text: str, source: str, problems: Problems, *, lines: bool = True) -> Entry | None:
    """The tree of `text`; None after a problem. `lines`: places are `source:line`, else just `source`."""

    def place(mark: yaml.Mark | None) -> str:
        return f"{source}:{mark.line + 1}" if lines and mark is not None else source

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is None:
            return Entry(None, place(None))
        if _count(node) > MAX_VALUES:
            problems.add(source, (), f"more than {MAX_VALUES} values, which no recipe has")
            return None
        return _entry(node, place, place(node.start_mark), problems, ())
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        problems.add(place(error.problem_mark or error.context_mark), (), f"not valid YAML: {what}")
    except yaml.YAMLError as error:
        problems.add(source, (), f"not valid YAML: {' '.join(str(error).split())}")
    except (ValueError, OverflowError) as error:  # PyYAML's own int() and chr() of what an escape or a version says
        problems.add(source, (), f"not valid YAML: {error}")
    except RecursionError:
        problems.add(source, (), "nested too deeply")
    return None


def _count(node: yaml.Node) -> int:
    """Keys and values in the tree."""
    if isinstance(node, yaml.MappingNode):
        return sum(1 + _count(value) for _, value in node.value)
    return sum(map(_count, node.value)) if isinstance(node, yaml.SequenceNode) else 1


def _entry(node: yaml.Node, place: Any, where: str, problems: Problems, path: tuple[str | int, ...]) -> Entry:
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        found: dict[str, Entry] = {}
        for key, value in node.value:
            line = place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                problems.add(line, path, "a key must be text, found a map or a list")
            elif len(key.value) > MAX_KEY or CONTROL.search(key.value):
                problems.add(line, path, f"unknown key {show(key.value)}")
            elif key.value in found:
                problems.add(line, (*path, key.value), f"repeated key, it stands at {found[key.value].where} as well")
            else:
                found[key.value] = _entry(value, place, line, problems, (*path, key.value))
        return Entry(found, where)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        items = enumerate(node.value)
        return Entry([_entry(v, place, place(v.start_mark), problems, (*path, i)) for i, v in items], where)
    return Entry(_scalar(node, where, problems, path), where)


def _scalar(node: yaml.Node, where: str, problems: Problems, path: tuple[str | int, ...]) -> Any:
    """Text, a number, true, false or None; None as well after a problem."""
    kind = node.tag.removeprefix(_TAG)
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", *_PATTERNS):
        problems.add(where, path, f"the tag {node.tag} is not allowed")
        return None
    text = node.value
    if kind == "str":
        found = CONTROL.search(text)
        if found is None:
            return text
        problems.add(where, path, f"found {show(text)}, which holds the control character {found[0]!r}")
    elif not _PATTERNS[kind].match(text):
        problems.add(where, path, f"found {show(text)}, which is no {kind}")
    elif kind == "bool":
        return text.lower() == "true"
    elif kind == "int" and len(text) < 100 and abs(int(text)) < MAX_WHOLE:
        return int(text)
    elif kind == "float" and math.isfinite(float(text)):
        return float(text)
    elif kind != "null":
        problems.add(where, path, f"found {show(text)}, which is beyond all numbers that are read")
    return None


def override(tree: Entry, overrides: Sequence[str], steps: Iterable[str], problems: Problems) -> None:
    """Set every `KEY=VALUE` in the tree. `steps.0.ratio` addresses the options of step 0, whatever its kind."""
    for given in overrides:
        key, equals, text = given.partition("=")
        where = f"--set {key.strip()}"
        if not equals or not key.strip():
            problems.add(f"--set {given}", (), "expected KEY=VALUE, as in steps.0.ratio=0.3")
            continue
        if not text.strip():
            problems.add(where, (), "found nothing, expected a value; null leaves the key at its default")
            continue
        value = parse(text, where, problems, lines=False)
        if value is None:
            continue
        try:
            path = _assign(tree, key.strip().split("."), value, set(steps))
        except LookupError as error:
            problems.add(where, (), str(error.args[0]))
        else:
            problems.overridden[path] = where


def _assign(tree: Entry, parts: Sequence[str], value: Entry, steps: set[str]) -> tuple[str | int, ...]:
    """Put `value` at `parts` and return its real path; maps on the way are made, list items must exist."""
    here, path = tree, list[str | int]()
    for part in parts:
        keys = [part]
        if len(path) == 2 and path[0] == "steps":
            kind = _kind(here, path)
            if part in steps and part != kind:
                raise LookupError(f"step {path[1]} is '{kind}', not '{part}'")
            keys = [kind] if part == kind else [kind, part]
        for key in keys:
            here = _enter(here, key, path, value.where)
    here.value, here.where = value.value, value.where
    return tuple(path)


def _enter(here: Entry, key: str, path: list[str | int], where: str) -> Entry:
    """The entry under `key`, made if a map lacks it; `path` grows by the key."""
    if isinstance(here.value, list):
        index = _index(key, here.value, path)
        path.append(index)
        item: Entry = here.value[index]
        return item
    if len(path) == 2 and path[0] == "data" and isinstance(here.value, str):
        here.value = {"source": Entry(here.value, here.where)}  # the one-word form of a data source
    if here.value is None:
        here.value = {}
    if not isinstance(here.value, dict):
        raise LookupError(f"{'.'.join(map(str, path))} is {show(here.value)}, which has no key '{key}'")
    path.append(key)
    entry: Entry = here.value.setdefault(key, Entry(None, where))
    return entry


def _kind(step: Entry, path: Sequence[str | int]) -> str:
    if not isinstance(step.value, dict) or len(step.value) != 1:
        raise LookupError(f"{'.'.join(map(str, path))} is not a step: expected one key, prune, distill or quantize")
    return str(next(iter(step.value)))


def _index(part: str, items: Sequence[Entry], path: Sequence[str | int]) -> int:
    where = ".".join(map(str, path)) or "the recipe"
    if not items:
        raise LookupError(f"{where} is empty, found the index '{part}'")
    if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(items):
        raise LookupError(f"{where} is a list: found '{part}', allowed: an index from 0 to {len(items) - 1}")
    return int(part)


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Block style, the order given, one line a value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False)
