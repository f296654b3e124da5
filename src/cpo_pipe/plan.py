"""Command `plan`: what a run would make and why, and what that takes, per stage.

Time and memory are measured by a probe (probe.py).
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict

from cpo_pipe.amounts import EXISTS, MAKE, StagePlan, examples_evaluated, mean_length, prompts_with_negatives
from cpo_pipe.checks import check_settings, check_stages
from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.progress import duration_text
from cpo_pipe.data.store import Store
from cpo_pipe.data.store.differences import differences
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.text import abridged, say
from cpo_pipe.needs import Need, training_needs
from cpo_pipe.pipeline.api.model import Tokens
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.rank.rank import plan_groups
from cpo_pipe.probe import measure
from cpo_pipe.run import Run
from cpo_pipe.screen import print_table, size_text
from cpo_pipe.trainer.objectives.preference import PreferenceTraining
from cpo_pipe.trainer.train import checkpoint, training_spec

log = logging.getLogger(__name__)

MOST_REASONS = 3
"""Differences to the nearest artifact that are named."""

_Shared = dict[tuple[str, ...], int]
"""Samples that earlier stages of the plan make, by source and its models; trainings share them."""


def plan(run: Run, probe: bool) -> list[StagePlan]:
    """Return what each stage would make; examples that are missing are prepared first, as all depends on them.

    Args:
        run: the run.
        probe: measure time and memory; else there is only what follows from shapes.
    """
    run.resolver = run.resolver.offline()  # only the probe may download or merge
    check_settings(run.resolver)
    prepare(run.recipe.data, run.store)
    check_stages(run.resolver)
    needs = training_needs(run.resolver)
    shared: _Shared = {}
    stages = [_planned(run, name, needs, shared) for name in run.stages()]
    if probe and any(stage.state == MAKE for stage in stages):
        if asked := run.recipe.apis_of_negatives():
            log.warning("no probe, since it would ask APIs (%s): time and memory are not known", ", ".join(asked))
        else:
            measure(run, stages)
    return stages


def _planned(run: Run, name: str, needs: Mapping[str, Need], shared: _Shared) -> StagePlan:
    if name == "prepare":
        examples = run.resolver.examples().artifact.manifest["examples"]
        return StagePlan(name, EXISTS, "", sum(examples.values()), "examples")
    kind, _, owner = name.partition(" of ")
    if kind == "generate-negatives":
        return _planned_negatives(run, name, owner or None, shared)
    if kind == "rank":
        return _planned_groups(run, name, owner or None)
    if kind == "evaluate":
        return _planned_evaluation(run, name)
    return _planned_training(run, name, name.removeprefix("train "), needs)


def _planned_negatives(run: Run, name: str, owner: str | None, shared: _Shared) -> StagePlan:
    resolver = run.resolver
    section = resolver.negatives_section(owner)
    prompts = prompts_with_negatives(run, owner)
    amounts = {label: prompts * source.count for label, source in section.sources.items()}
    total = sum(amounts.values())
    planned = StagePlan(name, MAKE, unit="samples")
    try:
        found = resolver.negatives(owner)
        amounts = found.missing_by_source()
        missing = sum(amounts.values())
        if not missing:
            return StagePlan(name, EXISTS, "", total, "samples")
        elif missing < total:
            planned.why = f"{total - missing:,} of {total:,} exist"
        else:
            planned.why = _why(resolver.store, "negatives", found.sources[0].rows.spec)
    except MissingInput as waits:
        planned.why = _waits(waits)
    for label, source in section.sources.items():
        key = (label, *source.models())
        before, shared[key] = shared.get(key, 0), max(shared.get(key, 0), amounts[label])
        amounts[label] = max(amounts[label] - before, 0)
    planned.amount = sum(amounts.values())
    if not planned.amount:
        planned.why = "an earlier stage makes them"
    length = mean_length(run, "target_ids")
    planned.tokens = round(planned.amount * length)
    prompt, prices = mean_length(run, "prompt_ids"), []
    for label, source in section.sources.items():
        for api in (resolver.apis[model] for model in source.models() if model in resolver.apis):
            calls = amounts[label]
            planned.calls += calls
            prices.append(api.price(Tokens(round(calls * prompt), round(calls * length))))
    planned.usd = None if None in prices or not prices else sum(price for price in prices if price is not None)
    planned.share = planned.amount / total
    return planned


def _planned_groups(run: Run, name: str, owner: str | None) -> StagePlan:
    resolver, total = run.resolver, prompts_with_negatives(run, owner)
    planned = StagePlan(name, MAKE, amount=total, unit="groups")
    try:
        found = resolver.negatives(owner)
        groups, _ = plan_groups(resolver.recipe.rank, resolver.scorer_dependencies(), found)
        planned.amount = groups.missing(found.selection.select(["example_id"])).num_rows
        if not planned.amount:
            return StagePlan(name, EXISTS, "", total, "groups")
        planned.why = _why(resolver.store, "groups", groups.spec) if planned.amount == total else ""
    except MissingInput as missing:
        planned.why = _waits(missing)
    planned.share = planned.amount / total
    return planned


def _planned_training(run: Run, name: str, training: str, needs: Mapping[str, Need]) -> StagePlan:
    resolver, config = run.resolver, run.resolver.trainings[training]
    planned = StagePlan(name, MAKE, amount=config.max_steps, unit="steps")
    tokens = mean_length(run, "prompt_ids") + mean_length(run, "target_ids")
    if isinstance(config, PreferenceTraining):
        owner = resolver.negatives_owner(training)
        sources = (config.negatives or {}).values() if config.negatives else ()
        count = sum(sources) or sum(one.count for one in resolver.negatives_section(owner).sources.values())
        tokens += count * mean_length(run, "target_ids")
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
    return planned


def _planned_evaluation(run: Run, name: str) -> StagePlan:
    from cpo_pipe.eval.costs import evaluation_costs
    from cpo_pipe.eval.evaluate import plan_evaluation, selected
    from cpo_pipe.eval.generate import plan_generations

    resolver, config = run.resolver, run.resolver.evaluate_section()
    outputs = examples_evaluated(run) * len(config.all_systems()) * len(config.decodings)
    planned = StagePlan(name, MAKE, amount=outputs, unit="outputs")
    systems = resolver.available_systems(quiet=True)
    known = {system: model for system, model in systems.items() if model is not None}
    longest = config.max_new_tokens or resolver.recipe.data.longest_target()
    waiting = [system for system, model in systems.items() if model is None]
    if waiting:
        planned.why = f"waits for {', '.join(waiting)}"
        selection = selected(config, resolver.examples())
        exist = sum(
            int((~one.request.missing(selection["example_id"])).sum())
            for system, model in known.items()
            for one in plan_generations(config, resolver.store, resolver.examples(), selection, system, model, longest)
        )
        planned.amount -= exist
        planned.share = planned.amount / outputs
    else:
        try:
            found = plan_evaluation(
                config, resolver.store, resolver.examples(), known, max_new_tokens=longest,
                models=resolver.judge_models(config), apis=resolver.apis, executor=run.executor,
            )  # fmt: skip
        except MissingInput as missing:
            planned.why = _waits(missing)
            return planned
        if resolver.store.artifact("metrics", found.spec()).complete():
            return StagePlan(name, EXISTS, "", outputs, "outputs")
        planned.why = _why(resolver.store, "metrics", found.spec())
        planned.amount = sum(int(one.request.missing(found.selection["example_id"]).sum()) for one in found.generations)
        planned.share = planned.amount / outputs
    planned.tokens = planned.amount * longest
    costs, _ = evaluation_costs(
        config, resolver.store, resolver.examples(), systems, max_new_tokens=longest,
        models=resolver.judge_models(config, only_apis=True), apis=resolver.apis,
    )  # fmt: skip
    prices = [api.price(cost.tokens) if cost is not None else None for _, api, cost in costs]
    planned.calls = sum(cost.calls for *_, cost in costs if cost is not None)
    planned.usd = None if None in prices or not prices else sum(price for price in prices if price is not None)
    return planned


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


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_plan(stages: list[StagePlan], as_json: bool) -> None:
    """Print the plan as a table with the total, or as JSON."""
    if as_json:
        say(json.dumps([asdict(stage) for stage in stages], indent=1))
        return
    rows = []

    def at_least(stage: StagePlan) -> str:
        """Mark memory that follows from shapes alone: of weights, gradients and optimizer."""
        return "≥" if stage.state == MAKE and stage.memory is not None and stage.seconds is None else ""

    for number, stage in enumerate(stages, 1):
        make = stage.state == MAKE
        rows.append([
            f"{number}/{len(stages)} {stage.stage}", stage.state, f"{stage.amount:,} {stage.unit}",
            f"{stage.tokens:,}" if make and stage.tokens else "", _bytes(stage.disk if make else None),
            at_least(stage) + _bytes(stage.memory if make else None),
            duration_text(stage.seconds) if stage.seconds is not None else "",
            stage.why,
        ])  # fmt: skip
    print_table(["stage", "", ">amount", ">tokens", ">disk", ">memory", ">time", "why"], rows)
    times = [stage.seconds for stage in stages if stage.seconds is not None]
    peaks = [stage.memory for stage in stages if stage.memory is not None and stage.state == MAKE]
    total = [f"time {duration_text(sum(times))}"] if times else []
    least = "" if times else "at least "
    total += [f"peak memory {least}{_bytes(max(peaks))}"] if peaks else []
    if disk := sum(stage.disk or 0 for stage in stages if stage.state == MAKE):
        total.append(f"disk {_bytes(disk)}")
    if calls := sum(stage.calls for stage in stages):
        prices = [stage.usd for stage in stages if stage.calls]
        price = "" if None in prices else f", {sum(price or 0 for price in prices):.4g} US dollars"
        total.append(f"{calls:,} API calls{price}")
    say(f"total: {', '.join(total)}" if total else "nothing to make")


def _bytes(size: int | None) -> str:
    return "" if size is None else size_text(size)
