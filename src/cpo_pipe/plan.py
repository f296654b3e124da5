"""Command `plan`: what a run would make and why, and what that takes, per stage.

Time and memory are measured: the probe is the recipe itself with few steps and few examples, on a store of its own that
is removed afterwards. What it takes per sample, group, step and output is then multiplied.
"""

import json
import logging
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data import progress
from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.progress import duration_text
from cpo_pipe.data.store import Store
from cpo_pipe.data.store.differences import differences
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.text import abridged, say
from cpo_pipe.needs import Need, training_needs
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.rank.rank import plan_groups
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.run import Run
from cpo_pipe.store_commands.screen import print_table, size_text
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.objectives.preference import PreferenceTraining
from cpo_pipe.trainer.train import checkpoint, training_spec

log = logging.getLogger(__name__)

PROBE_STEPS = 4
PROBE_GROUPS = 24
PROBE_OUTPUTS = 16
MOST_REASONS = 3
"""Differences to the nearest artifact that are named."""
NEEDED = ("examples", "tokenizers", "chat-dates")
"""What the probe takes from the store as it is."""
EXISTS, MAKE = "exists", "make"


@dataclass
class StagePlan:
    """What a stage would make."""

    stage: str
    state: str
    """`exists` or `make`."""
    why: str = ""
    amount: int = 0
    """Of `unit`, still to be made."""
    unit: str = ""
    tokens: int | None = None
    calls: int = 0
    """Of APIs."""
    usd: float | None = None
    disk: int | None = None
    """Bytes."""
    memory: int | None = None
    """Peak in bytes, of the machine or, for a stage on a GPU, of the GPU."""
    seconds: float | None = None
    scale: dict[str, float] = field(default_factory=dict)
    """How often the probe's work is done, by unit."""


def plan(run: Run, probe: bool) -> list[StagePlan]:
    """Return what each stage would make; examples that are missing are prepared first, as all depends on them.

    Args:
        run: the run.
        probe: measure time and memory; else there is only what follows from shapes.
    """
    prepare(run.recipe.data, run.store)
    needs = training_needs(run.resolver)
    stages = [_planned(run, name, needs) for name in run.stages()]
    if probe and any(stage.state == MAKE for stage in stages):
        if asked := _asks_apis(run.recipe):
            say(f"no probe, since it would ask APIs ({', '.join(asked)}): time and memory are not known")
        else:
            _measure(run, stages)
    return stages


def _planned(run: Run, name: str, needs: Mapping[str, Need]) -> StagePlan:
    if name == "prepare":
        examples = run.resolver.examples().artifact.manifest["examples"]
        return StagePlan(name, EXISTS, "", sum(examples.values()), "examples")
    kind, _, owner = name.partition(" of ")
    if kind == "generate-negatives":
        return _planned_negatives(run, name, owner or None)
    if kind == "rank":
        return _planned_groups(run, name, owner or None)
    if kind == "evaluate":
        return _planned_evaluation(run, name)
    return _planned_training(run, name, name.removeprefix("train "), needs)


def _prompts(run: Run, owner: str | None) -> int:
    """Return how many examples get negatives."""
    section = run.resolver.negatives_section(owner)
    there: int = run.resolver.examples().artifact.manifest["examples"]["train"]
    return min(there, section.max_examples or there)


def _evaluated(run: Run) -> int:
    """Return how many examples are evaluated."""
    config = run.resolver.evaluate_section()
    there: int = run.resolver.examples().artifact.manifest["examples"][config.split]
    return min(there, config.examples or there)


def _planned_negatives(run: Run, name: str, owner: str | None) -> StagePlan:
    resolver = run.resolver
    section = resolver.negatives_section(owner)
    total = _prompts(run, owner) * sum(source.count for source in section.sources.values())
    length = _mean_length(run, "target_ids")
    planned = StagePlan(name, MAKE, amount=total, unit="samples")
    try:
        found = resolver.negatives(owner)
        planned.amount = found.missing()
        if not planned.amount:
            planned.state = EXISTS
        elif planned.amount < total:
            planned.why = f"{total - planned.amount:,} of {total:,} exist"
        else:
            planned.why = _why(resolver.store, "negatives", found.sources[0].rows.spec)
    except MissingInput as missing:
        planned.why = _waits(missing)
    planned.tokens = round(planned.amount * length)
    planned.scale = {"samples": planned.amount / total, "groups": planned.amount / total}
    return planned


def _planned_groups(run: Run, name: str, owner: str | None) -> StagePlan:
    resolver, total = run.resolver, _prompts(run, owner)
    planned = StagePlan(name, MAKE, amount=total, unit="groups", scale={"groups": 1.0})
    try:
        found = resolver.negatives(owner)
        groups, _ = plan_groups(resolver.recipe.rank, resolver.scorer_dependencies(), found)
        planned.amount = groups.missing(found.selection.select(["example_id"])).num_rows
        planned.why = _why(resolver.store, "groups", groups.spec) if planned.amount == total else ""
        planned.state = MAKE if planned.amount else EXISTS
    except MissingInput as missing:
        planned.why = _waits(missing)
    planned.scale = {"groups": planned.amount / total}
    return planned


def _planned_training(run: Run, name: str, training: str, needs: Mapping[str, Need]) -> StagePlan:
    resolver, config = run.resolver, run.resolver.trainings[training]
    planned = StagePlan(name, MAKE, amount=config.max_steps, unit="steps")
    tokens = _mean_length(run, "prompt_ids") + _mean_length(run, "target_ids")
    if isinstance(config, PreferenceTraining):
        owner = resolver.negatives_owner(training)
        sources = (config.negatives or {}).values() if config.negatives else ()
        count = sum(sources) or sum(one.count for one in resolver.negatives_section(owner).sources.values())
        tokens += count * _mean_length(run, "target_ids")
    planned.tokens = round(config.max_steps * config.batch_size * tokens)
    if (need := needs.get(training)) is not None:
        planned.disk, planned.memory = need.disk, need.memory
    try:
        spec = training_spec(config, resolver.training_inputs(training))
        if checkpoint(resolver.store, spec).complete():
            return StagePlan(name, EXISTS, "", config.max_steps, "steps")
        planned.why = _why(resolver.store, "checkpoints", spec)
    except MissingInput as missing:
        planned.why = _waits(missing)
    planned.scale = {"steps": config.max_steps}
    return planned


def _planned_evaluation(run: Run, name: str) -> StagePlan:
    from cpo_pipe.eval.costs import evaluation_costs

    resolver, config = run.resolver, run.resolver.evaluate_section()
    outputs = _evaluated(run) * len(config.all_systems()) * len(config.decodings)
    planned = StagePlan(name, MAKE, amount=outputs, unit="outputs", scale={"": 1.0})
    systems = resolver.available_systems()
    longest = config.max_new_tokens or resolver.recipe.data.longest_target()
    waiting = [system for system, model in systems.items() if model is None]
    if waiting:
        planned.why = f"waits for {', '.join(waiting)}"
    else:
        from cpo_pipe.eval.evaluate import plan_evaluation

        known = {system: model for system, model in systems.items() if model is not None}
        found = plan_evaluation(
            config, resolver.store, resolver.examples(), known, max_new_tokens=longest,
            models=resolver.judge_models(config), apis=resolver.apis, executor=run.executor,
        )  # fmt: skip
        if resolver.store.artifact("metrics", found.spec()).complete():
            return StagePlan(name, EXISTS, "", outputs, "outputs")
        planned.why = _why(resolver.store, "metrics", found.spec())
        planned.amount = sum(int(one.request.missing(found.selection["example_id"]).sum()) for one in found.generations)
    planned.tokens = planned.amount * longest
    costs, _ = evaluation_costs(
        config, resolver.store, resolver.examples(), systems, max_new_tokens=longest,
        models=resolver.judge_models(config, only_apis=True), apis=resolver.apis,
    )  # fmt: skip
    prices = [api.price(cost.tokens) if cost is not None else None for _, api, cost in costs]
    planned.calls = sum(cost.calls for *_, cost in costs if cost is not None)
    planned.usd = None if None in prices or not prices else sum(price for price in prices if price is not None)
    return planned


def _mean_length(run: Run, column: str) -> float:
    """Return the mean number of tokens in a column of the training examples."""
    table = run.resolver.examples().read("train", columns=[column])
    return float(pc.mean(pc.list_value_length(table[column])).as_py() or 0)


def _waits(missing: MissingInput) -> str:
    return f"waits: {str(missing).partition(': run')[0]}"


def _why(store: Store, kind: str, spec: Spec) -> str:
    """Return in what an artifact that is missing differs from the nearest one of its kind."""
    with suppress(InputError):
        found = [
            (one.name, [*differences(one.spec, spec)]) for one in Inventory(str(store.root)).artifacts(kind) if one.spec
        ]
        if found:
            name, differ = min(found, key=lambda pair: len(pair[1]))
            parts = [f"{path}: {abridged(str(one), 24)} → {abridged(str(two), 24)}" for path, one, two in differ]
            more = f", and {len(parts) - MOST_REASONS} more" if len(parts) > MOST_REASONS else ""
            return f"differs from {name} in {', '.join(parts[:MOST_REASONS])}{more}" if parts else ""
    return f"the store has no {kind}"


# ── the probe ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _asks_apis(recipe: Recipe) -> list[str]:
    """Return the APIs that negatives and ranks are from."""
    named = list(recipe.rank.apis())
    if recipe.negatives is not None:
        named += recipe.negatives.models()
        if recipe.negatives.drop_correct is not None:
            named += recipe.negatives.drop_correct.scorer().apis()
    return [name for name in dict.fromkeys(named) if name in recipe.apis]


def _small(run: Run) -> Recipe:
    """Return the recipe with few steps, groups and outputs; batches stay as large as a forward pass needs them."""
    recipe = run.recipe
    tokens = _mean_length(run, "prompt_ids") + 2 * _mean_length(run, "target_ids")
    trainings = {}
    for name, training in recipe.train.items():
        batch = min(training.batch_size, max(4, math.ceil(training.micro_batch_tokens / tokens)))
        changes: dict[str, Any] = {
            "max_steps": PROBE_STEPS, "batch_size": batch, "curriculum": None, "validation": 0, "keep": "last",
            "stop_on": [], "report_to": [],
        }  # fmt: skip
        trainings[name] = training.model_copy(update=changes)
    update: dict[str, Any] = {"train": trainings, "iterations": 1}
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
    folder = store.local / f".plan-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
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


def _measure(run: Run, stages: list[StagePlan]) -> None:
    """Run the probe, and extrapolate time and memory to each stage that would make something."""
    small = _small(run)
    log.info("probe: %d steps of each training, and a few samples and outputs", PROBE_STEPS)
    with _scratch(run.store) as folder:
        probe = Run(small, "probe", Store(folder / "store"), folder / "run", run.executor)
        with _silent():
            probe.everything(force=True, quiet=True)
        record = probe.log.read()["stages"]
        for stage in stages:
            name = stage.stage.partition("@")[0]
            if stage.state == MAKE and name in record:
                _extrapolate(run, small, probe, stage, record[name])


def _extrapolate(run: Run, small: Recipe, probe: Run, stage: StagePlan, measured: Mapping[str, Any]) -> None:
    work = measured.get("work", [])
    seconds = measured["seconds"] - sum(one["seconds"] for one in work)
    for one in work:
        if one["unit"] == "steps":
            seconds += _training_seconds(run, small, probe, stage.stage.removeprefix("train "))
        else:
            seconds += one["seconds"] * _times(run, probe, stage, one["unit"])
    stage.seconds = max(seconds, 0.0)
    peak = measured.get("peak", {})
    stage.memory = peak.get("gpu_memory") or peak.get("memory")


def _training_seconds(run: Run, small: Recipe, probe: Run, name: str) -> float:
    """Return what the steps of a training take, and its measurements before, between and after them."""
    name = name.partition("@")[0]
    config, tiny = run.recipe.train[name], small.train[name]
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
        return _prompts(run, owner) / _prompts(probe, owner)
    if stage.stage == "evaluate":
        return _evaluated(run) / _evaluated(probe)
    _, _, owner = stage.stage.partition(" of ")
    share = stage.scale.get(unit, 1.0)
    return share * _prompts(run, owner or None) / _prompts(probe, owner or None)


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_plan(stages: list[StagePlan], as_json: bool) -> None:
    """Print the plan as a table with the total, or as JSON."""
    if as_json:
        shown = [{key: value for key, value in asdict(stage).items() if key != "scale"} for stage in stages]
        say(json.dumps(shown, indent=1))
        return
    rows = []
    for number, stage in enumerate(stages, 1):
        make = stage.state == MAKE
        rows.append([
            f"{number}/{len(stages)} {stage.stage}", stage.state, f"{stage.amount:,} {stage.unit}",
            f"{stage.tokens:,}" if make and stage.tokens else "", _bytes(stage.disk if make else None),
            _bytes(stage.memory if make else None), duration_text(stage.seconds) if stage.seconds is not None else "",
            stage.why,
        ])  # fmt: skip
    print_table(["stage", "", ">amount", ">tokens", ">disk", ">memory", ">time", "why"], rows)
    times = [stage.seconds for stage in stages if stage.seconds is not None]
    peaks = [stage.memory for stage in stages if stage.memory is not None and stage.state == MAKE]
    total = [f"time {duration_text(sum(times))}"] if times else []
    total += [f"peak memory {_bytes(max(peaks))}"] if peaks else []
    if disk := sum(stage.disk or 0 for stage in stages if stage.state == MAKE):
        total.append(f"disk {_bytes(disk)}")
    if calls := sum(stage.calls for stage in stages):
        prices = [stage.usd for stage in stages if stage.calls]
        price = "" if None in prices else f", {sum(price or 0 for price in prices):.4g} US dollars"
        total.append(f"{calls:,} API calls{price}")
    say(f"total: {', '.join(total)}" if total else "nothing to make")


def _bytes(size: int | None) -> str:
    return "" if size is None else size_text(size)
