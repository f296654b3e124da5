"""An OpenAI-compatible server on loopback that misbehaves as told, and counts what it does."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    at: float
    """When, by the monotonic clock."""
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    attempt: int
    """Times that the same was asked before."""

    @property
    def prompt(self) -> Any:
        """The user's message, or what a completion continues."""
        return self.body["messages"][-1]["content"] if "messages" in self.body else self.body["prompt"]


@dataclass
class Reply:
    """What the server sends."""

    body: Any
    """JSON, or bytes that are none."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    """Seconds before it is sent."""
    cut: bool = False
    """Close the connection in the middle of it."""


def written(
    seen: Seen, text: str = "", finish_reason: str | None = "stop", used: tuple[int, int] | None = (10, 5)
) -> Reply:
    """A proper answer; `used` are its tokens, of the prompt and written."""
    body = seen.body
    text = text or f"re {seen.prompt} {body.get('seed', '')}".rstrip()
    choices = []
    for index in range(body.get("n", 1)):
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choices.append({"index": index, "finish_reason": finish_reason, **said})
    answer: dict[str, Any] = {"id": "1", "object": "x", "created": 0, "model": "served-1", "choices": choices}
    if used is not None:
        answer["usage"] = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
    return Reply(answer)


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI's own server gives it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message, "type": "error", "param": None, "code": code}}, status, named)


class ApiServer:
    """Answers as `script` says; made by `serve`."""

    def __init__(self, script: Callable[[Seen], Reply]):
        self.script = script
        self.seen: list[Seen] = []
        self.delivered: list[Seen] = []
        """Requests whose answer, with status 200, was sent to the end."""
        self.tokens = Counter[str]()
        """Of the usage in all answers sent."""
        self.models = Reply({"object": "list", "data": []})
        """The answer to GET /models."""
        self.listed = 0
        """Times that it was asked for."""
        self.most_under_way = 0
        self._under_way = 0
        self._asked = Counter[str]()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._serve(self)

            def do_GET(self) -> None:
                server._list(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:  # a client that went away
                pass

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def _list(self, handler: BaseHTTPRequestHandler) -> None:
        self.listed += 1
        content = json.dumps(self.models.body).encode()
        handler.send_response(self.models.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def prompts(self) -> Counter[Any]:
        """How often each prompt was asked."""
        return Counter(seen.prompt for seen in self.seen)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            key = json.dumps([handler.path, body], sort_keys=True)
            headers = {name.lower(): value for name, value in handler.headers.items()}
            seen = Seen(time.monotonic(), handler.path, headers, body, self._asked[key])
            self._asked[key] += 1
            self.seen.append(seen)
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
        try:
            reply = self.script(seen)
            time.sleep(reply.after)
        finally:
            with self._lock:
                self._under_way -= 1
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        if isinstance(reply.body, dict):
            with self._lock:
                self.tokens.update(reply.body.get("usage", {}))
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if reply.cut:
            handler.wfile.write(content[: len(content) // 2])
            handler.close_connection = True
            return
        handler.wfile.write(content)
        handler.wfile.flush()
        if reply.status == 200:
            with self._lock:
                self.delivered.append(seen)


@contextmanager
def serve(script: Callable[[Seen], Reply] = written) -> Iterator[ApiServer]:
    """A server that runs until the block ends."""
    server = ApiServer(script)
    thread = threading.Thread(target=server._http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()
        thread.join()
