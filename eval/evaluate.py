"""Stage `evaluate`: what the systems write for held-out prompts, measured against the targets and a baseline.

Generations and verdicts are rows and are reused; the figures are one product:

    metrics.parquet   the METRICS schema, a row per system × decoding × metric
    outputs.parquet   every output, so that a report needs no model
    values.parquet    the figures per example that the means were taken of
    manifest.json     what the figures need said beside them (`notes`)
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data.embedding import Embedder, EmbeddingMemo, locate_embedder
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples, selection_hash
from cpo_pipe.data.executor import Executor
from cpo_pipe.data.fingerprint import Spec, address
from cpo_pipe.data.models import Model
from cpo_pipe.data.recipe import GROUND_TRUTH, Decoding, Evaluate
from cpo_pipe.data.store import Product, Rows, Store
from cpo_pipe.eval.judges import ExactJudge, SimilarityJudge
from cpo_pipe.eval.mauve import MIN_TEXTS
from cpo_pipe.eval.measure import ANY_DECODING, Measurement, Outputs, embedding_metrics, read_outputs, read_targets
from cpo_pipe.eval.statistics import Bootstrap
from cpo_pipe.pipeline.engines.base import (
    LazyEngine,
    Sampled,
    Sampling,
    check_context,
    stop_ids,
)
from cpo_pipe.pipeline.missing import Wanted, make_missing

log = logging.getLogger(__name__)

DEFINITIONS = 1
"""Raise when a metric's meaning changes: figures of the old meaning are then made again."""

TargetNll = Callable[[Model, pa.Table], Sequence[tuple[float, int]]]
"""Of a model and examples: each target's log-prob, summed, in nats, and the number of tokens summed over."""

_OUTPUTS = pa.schema(
    [("example_id", pa.string()), ("system", pa.string()), ("decoding", pa.string()), ("text", pa.string())]
)


@dataclass(frozen=True)
class Evaluation:
    """The result of the stage."""

    product: Product
    examples: pa.Table
    """The selection, in order (EXAMPLES schema)."""
    shared_metrics: frozenset[str]
    """Metrics of the embedding model that also ranked the negatives: they favour what was trained on its order."""

    def metrics(self) -> pa.Table:
        """The figures (METRICS schema)."""
        return pq.read_table(self.product.path / "metrics.parquet")

    def outputs(self) -> pa.Table:
        """All outputs: `example_id`, `system`, `decoding`, `text`."""
        return pq.read_table(self.product.path / "outputs.parquet")

    @property
    def notes(self) -> list[str]:
        """What the figures need said beside them."""
        notes: list[str] = self.product.manifest["notes"]
        return notes


@dataclass(frozen=True)
class Generations:
    """Where the outputs of one system under one decoding configuration are."""

    system: str
    decoding: str
    sampling: Sampling
    rows: Rows


@dataclass(frozen=True)
class Comparison:
    """What is wanted, resolved to artifacts."""

    config: Evaluate
    selection: pa.Table
    systems: Mapping[str, Model]
    generations: list[Generations]
    judges: list[ExactJudge | SimilarityJudge]
    embedder: Embedder | None
    memo: EmbeddingMemo | None
    """What judges and MAUVE embed with; None if neither does."""

    def with_mauve(self) -> bool:
        """Whether MAUVE is asked for, and there are examples enough for it to say something."""
        return self.config.mauve_seeds > 0 and self.selection.num_rows >= MIN_TEXTS

    def spec(self) -> Spec:
        """What decides the figures. The ranker does not: it decides only how they are marked."""
        config = self.config
        return {
            "definitions": DEFINITIONS,
            "examples": selection_hash(self.selection),
            "systems": {name: model.fingerprint for name, model in self.systems.items()},
            "generations": [[g.system, g.decoding, address(g.rows.spec)] for g in self.generations],
            "baseline": config.baseline,
            "judges": [judge.spec() for judge in self.judges],
            "mauve": {"embedder": self.embedder.fingerprint, "seeds": config.mauve_seeds} if self.embedder else None,
            "bootstrap": config.bootstrap,
            "seed": config.seed,
        }


def evaluate(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, Model],
    *,
    max_new_tokens: int,
    ranker: str | None,
    target_nll: TargetNll,
    executor: Executor,
) -> Evaluation:
    """Make what is missing of a comparison; with nothing missing, no model is loaded.

    Args:
        config: the recipe's section.
        store: where artifacts are.
        examples: the prepared examples.
        systems: the models on disk, by system; ensembles are merged already.
        max_new_tokens: longest output, in tokens.
        ranker: fingerprint of the embedding model that ranked the negatives, if one did.
        target_nll: gives the targets' log-probs under a model; called only if figures are to be made.
        executor: samples the outputs.

    Raises:
        InputError: the split is empty, a model's context is too short for a prompt and what follows it, or
            `exact_pattern` does not fit.
    """
    wanted = _plan(config, store, examples, systems, max_new_tokens)
    product = store.product("metrics", wanted.spec())
    if not product.complete():
        with product.lock():
            if not product.complete():  # again: another process may have made it while we waited
                for name, model in systems.items():
                    outputs = [g for g in wanted.generations if g.system == name]
                    _generate(config, examples, wanted.selection, model, outputs, executor)
                _write(product, wanted, store, target_nll)
    log.info("evaluate: %d systems on %d examples in %s", len(systems), wanted.selection.num_rows, product.name)
    shared = wanted.embedder is not None and wanted.embedder.fingerprint == ranker
    return Evaluation(product, wanted.selection, embedding_metrics() if shared else frozenset())


# ── what is wanted ───────────────────────────────────────────────────────────────────────────────────────────────


def _plan(
    config: Evaluate, store: Store, examples: Examples, systems: Mapping[str, Model], max_new_tokens: int
) -> Comparison:
    selection = examples.read(config.split, config.examples)
    if not selection.num_rows:
        raise InputError(f"evaluate.split is {config.split}, which has no examples: raise data.{config.split}")
    needed = config.mauve_seeds > 0 or SimilarityJudge.name in config.judges
    embedder = locate_embedder(config.embedder, store) if needed else None
    memo = EmbeddingMemo(embedder) if embedder else None
    judges = _judges(config, embedder, memo)
    for judge in judges:
        if isinstance(judge, ExactJudge):
            _check_pattern(config, judge, selection)
    generations = [
        wanted
        for system, model in systems.items()
        for wanted in _plan_system(config, store, examples, selection, system, model, max_new_tokens)
    ]
    return Comparison(config, selection, systems, generations, judges, embedder, memo)


def _judges(
    config: Evaluate, embedder: Embedder | None, memo: EmbeddingMemo | None
) -> list[ExactJudge | SimilarityJudge]:
    judges: list[ExactJudge | SimilarityJudge] = []
    for name in dict.fromkeys(config.judges):
        if name == ExactJudge.name:
            judges.append(ExactJudge(config.exact_pattern))
        elif embedder is not None and memo is not None:
            judges.append(SimilarityJudge(memo.encode, embedder.fingerprint))
    return judges


def _plan_system(
    config: Evaluate,
    store: Store,
    examples: Examples,
    selection: pa.Table,
    system: str,
    model: Model,
    max_new_tokens: int,
) -> list[Generations]:
    check_context(selection, model, max_new_tokens, "evaluate.max_new_tokens")
    _check_targets(config, selection, model)
    ends = stop_ids(model, examples.tokenizer)
    generations = []
    for name, decoding in config.decodings.items():
        sampling = _sampling(decoding, max_new_tokens, ends)
        spec: Spec = {"model": model.fingerprint, "prompt": examples.rendering, "sampling": sampling.spec()}
        if sampling.temperature > 0:
            spec["seed"] = config.seed
        generations.append(Generations(system, name, sampling, store.rows("generations", spec)))
    return generations


def _check_targets(config: Evaluate, selection: pa.Table, model: Model) -> None:
    """Refuse targets that a model cannot see to their end, of which it could give no log-prob."""
    context = model.context()
    lengths = [pc.list_value_length(selection[name]) for name in ("prompt_ids", "target_ids")]
    longest = pc.max(pc.add(*lengths)).as_py()
    if context is not None and longest > context:
        raise InputError(
            f"evaluate.split is {config.split}, whose longest prompt and target together have {longest} tokens, but "
            f"the context of {model.name} is {context} tokens: lower data.max_prompt_tokens and data.max_target_tokens "
            "(of cut text data.piece_tokens), or compare models with a longer context"
        )


def _sampling(decoding: Decoding, max_new_tokens: int, ends: tuple[int, ...]) -> Sampling:
    return Sampling(
        temperature=decoding.temperature, top_k=decoding.top_k, max_new_tokens=max_new_tokens, stop_ids=ends
    )


def _check_pattern(config: Evaluate, judge: ExactJudge, selection: pa.Table) -> None:
    if _unanswered(judge, selection) == selection.num_rows:
        raise InputError(
            f"evaluate.exact_pattern is {config.exact_pattern!r}: it matches none of the {selection.num_rows} "
            "targets, so no output could be right; correct it, or leave it out to compare whole texts"
        )


def _unanswered(judge: ExactJudge, selection: pa.Table) -> int:
    return sum(judge.answer(target) is None for target in selection["target"].to_pylist())


# ── making it ────────────────────────────────────────────────────────────────────────────────────────────────────


def _generate(
    config: Evaluate,
    examples: Examples,
    selection: pa.Table,
    model: Model,
    generations: Sequence[Generations],
    executor: Executor,
) -> None:
    """Sample what one system lacks. Its engine is loaded once, and only if needed."""
    longest = max(wanted.sampling.max_new_tokens for wanted in generations)
    engine = LazyEngine(config.engine, model, check_context(selection, model, longest, "evaluate.max_new_tokens"))
    for wanted in generations:
        made = make_missing(
            Wanted(wanted.rows, 1),
            selection,
            Sampled(wanted.rows, engine, wanted.sampling, config.seed, examples.tokenizer),
            executor,
            batch_size=config.batch_size,
            label=f"evaluate {wanted.system}, {wanted.decoding}",
        )
        log.info("evaluate: outputs of %s, %s in %s (%d made, %d reused)", wanted.system, wanted.decoding,
                 wanted.rows.name, made, selection.num_rows - made)  # fmt: skip


def _write(product: Product, wanted: Comparison, store: Store, target_nll: TargetNll) -> None:
    """Measure all there is and make the product of it."""
    example_ids = wanted.selection["example_id"].to_pylist()
    outputs = {(g.system, g.decoding): read_outputs(g.rows, example_ids) for g in wanted.generations}
    measured = _measure(wanted, outputs, store, target_nll)
    notes = _notes(wanted)
    for note in notes:
        log.info("evaluate: %s", note)
    with product.create() as writer:
        writer.facts["notes"] = notes
        pq.write_table(measured.figures(), writer.path / "metrics.parquet")
        pq.write_table(measured.values(), writer.path / "values.parquet")
        pq.write_table(_output_table(example_ids, outputs), writer.path / "outputs.parquet")


def _measure(
    wanted: Comparison, all_outputs: Mapping[tuple[str, str], Outputs], store: Store, target_nll: TargetNll
) -> Measurement:
    config, example_ids = wanted.config, wanted.selection["example_id"].to_pylist()
    targets = read_targets(wanted.selection)
    if wanted.memo is not None and (wanted.with_mauve() or SimilarityJudge.name in config.judges):
        texts = [text for outputs in (targets, *all_outputs.values()) for text in outputs.texts]
        wanted.memo.add(texts, "embed outputs")
    measured = Measurement(example_ids, targets, Bootstrap(resamples=config.bootstrap, seed=config.seed))
    measured.measure_text(GROUND_TRUTH, ANY_DECODING, targets)
    for system, model in wanted.systems.items():
        measured.measure_nll(system, target_nll(model, wanted.selection))
    for (system, decoding), outputs in all_outputs.items():
        measured.measure_text(system, decoding, outputs)
        measured.measure_overlap(system, decoding, outputs)
        if wanted.memo is not None and wanted.with_mauve():
            seeds = range(config.seed, config.seed + config.mauve_seeds)
            measured.measure_mauve(system, decoding, outputs, wanted.memo.encode, seeds)
        for judge in wanted.judges:
            measured.measure_score(judge, system, decoding, outputs)
            if system != config.baseline:
                verdicts = store.rows("verdicts", judge.spec())
                measured.measure_wins(
                    judge, verdicts, system, decoding, outputs, all_outputs[config.baseline, decoding]
                )
    return measured


def _notes(wanted: Comparison) -> list[str]:
    notes, n = [], wanted.selection.num_rows
    if wanted.config.mauve_seeds > 0 and not wanted.with_mauve():
        notes.append(f"MAUVE is left out: on {n} examples it says nothing; it needs {MIN_TEXTS} at least")
    for judge in wanted.judges:
        if isinstance(judge, ExactJudge) and (unanswered := _unanswered(judge, wanted.selection)):
            notes.append(
                f"exact: the pattern matches nothing in {unanswered} of {n} targets; there every output counts as wrong"
            )
    return notes


def _output_table(example_ids: Sequence[str], all_outputs: Mapping[tuple[str, str], Outputs]) -> pa.Table:
    n = len(example_ids)
    tables = []
    for (system, decoding), outputs in all_outputs.items():
        columns = [example_ids, [system] * n, [decoding] * n, outputs.texts]
        tables.append(pa.table(dict(zip(_OUTPUTS.names, columns, strict=True)), schema=_OUTPUTS))
    return pa.concat_tables(tables)
