"""The probe of `plan`: the recipe with few steps and few examples, on a store of its own that is removed afterwards.

What it takes per sample, group, step and output is then multiplied.
"""

import logging
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from cpo_pipe.amounts import MAKE, StagePlan, examples_evaluated, mean_length, prompts_with_negatives
from cpo_pipe.data import progress
from cpo_pipe.data.store import Store
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.run import Run
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.scoring.batching import pass_tokens

log = logging.getLogger(__name__)

PROBE_STEPS = 4
PROBE_GROUPS = 24
PROBE_OUTPUTS = 16
NEEDED = ("examples", "tokenizers", "chat-dates")
"""What the probe takes from the store as it is."""
SCRATCH = ".plan-"


def small(run: Run) -> Recipe:
    """Return the recipe with few steps, groups and outputs; batches stay as large as a forward pass needs them."""
    recipe = run.recipe
    tokens = mean_length(run, "prompt_ids") + 2 * mean_length(run, "target_ids")
    trainings = {}
    for name, training in recipe.train.items():
        batch = min(training.batch_size, max(4, math.ceil(pass_tokens(training.micro_batch_tokens, "cuda") / tokens)))
        changes: dict[str, Any] = {
            "max_steps": PROBE_STEPS, "batch_size": batch, "curriculum": None, "validation": 0, "keep": "last",
            "stop_on": [], "report_to": [],
        }  # fmt: skip
        trainings[name] = training.model_copy(update=changes)
    update: dict[str, Any] = {"train": trainings}
    if recipe.negatives is not None:
        groups = max([PROBE_GROUPS, *(training.batch_size for training in trainings.values())])
        most = min(groups, recipe.negatives.max_examples or groups)
        update["negatives"] = recipe.negatives.model_copy(update={"max_examples": most})
    if recipe.evaluate is not None:
        config = recipe.evaluate
        apis = [name for name, system in config.systems.items() if system.model in recipe.apis]
        systems = {name: system for name, system in config.systems.items() if name not in apis}
        judges = {name: judge for name, judge in config.judges.items() if not judge.apis()}
        changes = {"systems": systems, "judges": judges, "headline": None, "annotations": None}
        changes["examples"] = min(PROBE_OUTPUTS, config.examples or PROBE_OUTPUTS)
        changes["compare"] = [pair for pair in config.compare if not {*apis} & {*pair}]
        if config.baseline in apis:
            changes["baseline"] = next(iter(systems), config.baseline)
        update["evaluate"] = config.model_copy(update=changes) if systems else None
    return recipe.model_copy(update=update)


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    """Yield a folder for the probe, on the disk of the store, in which the store's examples can be seen."""
    for left in store.local.glob(f"{SCRATCH}*"):  # of a probe that was killed
        if not psutil.pid_exists(int(left.name.removeprefix(SCRATCH))):
            shutil.rmtree(left, ignore_errors=True)
    folder = store.local / f"{SCRATCH}{os.getpid()}"
    (folder / "store").mkdir(parents=True)
    try:
        for kind in NEEDED:
            if (store.local / kind).is_dir():
                (folder / "store" / kind).symlink_to((store.local / kind).absolute())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Let the probe log nothing but errors, and show no bars."""
    package = logging.getLogger("cpo_pipe")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        with progress.hidden():
            yield
    finally:
        package.setLevel(level)


def measure(run: Run, stages: list[StagePlan]) -> None:
    """Run the probe, and extrapolate time and memory to each stage that would make something."""
    log.info("probe: %d steps of each training, and a few samples and outputs", PROBE_STEPS)
    with _scratch(run.store) as folder:
        probe = Run(small(run), "probe", Store(folder / "store"), folder / "run", run.executor)
        with _silent():
            probe.everything(force=True, quiet=True)
        record = probe.log.read()["stages"]
        for stage in stages:
            if stage.state == MAKE and stage.stage in record:
                extrapolate(run, probe, stage, record[stage.stage])


def extrapolate(run: Run, probe: Run, stage: StagePlan, measured: Mapping[str, Any]) -> None:
    """Set a stage's time and memory from the probe's record of it: its work is multiplied, the rest is not."""
    work = measured.get("work", [])
    seconds = measured["seconds"] - sum(one["seconds"] for one in work)
    for one in work:
        if one["unit"] == "steps":
            seconds += _training_seconds(run, probe, stage.stage.removeprefix("train "))
        else:
            seconds += one["seconds"] * _times(run, probe, stage, one["unit"])
    stage.seconds = max(seconds, 0.0)
    peak = measured.get("peak", {})
    stage.memory = peak.get("gpu_memory") or peak.get("memory")


def _training_seconds(run: Run, probe: Run, name: str) -> float:
    """Return what the steps of a training take, and its measurements before, between and after them."""
    config, tiny = run.resolver.trainings[name], probe.resolver.trainings[name]
    rows = pq.read_table(probe.resolver.model(name).path / METRICS_FILE, columns=["seconds"])["seconds"].to_pylist()
    # The first row also has the first measurement, and the row after the last step has the last one alone.
    step = statistics.mean(rows[1:PROBE_STEPS]) * config.batch_size / tiny.batch_size
    measurement = rows[PROBE_STEPS] if len(rows) > PROBE_STEPS else 0.0
    validation = config.validation / config.batch_size * step / 3  # without the backward pass
    measurements = math.ceil(config.max_steps / config.eval_steps) + 1
    return float(step * config.max_steps + (measurement + validation) * measurements)


def _times(run: Run, probe: Run, stage: StagePlan, unit: str) -> float:
    """Return how much more of a unit's work the stage does than the probe did."""
    if stage.stage.startswith("train "):  # log-probs of the reference: of all groups
        owner = run.resolver.negatives_owner(stage.stage.removeprefix("train "))
        return prompts_with_negatives(run, owner) / prompts_with_negatives(probe, owner)
    if stage.stage == "evaluate":
        share = stage.share if unit == "samples" else 1.0  # outputs that exist are judged and measured again
        return share * examples_evaluated(run) / examples_evaluated(probe)
    _, _, owner = stage.stage.partition(" of ")
    return stage.share * prompts_with_negatives(run, owner or None) / prompts_with_negatives(probe, owner or None)
