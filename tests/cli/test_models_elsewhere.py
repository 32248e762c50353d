"""A GGUF that is no llama, a hub without the model, no network: each is one line with its exit code, OUT absent."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from compress import cli

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
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
    writer = gguf.GGUFWriter(folder / "other.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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


def test_a_wrong_recipe_is_told_before_the_network(folder: Path) -> None:
    code, line = refused(folder, ["run", "demo", "--set", "model=org/model", "--set", "steps.0.ratoi=0.3"])
    assert (code, line) == (2, "error: --set steps.0.ratoi: unknown key; did you mean 'ratio'?")
