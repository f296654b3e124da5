"""Exports on the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.support.exports import (
    BATCH,
    grouped,
)
from tests.support.project import Project

OLD = ["data/train-00000.parquet", "data/train-00007.parquet", "notes.txt"]
"""Files of a data set that is there."""


class Hub:
    """What of the hub's API an upload of small files takes."""

    def __init__(self, private: bool | None, refuses: bool):
        self.private, self.refuses = private, refuses
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.tokens: set[str | None] = set()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            url = {"url": f"{constants.ENDPOINT}/datasets/me/pairs", "id": "me/pairs", "name": "me/pairs"}
            if self.private is not None:
                return 409, {**url, "error": "You already created this dataset repo"}
            self.private = self.created[-1].get("visibility") == "private"
            return 200, url
        if path == "/api/datasets/me/pairs/settings":
            assert self.files, "it is public only once it is whole"
            self.private = json.loads(body)["visibility"] == "private"
            return 200, {}
        if method == "GET" and "/tree/" in path:
            return 200, [{"type": "file", "path": old, "oid": "0" * 40, "size": 1} for old in OLD]
        if method == "GET" and path.startswith("/api/datasets/me/pairs"):
            return 200, {"id": "me/pairs", "private": self.private, "sha": "0" * 40, "siblings": [], "tags": [],
                         "downloads": 0, "likes": 0, "disabled": False, "gated": False}  # fmt: skip
        if path == "/api/validate-yaml":  # the card's facts, which the hub's client sends before the card
            return 200, {"errors": [], "warnings": []}
        if path == "/api/datasets/me/pairs/preupload/main":
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for file in files]}  # fmt: skip
        if path.startswith("/api/datasets/me/pairs/commit/main"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                if item["key"] == "deletedFile":
                    self.deleted.append(item["value"]["path"])
            return 200, {
                "commitUrl": f"{constants.ENDPOINT}/datasets/me/pairs/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        return 404, {"error": f"{method} {path}"}


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, private: bool | None = None, refuses: bool = False) -> Iterator[Hub]:
    """A hub on loopback, which is the one that huggingface_hub then knows; `private`: of a data set that is there."""
    state = Hub(private, refuses)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            if "/commit/" in self.path:
                state.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = state.answer(self.command, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("public", [False, True])
def test_it_is_uploaded(project: Project, monkeypatch: pytest.MonkeyPatch, public: bool) -> None:
    grouped(project, *BATCH)
    with hub(monkeypatch) as there:
        result = project.cli(
            "export", "tiny.yaml", "--out", "out", *BATCH, "--push", "me/pairs", *["--public"] * public
        )
        assert result.status == 0, result.err
    (created,) = there.created
    assert (created["name"], created["organization"], created["type"]) == ("pairs", "me", "dataset")
    assert (created.get("visibility") == "private") is not public
    assert there.files == {
        str(path.relative_to("out")): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()
    }
    assert there.deleted == ["data/train-00007.parquet"], "of an export before, and nothing else"
    assert there.tokens == {"Bearer hf_mine"}
    assert "hf_mine" not in result.out + result.err + Path("out/README.md").read_text()


def test_what_is_public_is_added_to_only_where_that_is_meant(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped(project, *BATCH)
    with hub(monkeypatch, private=False) as there:
        result = project.cli("export", "tiny.yaml", "--out", "out", *BATCH, "--push", "me/pairs")
        assert result.status == 2
        assert "--push me/pairs: the data set exists and is public; add --public" in result.error()
        assert not there.files
        assert project.cli("export", "tiny.yaml", "--out", "more", *BATCH, "--push", "me/pairs", "--public").status == 0
        assert there.files
    with hub(monkeypatch, private=True) as there:
        assert project.cli("export", "tiny.yaml", "--out", "again", *BATCH, "--push", "me/pairs").status == 0
        assert there.files
        assert there.private
        assert project.cli("export", "tiny.yaml", "--out", "told", *BATCH, "--push", "me/pairs", "--public").status == 0
        assert not there.private


def test_what_the_hub_refuses_is_written(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped(project, *BATCH)
    with hub(monkeypatch, refuses=True):
        result = project.cli("export", "tiny.yaml", "--out", "out", *BATCH, "--push", "me/pairs")
    assert result.status == 1
    assert "--push me/pairs: the hub did not take it (" in result.error()
    assert "`hf upload me/pairs out --repo-type dataset` uploads it" in result.error()
    assert Path("out/README.md").is_file()
