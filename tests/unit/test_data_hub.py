"""Datasets of the hub, with the real client libraries against a hub on localhost: text, pins, refusals, exit codes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from compress.cli import main
from compress.data import hub as sources
from compress.data.hub import parse
from compress.errors import UserError
from compress.machine import Silent
from tests import tiny
from tests.fake_hub import COMMIT, GATED, FakeHub, Files

ROOT = Path(__file__).parent.parent.parent


def table(**columns: list[Any]) -> bytes:
    target = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), target)
    return target.getvalue()


def repository(files: Files, card: str = "---\nlicense: mit\n---\n") -> Files:
    return {".gitattributes": b"", "README.md": card.encode(), **files}


def lines(part: str, count: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {i} of {part}", "id": i}).encode() + b"\n" for i in range(count))


CONFIGS = """---
configs:
- config_name: first
  data_files: first.jsonl
- config_name: second
  data_files: second.jsonl
---
"""
CONFIG_OF = {"org/configs/second": "second", "legacy/first": "first", f"legacy@{COMMIT}/second": "second"}
MESSAGES = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]] * 3
REPOSITORIES: dict[str, Files] = {
    "org/lines": repository({"train.jsonl": lines("train", 400), "test.jsonl": lines("test", 50)}),
    "org/configs": repository({"first.jsonl": lines("first", 5), "second.jsonl": lines("second", 5)}, CONFIGS),
    "org/titles": repository({"train.parquet": table(id=[1, 2, 3], title=["one", None, "three"])}),
    "org/two": repository({"train.parquet": table(question=["q"], answer=["a"], id=[1])}),
    "org/numbers": repository({"train.parquet": table(id=[1, 2])}),
    "org/chats": repository({"train.parquet": table(messages=MESSAGES)}),
    "org/nothing": repository({"paper.pdf": b"%PDF"}),
    "org/script": repository({"script.py": b"raise SystemExit('code was run')", "train.jsonl": lines("train", 5)}),
    "org/hidden": repository({"train.jsonl": lines("train", 5)}),
    GATED: repository({"train.jsonl": lines("train", 5)}),
}
# the commits of the sources given, and whether more was imported than that takes
COMMITS = """
import json, sys
from compress.data import DataSpec, commits
spec = DataSpec(source=dict.fromkeys(sys.argv[1:], 1.0), samples=9)
found = commits(spec)
assert commits(spec) == found
print(json.dumps([found, sorted({"torch", "transformers", "datasets"} & set(sys.modules))]))
"""
# every call of `check` and `documents` that a test looks at, in one process: importing the libraries takes seconds
DRIVER = """
import contextlib, io, json, sys
from compress.cli import main
from compress.data import DataSpec, check
from compress.data import hub
from compress.data.sources import read
from compress.errors import CompressError
from compress.machine import Silent

if sys.argv[1] == "stream":
    hub.WHOLE = 150  # bytes
found = {}
for line in sys.stdin.read().split():
    source, limit = line.split("|")
    try:
        check(DataSpec(source=source, length=8, samples=1), "training")
        text = read(source, "training", int(limit) if limit else None, Silent())
        said = [d if isinstance(d, str) else d.messages for d in text.documents]
        found[line] = {"documents": said, "commit": text.revision, "whole": text.whole}
    except CompressError as error:
        found[line] = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
for recipe in sys.argv[2:]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found[recipe] = {"code": main(["plan", recipe]), "stderr": said.getvalue()}
print(json.dumps(found))
"""


def process(url: str, home: Path, code: str, *arguments: str, stdin: str = "", offline: bool = False) -> Any:
    """The JSON that `code` prints in a process of its own, with the hub at `url` and its caches in `home`."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, cwd=home, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a library spoke between our lines"
    return json.loads(done.stdout)


def asked(
    url: str, home: Path, sources: list[str], *plans: str, offline: bool = False, how: str = "whole"
) -> dict[str, Any]:
    """What DRIVER found for `sources`, each `hub:...` or `hub:...|BYTES`, and for the recipe files `plans`."""
    stdin = "\n".join(source if "|" in source else f"{source}|" for source in sources)
    found = process(url, home, DRIVER, how, *plans, stdin=stdin, offline=offline)
    return {key.removesuffix("|"): value for key, value in found.items()}


REFUSED = {
    "hub:org/gone:train": ("UserError", "not found on the hub"),
    "hub:org/lines@v2:train": ("UserError", "the hub has no revision 'v2' of it"),
    "hub:org/lines/odd:train": ("UserError", "'odd' not found"),
    "hub:org/lines:valid": ("UserError", "valid"),
    "hub:org/configs:train": ("UserError", "['first', 'second']"),
    "hub:org/two:train": ("UserError", "2 columns of strings; columns: question, answer, id"),
    "hub:org/numbers:train": ("UserError", "no column of strings; columns: id"),
    "hub:org/nothing:train": ("UserError", "hub:org/nothing:train: "),
    "hub:org/script:train": ("UserError", "Dataset scripts are no longer supported"),
    f"hub:{GATED}:train": ("UserError", "gated on the hub"),
    "hub:..:train": ("UserError", "not a hub id"),
    "hub:org/hidden:train": ("UserError", "'org/hidden' stands in the current directory"),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub(REPOSITORIES, {"legacy": "org/configs"}) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches that the online test fills and the offline test reads; a recipe on a dataset that is not there."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny.llama(folder / "model")
    for name, share in (("r.yaml", 0.5), ("wrong.yaml", 0.001)):
        steps = f"steps: [prune: {{ffn: {share}}}]\ndata: {{calibration: hub:org/gone:train}}\n"
        (folder / name).write_text(f"model: {model}\nevaluate: never\n{steps}")
    (folder / "org" / "hidden").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def online(hub: FakeHub, home: Path) -> dict[str, Any]:
    good = ["hub:org/lines:train", "hub:org/lines:train|100", "hub:org/lines@v1:test", "hub:org/titles:train"]
    good += ["hub:org/chats:train", *(f"hub:{name}:train" for name in CONFIG_OF)]
    return asked(hub.url, home, [*good, *REFUSED], str(home / "r.yaml"))


def test_the_text_of_a_split_comes_in_its_order_and_with_its_commit(online: dict[str, Any]) -> None:
    train = [f"document {i} of train" for i in range(400)]
    assert online["hub:org/lines:train"] == {"documents": train, "commit": COMMIT, "whole": True}
    assert online["hub:org/lines@v1:test"]["documents"] == [f"document {i} of test" for i in range(50)]
    some = online["hub:org/lines:train|100"]
    assert (some["documents"], some["whole"]) == (train[:6], False)  # the sixth document reaches 100 bytes
    assert online["hub:org/titles:train"]["documents"] == ["one", "three"]
    assert online["hub:org/chats:train"]["documents"] == MESSAGES


def test_a_name_with_one_slash_is_a_repository_or_else_a_config(online: dict[str, Any]) -> None:
    for name, config in CONFIG_OF.items():
        assert online[f"hub:{name}:train"]["documents"] == [f"document {i} of {config}" for i in range(5)]


@pytest.mark.parametrize("source", REFUSED)
def test_what_the_hub_does_not_have_is_one_line(online: dict[str, Any], source: str) -> None:
    kind, said = REFUSED[source]
    assert online[source]["error"] == kind
    assert online[source]["message"].startswith(source) and said in online[source]["message"]
    assert "\n" not in online[source]["message"] and "Traceback" not in online[source]["message"]


def test_a_large_dataset_is_streamed_and_gives_the_same_text(
    hub: FakeHub, online: dict[str, Any], tmp_path: Path
) -> None:
    sources = ["hub:org/lines:train|100", "hub:org/titles:train|4", "hub:org/lines:train"]
    found = asked(hub.url, tmp_path, sources, how="stream")
    assert found[sources[0]] == online[sources[0]]
    assert found[sources[1]]["documents"] == ["one", "three"]
    assert not list(tmp_path.glob("datasets/**/*.arrow")), "what is streamed is not prepared on disk"
    assert "more than 1 GiB of text" in found[sources[2]]["message"] and found[sources[2]]["hint"]


def test_offline_the_cache_gives_the_same_text_and_the_rest_is_refused(
    hub: FakeHub, home: Path, online: dict[str, Any]
) -> None:
    before = len(hub.asked)
    cached = ["hub:org/lines:train", "hub:org/lines@v1:test", "hub:org/configs/second:train"]
    gone = ["hub:org/gone:train", "hub:org/lines@v2:train", f"hub:{GATED}:train"]
    for name, revision, commit in (("lines", "next", "f" * 40), ("half", "main", COMMIT)):  # known, but not fetched
        cache = home / "hub" / f"datasets--org--{name}"
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        gone.append(f"hub:org/{name}@{revision}:train")
    found = asked(hub.url, home, [*cached, *gone], offline=True)
    assert len(hub.asked) == before, "offline, and yet it asked"
    for source in cached:
        assert found[source] == online[source]
    for source in gone:
        assert found[source]["error"] == "UserError"
        assert "HF_HUB_OFFLINE forbids to fetch it" in found[source]["message"]
    assert f"the cache of datasets holds commit {COMMIT[:12]}, not ffffffffffff" in found[gone[3]]["message"]


def test_commits_are_told_without_the_data_and_asked_for_once(hub: FakeHub, tmp_path: Path) -> None:
    known = ["hub:legacy/first:train", "hub:org/lines@v1:train", "hub:org/lines:train"]
    before = len(hub.asked)
    told = dict.fromkeys(known, COMMIT)
    assert process(hub.url, tmp_path, COMMITS, "builtin", *known) == [told, []]
    online, named = hub.asked[before:], {path.rsplit("/", 1)[-1] for path in hub.asked[before:]}
    assert named & {"README.md", ".gitattributes"} and not any(".json" in path for path in online), online
    assert online.count("/api/datasets/org/lines/revision/main") <= 1, "asked for twice in one process"
    offline = process(hub.url, tmp_path, COMMITS, "hub:org/lines:train", "hub:org/titles:train", offline=True)
    assert offline == [{"hub:org/lines:train": COMMIT, "hub:org/titles:train": None}, []]
    assert len(hub.asked) == before + len(online), "offline, and yet it asked"


def test_exit_codes_not_found_is_2_and_no_network_is_4(online: dict[str, Any], home: Path, tmp_path: Path) -> None:
    recipe = str(home / "r.yaml")
    missing = online[recipe]
    assert missing["code"] == 2
    assert missing["stderr"].splitlines()[0].endswith("data.calibration: hub:org/gone:train: not found on the hub")
    wrong = str(home / "wrong.yaml")
    away = asked("http://127.0.0.1:9", tmp_path, ["hub:org/lines:train"], recipe, wrong)
    assert away[recipe] == {
        "code": 4,
        "stderr": "error: hub:org/gone:train: the hub cannot be reached (ConnectError)\n",
    }
    assert away["hub:org/lines:train"]["error"] == "MachineError"
    assert away[wrong]["code"] == 2 and "removes nothing" in away[wrong]["stderr"], "the user's mistake is told first"


def test_prune_records_the_digest_of_the_text_and_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`datasets` and all of ours are real here; only where the table comes from is not."""
    texts = [f"document {i} of a table" for i in range(50)]
    monkeypatch.setattr(sources, "_pinned", lambda dataset: (*dataset.choices[0], COMMIT))
    features = datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    table = datasets.Dataset.from_dict({"text": texts, "image": [{"bytes": b"no image"}] * 50}, features)
    monkeypatch.setattr(sources, "_table", lambda *given: table)
    model, out = tiny.llama(tmp_path / "model"), tmp_path / "out"
    options = ["--ffn", "0.5", "--samples", "3", "--length", "32", "--threads", "1", "--data", "hub:org/lines:test"]
    assert main(["prune", str(model), "-o", str(out), *options]) == 0
    assert f"from hub:org/lines:test at {COMMIT[:12]} (" in capsys.readouterr().err
    step = json.loads((out / "receipt.json").read_text())["steps"][0]
    assert step["calibration"]["revisions"] == {"hub:org/lines:test": COMMIT}
    assert step["calibration"]["digest"] == hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_a_bug_is_not_the_datasets_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """RuntimeErrors are refusals only where they speak of a dataset's scripts."""
    monkeypatch.setattr(sources, "_pinned", lambda dataset: (*dataset.choices[0], COMMIT))

    def broken(*given: object) -> None:
        raise RuntimeError("generator raised StopIteration")

    monkeypatch.setattr(sources, "_table", broken)
    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        sources.of_hub("hub:org/lines:train", None, Silent())


@pytest.mark.parametrize(
    "source", ["hub:", "hub:a", "hub:a/b/c/d:train", "hub:a:train[:10]", "hub:a@b@c:train", "hub:a:"]
)
def test_another_grammar_is_refused_with_the_right_one(source: str) -> None:
    with pytest.raises(UserError, match=r"expected hub:NAME\[@REVISION\]\[/CONFIG\]:SPLIT") as caught:
        parse(source)
    assert source in caught.value.message
