"""The report of a run: what it shows is gathered from the store, the run folder and the evaluation."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data.errors import MissingInput
from cpo_pipe.data.fingerprint import digest, sha256_file
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Rows
from cpo_pipe.eval.config import DIVERSITY, Evaluate, ensemble_system
from cpo_pipe.eval.evaluate import Evaluation
from cpo_pipe.eval.generate import SystemModel
from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.exports import write_exports
from cpo_pipe.eval.report.leaderboard import Leaderboard, leaderboards
from cpo_pipe.eval.report.report import write_report
from cpo_pipe.eval.report.tables import unmeasured
from cpo_pipe.eval.report.verdict import Verdict, verdict
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.negatives.generate import Plan
from cpo_pipe.pipeline.quality.measure import measure_quality
from cpo_pipe.recipe.render import recipe_text
from cpo_pipe.resolve import Resolver, of
from cpo_pipe.run_log import RunLog, versions
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.monitors import Watch

log = logging.getLogger(__name__)

REPORTED_GROUPS = 50


def write_run_report(
    resolver: Resolver, run_log: RunLog, evaluation: Evaluation, systems: Mapping[str, SystemModel]
) -> Path:
    """Write report.html and the files beside it, unless they are up to date; return its path."""
    recipe, run_dir = resolver.recipe, run_log.run_dir
    plan, groups, notes = _shown_groups(resolver)
    trained = resolver.finished_trainings()
    artifacts = _artifacts(resolver, evaluation, systems, trained)
    path, reference = run_dir / "report.html", resolver.reference_logprobs()
    text = recipe_text(recipe)
    identity = digest([artifacts, text, versions(), notes, reference.num_rows() if reference else 0])
    if run_log.has_report(identity):  # drawing takes longer than all the rest of a run with nothing to do
        return path
    quality = None
    if groups is not None:
        dropped = resolver.dropped_as_correct(plan)
        quality = measure_quality(plan.selection, plan.sources, groups, reference, dropped)
    first = plan.selection.slice(0, REPORTED_GROUPS)
    config, (boards, answer) = resolver.evaluate_section(), rankings(evaluation)
    data = ReportData(
        identity=identity,
        run=recipe.name,
        created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        versions=versions(),
        recipe=text,
        artifacts=artifacts,
        baseline=config.baseline,
        verdict=answer,
        leaderboards=boards,
        metrics=evaluation.table("metrics"),
        comparisons=evaluation.table("comparisons"),
        agreements=evaluation.table("agreement"),
        published=recipe.published,
        shared_metrics=evaluation.shared_metrics,
        score_metrics=evaluation.score_metrics,
        notes=[*([recipe.note] if recipe.note else []), *evaluation.notes, *notes],
        examples=evaluation.examples,
        outputs=evaluation.table("outputs"),
        scores=_scores(evaluation, config),
        verdicts=evaluation.table("verdicts"),
        ensembles={
            name: [(alpha, ensemble_system(name, alpha)) for alpha in sorted(ensemble.alphas)]
            for name, ensemble in config.ensembles.items()
        },
        stages=run_log.stages(),
        trainings={name: pq.read_table(model.path / METRICS_FILE) for name, model in trained.items()},
        training_warnings=[warning for name, model in trained.items() for warning in _warnings(resolver, name, model)],
        leakage=resolver.examples().leakage,
        quality=quality.table if quality else None,
        quality_notes=quality.notes if quality else (),
        group_examples=first if groups is not None else None,
        groups=groups.read(first["example_id"]) if groups is not None else None,
    )
    for figure in unmeasured(data):
        log.warning("published: %s is not measured by this run", figure)
    written, sentence = [*write_exports(run_dir, data), path], answer.sentence if answer is not None else ""
    write_report(path, data)
    run_log.record_report(identity, {str(file.relative_to(run_dir)): sha256_file(file) for file in written}, sentence)
    return path


def rankings(evaluation: Evaluation) -> tuple[list[Leaderboard], Verdict | None]:
    """Return the ranked table of each decoding, and how the best system compares with the baseline."""
    metrics, comparisons, baseline, ranked_by = (
        evaluation.table("metrics"), evaluation.table("comparisons"), evaluation.baseline, evaluation.ranked_by
    )  # fmt: skip
    boards = leaderboards(
        metrics, comparisons, baseline, ranked_by, evaluation.shared_metrics, evaluation.score_metrics
    )
    return boards, verdict(metrics, comparisons, baseline, *ranked_by, evaluation.shared_metrics)


def _warnings(resolver: Resolver, name: str, model: Model) -> list[str]:
    """Return what the monitors of a finished training warned of."""
    metrics = pq.read_table(model.path / METRICS_FILE).to_pylist()
    rows = [{key: value for key, value in row.items() if value is not None} for row in metrics]
    return Watch(name, resolver.recipe.training(name), rows, quiet=True).warnings


def _scores(evaluation: Evaluation, config: Evaluate) -> pa.Table:
    """Return the values per example of the metric that ranks, of its judge's scores, or else of chrF."""
    metric, _ = config.ranked_by()
    judge = metric.removesuffix(" win rate")
    if judge in config.judges:
        score = config.judges[judge].score_metric(judge)
        metric = score.name if score is not None else "chrF"
    elif metric in DIVERSITY:  # of all outputs together
        metric = "chrF"
    values = evaluation.table("values")
    return values.filter(pc.equal(values["metric"], metric))


def _shown_groups(resolver: Resolver) -> tuple[Plan, Rows | None, list[str]]:
    """Return negatives and groups of the recipe; None for groups that are missing, with a note that says why."""
    nothing = Plan(pa.table({}), []), None
    if resolver.recipe.negatives is None:
        return *nothing, []
    try:
        return *resolver.groups(resolver.negatives_owners()[0]), []
    except MissingInput as missing:
        return *nothing, [f"No negatives are shown: {missing}"]


def _artifacts(
    resolver: Resolver, evaluation: Evaluation, systems: Mapping[str, SystemModel], trained: Mapping[str, Model]
) -> dict[str, str]:
    """Return where each artifact that the report is about lies in the store, by what it is."""
    artifacts = {"examples": resolver.examples().artifact.name}
    for owner in resolver.negatives_owners() if resolver.recipe.negatives is not None else ():
        with suppress(MissingInput):
            plan, groups = resolver.groups(owner)
            artifacts |= {
                f"negatives{of(owner)}": ", ".join(source.rows.name for source in plan.sources),
                f"groups{of(owner)}": groups.name,
            }
    artifacts |= {f"training {name}": _origin(resolver, model) for name, model in trained.items()}
    artifacts |= {f"system {name}": _origin(resolver, model) for name, model in systems.items()}
    return artifacts | {"metrics": evaluation.artifact.name}


def _origin(resolver: Resolver, model: SystemModel) -> str:
    """Return where a model is in the store; of one from elsewhere its name and fingerprint."""
    if isinstance(model, ApiModel):
        return f"{model.config.model} at {model.config.url}"
    if isinstance(model, Model) and model.path.is_relative_to(resolver.store.local):
        return str(model.path.relative_to(resolver.store.local))
    return f"{model.name} ({model.fingerprint})"
