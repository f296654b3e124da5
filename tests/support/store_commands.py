"""A project's store as the commands of `cpo-pipe store` see it: its artifacts and the runs that use them."""

import json
import socket
from pathlib import Path

from cpo_pipe.data.store.inventory import Inventory
from tests.support.project import Project

HERE = socket.gethostname()


def register(project: Project, run_dir: Path, *names: str, host: str = HERE) -> None:
    """Record that a run uses the named artifacts and no others."""
    folder = project.store / ".runs"
    folder.mkdir(exist_ok=True)
    content = {"run_dir": str(run_dir), "host": host, "artifacts": names}
    (folder / f"{run_dir.name}-{host}.json").write_text(json.dumps(content))


def names_in(project: Project, *kinds: str) -> list[str]:
    """Return the names of the artifacts of some kinds, or of all."""
    return [a.name for a in Inventory(project.store).artifacts() if not kinds or a.kind in kinds]


def path_of(project: Project, kind: str) -> Path:
    """Return the folder of the first artifact of a kind."""
    return Inventory(project.store).artifacts(kind)[0].path
