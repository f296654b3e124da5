"""SHA-256 checksums of the files of a folder, in a file beside them, for folders that are no artifact (yet)."""

import json
from pathlib import Path

from cpo_pipe.data.fingerprint import sha256_file

FILE = "checksums.json"


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files of a folder, at any depth, by their paths in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / FILE)
    return {str(file.relative_to(folder)): sha256_file(file) for file in files}


def record(folder: Path) -> None:
    """Write the checksums of all files of a folder, at any depth, into it."""
    (folder / FILE).write_text(json.dumps(hash_files(folder), indent=1))


def fault(folder: Path) -> str | None:
    """Return what is wrong with a folder whose files are not those recorded, or None."""
    try:
        hashes = dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
        if not hashes:
            return f"{FILE} lists no files"
        for name, sha256 in hashes.items():
            if not (folder / name).is_file():
                return f"{name} is gone"
            if sha256_file(folder / name) != sha256:
                return f"the checksum of {name} differs"
    except FileNotFoundError:
        return f"{FILE} is gone"
    except (ValueError, TypeError, RecursionError):
        return f"{FILE} is unreadable"
    except OSError as error:  # such as of a failing disk
        return f"a file cannot be read ({error.strerror})"
    return None
