"""The folders of runs: `runs/NAME/TIME-HASH` for each version of a recipe, and `runs/NAME/latest`, a link to one."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.data.progress import duration_text
from cpo_pipe.data.store.differences import differences
from cpo_pipe.data.store.records import Record, run_record
from cpo_pipe.data.text import nearest, say
from cpo_pipe.recipe.read_yaml import read_yaml
from cpo_pipe.screen import print_table, time_text

RUNS = Path("runs")
LATEST = "latest"
MOST_KEYS = 6
"""Changed keys that a list names."""
_VERSION = re.compile(r"\d{8}-\d{4}-([0-9a-f]{6})")


def run_folder(name: str, recipe: str, root: Path = RUNS) -> Path:
    """Return the folder of a recipe's run: the one that it had before, or a new one, named by time and content.

    Args:
        name: of the recipe.
        recipe: its text, as it is written into the folder.
        root: where the folders of all recipes are.
    """
    key = digest(recipe)[:6]
    before = [path for path in versions(root / name) if path.name.endswith(key)]
    return before[-1] if before else root / name / f"{time.strftime('%Y%m%d-%H%M')}-{key}"


def versions(folder: Path) -> list[Path]:
    """Return the run folders of a recipe, the oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def link_latest(run_dir: Path) -> None:
    """Let `latest` beside a run folder lead to it; a folder that the user named gets no link."""
    if not _VERSION.fullmatch(run_dir.name):
        return
    link = run_dir.parent / LATEST
    if link.is_symlink() and os.readlink(link) == run_dir.name:
        return
    if link.exists() and not link.is_symlink():
        raise InputError(f"{link}: is no link, but the link to the last run belongs there; move it away")
    scratch = run_dir.parent / f".{LATEST}-{os.getpid()}"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(run_dir.name)
    scratch.replace(link)


@dataclass(frozen=True)
class RunFolder:
    """What a run left in its folder, read when it is asked for."""

    path: Path

    @property
    def label(self) -> str:
        """How messages call it: a recipe's name and version."""
        return "/".join(self.path.parts[-2:]) if _VERSION.fullmatch(self.path.name) else str(self.path)

    @cached_property
    def record(self) -> Record:
        """The content of run.json; without stages where it is gone or damaged."""
        return run_record(self.path) or {"stages": {}}

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's keys, as far as it sets them; none where it is gone or damaged."""
        try:
            content = read_yaml((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def artifacts(self) -> dict[str, str]:
        """Return what each stage made, by stage."""
        made = {stage: done.get("artifact") for stage, done in self.record["stages"].items()}
        return {
            stage: ", ".join([found] if isinstance(found, str) else found) for stage, found in made.items() if found
        }

    def metrics(self) -> dict[tuple[str, str, str], float]:
        """Return the metrics by system, decoding and name; none before the evaluation."""
        try:
            rows = pq.read_table(self.path / "metrics.parquet").to_pylist()
        except (OSError, pa.ArrowInvalid):
            return {}
        return {(row["system"], row["decoding"], row["metric"]): row["value"] for row in rows}

    def values(self) -> pa.Table | None:
        """Return the values per example behind the metrics; None where the store is elsewhere or no longer has them."""
        made = self.record["stages"].get("evaluate", {}).get("artifact")
        file = Path(str(self.record.get("store", ""))) / str(made) / "values.parquet"
        return pq.read_table(file) if made and file.is_file() else None

    @property
    def verdict(self) -> str:
        """The answer of its evaluation; empty without one."""
        return str(self.record.get("report", {}).get("verdict", ""))

    @property
    def last_started(self) -> float:
        """When its last stage began, in seconds since 1970; 0 before any."""
        return max((float(stage.get("started", 0)) for stage in self.record["stages"].values()), default=0.0)

    @property
    def seconds(self) -> float:
        """What all its stages took, over all calls."""
        return sum(float(stage.get("total_seconds", stage["seconds"])) for stage in self.record["stages"].values())


def all_runs(root: Path = RUNS) -> Iterator[RunFolder]:
    """Yield the runs of all recipes, by recipe and time."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        yield from map(RunFolder, versions(folder))


def find_run(text: str, root: Path = RUNS) -> RunFolder:
    """Return the run that a text names: its folder, `NAME` (the latest), `NAME/VERSION`, or the end of a version.

    Raises:
        InputError: no run is called so, or several are.
    """
    for path in (Path(text), root / text):
        for folder in (path, path / LATEST):
            if (folder / "run.json").is_file():
                return RunFolder(folder.resolve() if folder.is_symlink() or path.name == LATEST else folder)
    known = [run for run in all_runs(root) if run.path.name.endswith(text)]
    if len(known) == 1:
        return known[0]
    if known:
        raise InputError(f"run {text}: several end so: {', '.join(run.label for run in known)}; name one of them")
    labels = [run.label for run in all_runs(root)]
    hint = nearest(text, {*labels, *(run.path.parent.name for run in all_runs(root))})
    raise InputError(
        f"run {text}: no folder with run.json, and no run in {root}; {hint or '`cpo-pipe runs` lists them'}"
    )


def changed_keys(one: RunFolder, other: RunFolder) -> list[str]:
    """Return the keys in which two runs' recipes differ."""
    return [path for path, *_ in differences(one.recipe, other.recipe) if path != "name"]


def list_runs(name: str | None = None, root: Path = RUNS) -> None:
    """Print the runs of a recipe, or of all.

    Raises:
        InputError: there is no run of this recipe.
    """
    found = [run for run in all_runs(root) if name is None or run.path.parent.name == name]
    if not found:
        if name is None:
            say(f"no runs in {root}")
            return
        near = nearest(name, {run.path.parent.name for run in all_runs(root)})
        raise InputError(f"runs {name}: no run of this recipe in {root}; {near or '`cpo-pipe runs` lists all'}")
    before: dict[str, RunFolder] = {}
    rows = []
    for run in found:
        recipe = run.path.parent.name
        last = before.get(recipe)
        changed = changed_keys(last, run) if last is not None else []
        before[recipe] = run
        stages = [*run.record["stages"]]
        what = [run.verdict or (f"not evaluated; last stage: {stages[-1]}" if stages else "no stage is done")]
        if changed:
            what.insert(0, f"changed: {', '.join(changed[:MOST_KEYS])}{', …' if len(changed) > MOST_KEYS else ''};")
        rows.append([run.label, time_text(run.last_started or None), duration_text(run.seconds), " ".join(what)])
    print_table(["run", "last started", ">took", "what"], rows)
