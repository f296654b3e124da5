"""A tiny project: data, a recipe, and what its commands leave."""

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

RECIPE = """\
name: tiny
data: {{source: pairs.jsonl, tokenizer: {model}, train: 16, validation: 4, test: 4,
       max_prompt_tokens: 40, max_target_tokens: 40}}
train:
  start: {{init: {model}, objective: mle, max_steps: 2, batch_size: 4, learning_rate: 0.001}}
  cpo: {{init: start, objective: cpo, reference: start, max_steps: 2, batch_size: 4, beta: 0.1, learning_rate: 0.01}}
negatives:
  sources:
    autoregressive: {{model: start, count: 3, max_new_tokens: 8, engine: transformers}}
rank: {{by: none}}
evaluate:
  systems: {{start: {{model: start}}, cpo: {{model: cpo}}}}
  baseline: start
  judges: [exact]
  max_new_tokens: 8
  mauve_seeds: 0
  bootstrap: 50
  engine: transformers
"""


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one line that says what was wrong, which is the last."""
        assert "Traceback" not in self.out + self.err
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        assert len(errors) == 1, self.err
        assert lines[-1] == errors[0]
        return errors[0]


class Project:
    """A folder with data and `tiny.yaml`, the current folder of the commands that `cli` runs."""

    def __init__(self, root: Path, model: Path, cli: Callable[..., Result]):
        self.root, self.model, self.cli = root, model, cli
        self.store = root / "cpo-store"

    @property
    def run_dir(self) -> Path:
        """The folder of the latest run."""
        return (self.root / "runs/tiny/latest").resolve()

    def write(self, name: str, content: str | bytes) -> str:
        (self.root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def made(self) -> dict[str, str]:
        """Hash of every file that the store holds for good, by its path there."""
        files = [path for path in self.store.rglob("*") if path.is_file() and not {".locks", ".runs"} & {*path.parts}]
        return {
            str(path.relative_to(self.store)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.name not in ("lock", "file-hashes.json") and ".tmp-" not in str(path)
        }


def fill(root: Path, model: Path) -> None:
    """Write the data and the recipe of a project."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    rows = [{"prompt": f"{words[n % 9]} {n}", "target": f" {words[n % 7]} {words[n % 5]} {n}"} for n in range(24)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tiny.yaml").write_text(RECIPE.format(model=model))


def commands_in(text: str) -> list[list[str]]:
    """Return the arguments of the commands that a message names."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(cpo-pipe [^`]*)`", text)]


def stages(project: Project, run: str = "runs/tiny/latest") -> dict[str, dict[str, Any]]:
    """Return what a run has recorded of each stage, by the stage's name."""
    found: dict[str, dict[str, Any]] = json.loads((project.root / run / "run.json").read_text())["stages"]
    return found


def trainings(project: Project) -> dict[str, str]:
    """Return the checkpoint of each training, by the training's name."""
    return {
        name.removeprefix("train "): stage["artifact"] for name, stage in stages(project).items() if "train " in name
    }


def figures(project: Project) -> list[dict[str, Any]]:
    """Return the rows of the run's metrics."""
    rows: list[dict[str, Any]] = pq.read_table(project.root / "runs/tiny/latest/metrics.parquet").to_pylist()
    return rows
