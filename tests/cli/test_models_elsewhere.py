"""A GGUF that is no llama, a hub without the model, no network: each is one line with its exit code, OUT absent."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import cli
from tests.fake_hub import serving
from tests.unit.test_gguf import other_architecture

ROOT = Path(cli.__file__).parent.parent
NOBODY = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


class Empty(http.server.BaseHTTPRequestHandler):
    """A hub without repositories."""

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(Empty) as url:
        yield url


def refused(folder: Path, arguments: list[str], endpoint: str = NOBODY, offline: bool = False) -> tuple[int, str]:
    """Exit code and error line of a process of its own: the hub's library reads its settings when it is imported."""
    before = sorted(folder.rglob("*"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HOME": str(folder.with_name("home")),
        "AUTOGLM_COMPRESS_CACHE": str(folder.with_name("cache")),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-m", "compress", *arguments, "-q"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    error, *rest = done.stderr.splitlines()
    assert done.stdout == "" and all(line.startswith("hint: ") for line in rest) and len(rest) <= 1, done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.returncode, error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    return made


def test_a_gguf_that_is_no_llama(folder: Path) -> None:
    other_architecture(folder / "other.gguf")
    code, line = refused(folder, ["quantize", "other.gguf", "-o", "out", "--format", "int8"])
    assert code == 2
    assert "other.gguf: GGUF of the architecture 'qwen2'; only dense 'llama' files are read" in line


def test_a_hub_that_has_no_such_model(folder: Path, hub: str) -> None:
    code, line = refused(folder, ["run", "demo", "-o", "out", "--set", "model=org/absent"], hub)
    assert code == 2
    assert line.startswith("error: ") and "org/absent: not found, neither as a folder here nor on the hub" in line


def test_no_network(folder: Path) -> None:
    code, line = refused(folder, ["prune", "org/model", "-o", "out", "--ratio", "0.2"])
    assert code == 4
    assert line.startswith("error: org/model: no folder here, and the hub cannot be reached (ConnectError)")


@pytest.mark.parametrize(
    ("model", "offline", "code", "line"),
    [
        ("models/x", False, 4, "models/x: no folder here, and the hub cannot be reached (ConnectError)"),
        ("models/x", True, 2, "models/x: no folder here, and not complete in the hub's cache; HF_HUB_OFFLINE forbids"),
        ("models/deep/x", False, 2, "models/deep/x: no such folder"),
        ("./models/x", False, 2, "./models/x: no such folder"),
        ("here/x", False, 2, "here/x: no such folder, and not looked for on the hub, because here is a folder here"),
    ],
)
def test_what_may_be_a_path_or_a_hub_id(folder: Path, model: str, offline: bool, code: int, line: str) -> None:
    (folder / "here").mkdir()
    found, said = refused(folder, ["inspect", model], offline=offline)
    assert (found, said[: len(line) + 7]) == (code, f"error: {line}")


def test_a_wrong_recipe_is_told_before_the_network(folder: Path) -> None:
    code, line = refused(folder, ["run", "demo", "--set", "model=org/model", "--set", "steps.0.ratoi=0.3"])
    assert (code, line) == (2, "error: --set steps.0.ratoi: unknown key; did you mean 'ratio'?")
