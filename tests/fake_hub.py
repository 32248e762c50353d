"""A Hugging Face hub for datasets on localhost: what huggingface_hub and `datasets` ask of it, and nothing else.

`with FakeHub(repositories, moved) as hub:` serves {name: {path: bytes}} at `hub.url`, every repository at the branch
`main`, the tag `v1` and the commit COMMIT; `moved` are old names. `hub.asked` lists the paths that were asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)
GATED = "org/gated"

Files = Mapping[str, bytes]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on localhost, while it is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class FakeHub:
    """Serves from its first `with` line to its last."""

    def __init__(self, repositories: Mapping[str, Files], moved: Mapping[str, str] | None = None) -> None:
        self.repositories, self.moved, self.asked = repositories, moved or {}, list[str]()
        self._open = ExitStack()

    def __enter__(self) -> FakeHub:
        self.url = self._open.enter_context(serving(self._handler()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

            def do_GET(self) -> None:
                self._answer({})

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
                self._answer(form)

            def _answer(self, form: Mapping[str, Any]) -> None:
                path = unquote(self.path.split("?")[0])
                hub.asked.append(path)
                code, body, headers = hub.answer(path, form, self.headers.get("Range"))
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        return Handler

    def answer(self, path: str, form: Mapping[str, Any], part: str | None) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        found = re.fullmatch(
            r"(?:/api)?/datasets/([\w.-]+(?:/[\w.-]+)??)(?:/(revision|tree|paths-info|resolve)/([^/]+)/?(.*))?", path
        )
        name = None if found is None else self.moved.get(found[1], found[1])
        if found is None or name not in self.repositories:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        what, revision, file = found[2] or "revision", found[3] or "main", found[4]
        if name == GATED:
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        if revision not in REVISIONS:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        files = self.repositories[name]
        if what == "resolve":
            return self._file(files, file, part)
        listed = [
            {"type": "file", "path": key, "size": len(value), "oid": hashlib.sha1(value).hexdigest()}
            for key, value in files.items()
            if what != "paths-info" or key in form["paths"]
        ]
        siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in listed]
        info = {"id": name, "sha": COMMIT, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        said = info if what == "revision" else listed
        return 200, json.dumps(said).encode(), {"Content-Type": "application/json"}

    @staticmethod
    def _file(files: Files, name: str, part: str | None) -> tuple[int, bytes, dict[str, str]]:
        if name not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        body = files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        if part is None:
            return 200, body, headers
        first, last = part.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(body)), len(body) - 1)
        return 206, body[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}
