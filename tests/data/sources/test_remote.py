"""URLs: in memory, on loopback and as files. A copy is downloaded once for each version."""

import functools
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import HfApi

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import sha256_file
from cpo_pipe.data.sources.data_sets import HubDataSet
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.rows import Row

PAIR = {"prompt": "q", "target": "a"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder, its URL, and the requests for it."""
    folder, requests = tmp_path / "served", list[str]()
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, template: str, *arguments: Any) -> None:
            requests.append(str(arguments[0]))

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{running.server_port}", requests
        finally:
            running.shutdown()
            thread.join()


def lines(*numbers: int) -> bytes:
    return b"".join(json.dumps({"q": f"{n}", "a": "x"}).encode() + b"\n" for n in numbers)


def numbers(location: str, **options: str) -> list[str]:
    return [row.values["q"] for row in locate_source(location, **options).read(PAIR) if isinstance(row, Row)]


def test_a_file_a_pattern_and_a_folder(memory: Any) -> None:
    memory.pipe(
        {"/b/set/train.jsonl": lines(1), "/b/set/test.jsonl": lines(2), "/b/.hidden": b"", "/b/z.csv": b"q,a\n3,x\n"}
    )
    assert numbers("memory://b/z.csv") == ["3"]
    assert numbers("memory://b/set") == numbers("memory://b/set/", split="train") == ["1"]
    assert numbers("memory://b/set", split="test") == ["2"]
    assert numbers("memory://b/**/*.jsonl") == ["2", "1"], "in the order of their names"
    source = locate_source("memory://b/set/*.jsonl")
    assert [row.source for row in source.read(PAIR)] == ["test.jsonl:1", "train.jsonl:1"]
    assert locate_source("memory://b/set/t*n.jsonl").count() == 1


def test_another_version_is_downloaded_again_and_the_same_is_not(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/a.jsonl", lines(1))
    first = locate_source("memory://a.jsonl").identity(sha256_file)
    monkeypatch.setattr(type(memory), "get_file", None)
    assert locate_source("memory://a.jsonl").identity(sha256_file) == first
    monkeypatch.undo()
    memory.pipe("/a.jsonl", lines(2))
    assert numbers("memory://a.jsonl") == ["2"]
    assert locate_source("memory://a.jsonl").identity(sha256_file) != first


def test_a_web_server(server: tuple[Path, str, list[str]], cache: Path) -> None:
    folder, url, requests = server
    (folder / "a.jsonl").write_bytes(lines(1, 2))
    assert numbers(f"{url}/a.jsonl?download=true") == ["1", "2"]
    assert sum(request.startswith("GET") for request in requests) >= 1
    requests.clear()
    assert numbers(f"{url}/a.jsonl?download=true") == ["1", "2"]
    assert not any(request.startswith("GET") for request in requests), "Last-Modified is that of the copy"
    (folder / "a.jsonl").write_bytes(lines(3))
    assert numbers(f"{url}/a.jsonl?download=true") == ["3"]
    with pytest.raises(
        InputError, match=rf"^data\.source {url}/b\.jsonl: not found \(.*\); correct the URL, or check the network$"
    ):
        locate_source(f"{url}/b.jsonl")
    assert not list(cache.rglob(".tmp*"))


def test_a_url_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    assert numbers(f"file://{tmp_path}/a.jsonl") == ["1"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://b/a.jsonl", "data.source memory://b/a.jsonl: not found (/b/a.jsonl); correct the URL"),
        ("memory://b/*.jsonl", "data.source memory://b/*.jsonl: no file matches; correct the URL"),
        ("gopher://b/a.jsonl", "data.source gopher://b/a.jsonl: unknown protocol gopher; give a path or a URL that"),
        (
            "http://me:secret@127.0.0.1:9/a.jsonl",
            "data.source http://127.0.0.1:9/a.jsonl: not found (http://127.0.0.1:9/a.jsonl: [Errno 111] ",
        ),
    ],
)
def test_a_bad_url_is_one_line(url: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        locate_source(url)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_s3_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(InputError) as error:
        locate_source("s3://bucket/a.jsonl")
    assert str(error.value) == (
        "data.source s3://bucket/a.jsonl: a package is missing for s3://; pip install 'cpo-pipe[s3]'"
    )


def test_the_url_of_a_hub_data_set_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "1" * 40, "v1": "2" * 40}

    class Info:
        def __init__(self, sha: str):
            self.sha = sha

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision=None: Info(commits[revision]))
    found = [locate_source(name) for name in ("own/set", "hf://datasets/own/set", "hf://datasets/own/set@v1/")]
    assert [(source.name, source.commit) for source in found if isinstance(source, HubDataSet)] == [
        ("own/set", "1" * 40), ("own/set", "1" * 40), ("own/set", "2" * 40),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"^data\.revision: not used by a URL with a revision"):
        locate_source("hf://datasets/own/set@v1", revision="v2")
