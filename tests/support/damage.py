"""Damage that a failing disk does."""

import json
from pathlib import Path


def rot(file: Path, store: Path) -> None:
    """Flip a bit of a file whose hash the store has cached, as a failing disk does: size and times stay the same."""
    from cpo_pipe.data import fingerprint

    cache = store / "file-hashes.json"
    files = json.loads(cache.read_text())["files"] if cache.exists() else {}
    intact = fingerprint.sha256_file(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    files[str(file.resolve())] = [fingerprint._stamp(file.resolve())[0], intact]
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"checksum": fingerprint.digest(files), "files": files}))
    fingerprint._hashes.clear()  # another process has read nothing yet
