"""Stage `evaluate`: the systems' outputs for held-out prompts, measured against the targets and a baseline.

Outputs and verdicts are rows and are reused. The metrics are one artifact:

    metrics.parquet       the METRICS schema, a row per system × decoding × metric
    comparisons.parquet   the COMPARISONS schema, a row per judge × decoding × two systems
    agreement.parquet     the AGREEMENT schema, a row per two judges, or a judge and the human annotations
    outputs.parquet       the OUTPUTS schema, every output, so that a report needs no model
    values.parquet        the VALUES schema, the values per example that the metrics average
    verdicts.parquet      the VERDICTS schema, how each output was judged, in each order
    manifest.json         what a reader of the metrics should know (`notes`)
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples, draw, selection_hash
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.fingerprint import Spec, content_hash
from cpo_pipe.data.models.embedder import Embedder, EmbeddingCache, locate_embedder, truncation
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import tokenizer_in
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Artifact, ArtifactWriter, Store
from cpo_pipe.eval.annotations import Annotations, read_annotations
from cpo_pipe.eval.config import DIVERSITY, GROUND_TRUTH, Evaluate
from cpo_pipe.eval.generate import (
    Generation,
    SystemModel,
    generate_outputs,
    outputs_table,
    plan_generations,
    read_outputs,
    read_samples,
    read_targets,
    refusal_note,
)
from cpo_pipe.eval.judges.base import Judge, JudgeDependencies, Judgement, ScoreJudge, ScoreMetric
from cpo_pipe.eval.judging import Comparison, judge_outputs, read_cases, score_outputs, verdicts_table, winners_by_rater
from cpo_pipe.eval.metrics.differences import (
    COMPARISONS,
    diversity_differences,
    value_differences,
    win_differences,
)
from cpo_pipe.eval.metrics.figures import ANY_DECODING, Figures
from cpo_pipe.eval.metrics.mauve import MIN_TEXTS, CausalEncoder, measure_mauve
from cpo_pipe.eval.metrics.text import measure_diversity, measure_likelihood, measure_overlap, measure_text
from cpo_pipe.eval.metrics.wins import measure_order, measure_wins, win_metrics
from cpo_pipe.eval.statistics.agreement import AGREEMENT, HUMANS, agreements
from cpo_pipe.eval.statistics.bootstrap import Bootstrap
from cpo_pipe.pipeline.api.model import ApiModel

log = logging.getLogger(__name__)

DEFINITIONS = 7
"""Raise when a metric's meaning or name changes: stored metrics are then invalid."""


@dataclass(frozen=True)
class Evaluation:
    """The result of the stage."""

    artifact: Artifact
    baseline: str
    ranked_by: tuple[str, str]
    """Metric and decoding by which systems are ranked."""
    examples: pa.Table
    """The selection, in order (EXAMPLES schema)."""
    shared_metrics: frozenset[str]
    """Metrics of the embedding model that also ranked the negatives: they favour what was trained on its ranking."""
    score_metrics: Sequence[ScoreMetric]
    """The metrics of the judges' scores."""

    def table(self, name: str) -> pa.Table:
        """Return a table of the artifact, such as `metrics`; the module's docstring lists them."""
        return pq.read_table(self.artifact.path / f"{name}.parquet")

    @property
    def notes(self) -> list[str]:
        """What a reader of the metrics should know."""
        notes: list[str] = self.artifact.manifest["notes"]
        return notes


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation resolved to artifacts, which may not exist yet."""

    config: Evaluate
    selection: pa.Table
    systems: Mapping[str, SystemModel]
    generations: list[Generation]
    judges: list[Judge]
    embedder: Embedder | None
    embeddings: EmbeddingCache | None
    """Sentence embeddings for judges and MAUVE; None if neither uses them."""
    mauve_features: EmbeddingCache | None
    """The features for MAUVE; None without MAUVE, or with too few examples."""
    mauve_spec: Spec
    """Spec of these features."""
    annotations: Annotations | None

    def opponents(self, system: str) -> list[str]:
        """Return the systems that a system is judged against: the baseline first, then those that `compare` names."""
        baseline = [self.config.baseline] if system != self.config.baseline else []
        return [*baseline, *(second for first, second in dict.fromkeys(self.config.compare) if first == system)]

    def embedding_judges(self) -> list[str]:
        """Return the names of the judges that use embeddings."""
        return [name for name, judge in self.config.judges.items() if judge.uses_embeddings]

    def judge_spec(self, judge: Judge) -> Spec:
        """Return what decides a judge's metrics: its verdicts, the name of the metrics, and the orders."""
        spec = judge.spec()
        if judge.name != self.config.judges[judge.name].kind:
            spec["name"] = judge.name
        return spec | ({"both_orders": False} if judge.sees_order and len(judge.orders) == 1 else {})

    def spec(self) -> Spec:
        """Return what decides the metrics. The ranker does not: it only decides how they are marked."""
        config = self.config
        samples = {name: decoding.samples for name, decoding in config.decodings.items() if decoding.samples > 1}
        return {
            "definitions": DEFINITIONS,
            "examples": selection_hash(self.selection),
            "systems": {name: model.fingerprint for name, model in self.systems.items()},
            "generations": [[one.system, one.decoding, content_hash(one.rows.spec)] for one in self.generations],
            "baseline": config.baseline,
            "headline": [*config.ranked_by()],
            **({"compare": [[*pair] for pair in config.compare]} if config.compare else {}),
            "judges": [self.judge_spec(judge) for judge in self.judges],
            "mauve": {**self.mauve_spec, "seeds": config.mauve_seeds} if self.mauve_spec else None,
            **({"samples": samples} if samples else {}),
            **({"annotations": self.annotations.fingerprint} if self.annotations else {}),
            "bootstrap": config.bootstrap,
            "seed": config.seed,
        }


def evaluate(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, SystemModel],
    *,
    max_new_tokens: int,
    ranker: str | None,
    models: Mapping[str, Model],
    apis: Mapping[str, ApiModel],
    executor: Executor,
) -> Evaluation:
    """Compare the systems: generate the missing outputs, judge and measure them; if nothing is missing, load no model.

    Args:
        config: the recipe's section.
        store: where artifacts are.
        examples: the prepared examples.
        systems: the models, by system; ensembles are merged already.
        max_new_tokens: longest output, in tokens.
        ranker: fingerprint of the embedding model that ranked the negatives, if one did.
        models: the models that judges and `mauve_model` name, by name.
        apis: the recipe's `apis`, by name.
        executor: runs the models.

    Raises:
        InputError: the split is empty, a model's context is too short for a prompt and an output or target, or a judge
            cannot work with the targets.
        RunError: an API did not answer every request; its answers are stored.
    """
    plan = plan_evaluation(
        config, store, examples, systems, max_new_tokens=max_new_tokens, models=models, apis=apis, executor=executor
    )
    artifact = store.artifact("metrics", plan.spec())

    def fill(writer: ArtifactWriter) -> None:
        for name, model in systems.items():
            generations = [one for one in plan.generations if one.system == name]
            generate_outputs(config, examples, plan.selection, model, generations, executor)
        tables, writer.facts["notes"] = measure_outputs(plan, store, executor)
        for note in writer.facts["notes"]:
            log.info("evaluate: %s", note)
        for name, table in tables.items():
            pq.write_table(table, writer.path / f"{name}.parquet")

    artifact.make(fill)
    log.info("evaluate: %d systems on %d examples in %s", len(systems), plan.selection.num_rows, artifact.name)
    metrics = [metric for name, judge in config.judges.items() if (metric := judge.score_metric(name)) is not None]
    shared = set[str]()
    if plan.embedder is not None and plan.embedder.fingerprint == ranker:
        judges = plan.embedding_judges()
        shared = win_metrics(judges, [second for _, second in config.compare])
        scores = (config.judges[name].score_metric(name) for name in judges)
        shared |= {metric.name for metric in scores if metric is not None}
        shared |= {"MAUVE", "MAUVE sd"} if config.mauve_model is None else set()
    return Evaluation(artifact, config.baseline, config.ranked_by(), plan.selection, frozenset(shared), metrics)


def selected(config: Evaluate, examples: Examples) -> pa.Table:
    """Return the examples that are evaluated."""
    if config.sample_seed is None or config.examples is None:
        return examples.read(config.split, config.examples)
    return draw(examples.read(config.split), config.examples, config.sample_seed)


def plan_evaluation(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, SystemModel],
    *,
    max_new_tokens: int,
    models: Mapping[str, Model],
    apis: Mapping[str, ApiModel],
    executor: Executor,
) -> EvaluationPlan:
    """Resolve an evaluation to artifacts; the arguments and errors are those of `evaluate`."""
    selection = selected(config, examples)
    if not selection.num_rows:
        raise InputError(f"evaluate.split is {config.split}, which has no examples; raise data.{config.split}")
    embeds_for_mauve = config.mauve_seeds > 0 and config.mauve_model is None
    embedder, embeddings = None, None
    if embeds_for_mauve or any(judge.uses_embeddings for judge in config.judges.values()):
        embedder = locate_embedder(config.embedder, store)
        embeddings = EmbeddingCache(embedder)
    mauve_features, mauve_spec = embeddings, {"embedder": embedder.fingerprint} if embedder is not None else {}
    if config.mauve_model is not None:
        model = models[config.mauve_model]
        encoder = CausalEncoder(model, tokenizer_in(model.path, store))
        mauve_features, mauve_spec = EmbeddingCache(encoder), encoder.spec()
    template = examples.rendering["template"]
    dependencies = JudgeDependencies(store, executor, template, apis, models, embedder, embeddings)
    judges = [judge.open(name, dependencies) for name, judge in config.judges.items()]
    for judge in judges:
        judge.check(selection["target"].to_pylist())
    generations = [
        generation
        for name, system in systems.items()
        for generation in plan_generations(config, store, examples, selection, name, system, max_new_tokens)
    ]
    annotations = None
    if config.annotations is not None:
        annotations = read_annotations(config.annotations, store.hash_file)
    return EvaluationPlan(
        config,
        selection,
        systems,
        generations,
        judges,
        embedder,
        embeddings,
        mauve_features if config.mauve_seeds and selection.num_rows >= MIN_TEXTS else None,
        mauve_spec,
        annotations,
    )


def measure_outputs(plan: EvaluationPlan, store: Store, executor: Executor) -> tuple[dict[str, pa.Table], list[str]]:
    """Judge and measure the generated outputs; return the artifact's tables by name, and the notes."""
    from cpo_pipe.trainer.scoring.logprobs import target_logprobs

    config, selection = plan.config, plan.selection
    ids, targets, cases = selection["example_id"].to_pylist(), read_targets(selection), read_cases(selection)
    outputs = {(one.system, one.decoding): read_outputs(one.rows, ids) for one in plan.generations}
    texts = [text for written in (targets, *outputs.values()) for text in written.texts]
    if plan.embeddings is not None and plan.embedding_judges():
        plan.embeddings.add(texts, "embed outputs")
    comparisons: list[Comparison] = [
        (one.system, one.decoding, opponent) for one in plan.generations for opponent in plan.opponents(one.system)
    ]
    sides = {**outputs, **{(GROUND_TRUTH, decoding): targets for decoding in config.decodings}}
    judgements = judge_outputs(plan.judges, comparisons, cases, sides, store)
    scores = {
        judge.name: score_outputs(judge, cases, outputs) for judge in plan.judges if isinstance(judge, ScoreJudge)
    }
    if plan.mauve_features is not None:  # after the judges, whose models may need all the memory
        plan.mauve_features.add(texts, "MAUVE's features of outputs")

    figures = Figures(ids, Bootstrap(resamples=config.bootstrap, seed=config.seed))
    measure_text(figures, GROUND_TRUTH, ANY_DECODING, targets)
    for system, model in plan.systems.items():
        if isinstance(model, Model):  # an API and a file give no log-probabilities of targets
            measure_likelihood(figures, system, target_logprobs(store, model, selection, executor))
    with track("measure outputs", len(plan.generations) + 1, "tables") as meter:
        for generation in plan.generations:
            system, decoding = generation.system, generation.decoding
            written = outputs[system, decoding]
            measure_text(figures, system, decoding, written)
            if generation.samples > 1:
                measure_diversity(figures, system, decoding, read_samples(generation.rows, ids, generation.samples))
            measure_overlap(figures, system, decoding, written, targets)
            if plan.mauve_features is not None:
                seeds = range(config.seed, config.seed + config.mauve_seeds)
                measure_mauve(figures, system, decoding, written, targets, plan.mauve_features.encode, seeds)
            for judge in plan.judges:
                if isinstance(judge, ScoreJudge):
                    add = figures.add_share if judge.metric.is_share else figures.add_mean
                    add(system, decoding, judge.metric.name, scores[judge.name][system, decoding])
                for opponent in plan.opponents(system):
                    found: list[Judgement] = judgements[judge.name][system, decoding, opponent]
                    against = opponent if opponent != config.baseline else None
                    other = sides[opponent, decoding]
                    measure_wins(figures, judge.name, found, system, decoding, written, other, against)
                    if judge.sees_order and against is None:
                        measure_order(figures, judge.name, system, decoding, found)
            meter.advance()
        fingerprints = {name: model.fingerprint for name, model in plan.systems.items()}
        differences = [
            row
            for judge in plan.judges
            for row in win_differences(figures, judge.name, config.decodings, config.baseline, fingerprints)
        ]
        metric, decoding = config.ranked_by()
        if metric not in {row["metric"] for row in differences}:
            if metric in DIVERSITY:
                written_by = {system: outputs[system, decoding].token_ids for system in plan.systems}
                differences += diversity_differences(
                    metric, decoding, written_by, targets.token_ids, config.baseline, fingerprints, config.seed
                )
            else:
                differences += value_differences(figures, metric, decoding, config.baseline, fingerprints)
        meter.advance()
    winners, places = winners_by_rater(judgements, cases, sides, plan.annotations)
    agreement = pa.Table.from_pylist(agreements(winners, places, figures.bootstrap), schema=AGREEMENT)
    tables = {
        "metrics": figures.metrics(),
        "comparisons": pa.Table.from_pylist(differences, schema=COMPARISONS),
        "agreement": agreement,
        "values": figures.values(),
        "verdicts": verdicts_table(judgements, ids),
        "outputs": outputs_table(ids, [*outputs.items()]),
    }
    return tables, [*_notes(plan, agreement), *_truncation_notes(plan, texts)]


def _notes(plan: EvaluationPlan, agreement: pa.Table) -> Iterator[str]:
    """Yield what a reader of the metrics should know about them."""
    n, targets = plan.selection.num_rows, plan.selection["target"].to_pylist()
    if plan.annotations is not None and HUMANS not in agreement["judge_b"].to_pylist():
        yield (
            f"annotations: none of the {len(plan.annotations)} annotated pairs is among the judged pairs; prompts and "
            "outputs must match exactly"
        )
    if plan.config.mauve_seeds > 0 and plan.mauve_features is None:
        yield f"MAUVE is not measured: it needs at least {MIN_TEXTS} examples, and there are {n}"
    yield from filter(None, (refusal_note(generation, plan.selection) for generation in plan.generations))
    for judge in plan.judges:
        if plan.config.baseline == GROUND_TRUTH and plan.config.judges[judge.name].compares_to_target:
            yield f"{judge.name}: scores similarity to the target, so no system can beat the ground truth"
        yield from judge.notes(targets)


def _truncation_notes(plan: EvaluationPlan, texts: Sequence[str]) -> Iterator[str]:
    """Yield which metrics ignore the ends of outputs or targets because an embedding model truncates them."""
    config = plan.config
    used: list[tuple[EmbeddingCache, str, str, str]] = []
    if plan.embeddings is not None and (judges := plan.embedding_judges()):
        used.append((plan.embeddings, ", ".join(judges), config.embedder, "evaluate.embedder"))
    if plan.mauve_features is not None:
        model, key = config.embedder, "evaluate.embedder"
        if config.mauve_model is not None:
            model, key = config.mauve_model, "evaluate.mauve_model"
        used.append((plan.mauve_features, "MAUVE", model, key))
    for features, names, model, key in used:
        if count := features.truncated(texts):
            remedy = f"set {key} to a model that reads more"
            yield f"{names}: {truncation(count, len(texts), model, features.window(), remedy)}"
