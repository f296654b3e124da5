"""Stage `evaluate`: what the systems write for held-out prompts, measured against the targets and a baseline.

Generations and verdicts are rows and are reused; the figures are one product:

    metrics.parquet       the METRICS schema, a row per system × decoding × metric
    comparisons.parquet   the COMPARISONS schema, a row per judge × decoding × two systems
    agreement.parquet     the AGREEMENT schema, a row per two judges, or a judge and the labels of people
    outputs.parquet       every output, so that a report needs no model
    values.parquet        the figures per example that the means were taken of
    verdicts.parquet      the VERDICTS schema, how each output was judged, in each order
    manifest.json         what the figures need said beside them (`notes`)
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data.embedding import Embedder, EmbeddingMemo, locate_embedder, truncation
from cpo_pipe.data.end_tokens import end_tokens
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples, draw, selection_hash
from cpo_pipe.data.executor import Executor, LocalExecutor
from cpo_pipe.data.fingerprint import Spec, address
from cpo_pipe.data.models import Model
from cpo_pipe.data.recipe import GROUND_TRUTH, Decoding, Evaluate
from cpo_pipe.data.store import Product, Rows, Store
from cpo_pipe.eval.agreement import PEOPLE
from cpo_pipe.eval.judges.base import Case, Judge, Judgement, Pair, Winner, make_verdicts, read_judgements
from cpo_pipe.eval.judges.cost import Cost, Draft, cost
from cpo_pipe.eval.judges.openai import OpenAiJudge
from cpo_pipe.eval.judges.resolve import Means, named_spec, open_judges, own_tokenizer
from cpo_pipe.eval.judges.scores import ExactJudge, ScoreJudge, SimilarityJudge
from cpo_pipe.eval.labels import Labels, read_labels
from cpo_pipe.eval.mauve import MIN_TEXTS, CausalEncoder
from cpo_pipe.eval.measure import (
    ANY_DECODING,
    Measurement,
    Outputs,
    embedding_metrics,
    read_outputs,
    read_samples,
    read_targets,
)
from cpo_pipe.eval.outputs_cost import outputs_cost
from cpo_pipe.eval.statistics import Bootstrap
from cpo_pipe.pipeline.engines.base import (
    LazyEngine,
    Sampled,
    Sampling,
    check_context,
)
from cpo_pipe.pipeline.engines.openai import ApiModel, Asked, Tokens, prompt_of
from cpo_pipe.pipeline.missing import WINDOW, Wanted, make_missing, refused_source

log = logging.getLogger(__name__)

DEFINITIONS = 5
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

    def comparisons(self) -> pa.Table:
        """The systems pair by pair (COMPARISONS schema)."""
        return pq.read_table(self.product.path / "comparisons.parquet")

    def agreements(self) -> pa.Table:
        """The judges, and the labels of people, pair by pair (AGREEMENT schema)."""
        return pq.read_table(self.product.path / "agreement.parquet")

    def verdicts(self) -> pa.Table:
        """How each output was judged (VERDICTS schema of eval/measure.py)."""
        return pq.read_table(self.product.path / "verdicts.parquet")

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
    refused: Rows | None = None
    """Of an API: outputs that it will never give, with the reason (REJECTED schema)."""


@dataclass(frozen=True)
class Comparison:
    """What is wanted, resolved to artifacts."""

    config: Evaluate
    selection: pa.Table
    systems: Mapping[str, Model | ApiModel]
    generations: list[Generations]
    judges: list[Judge]
    embedder: Embedder | None
    memo: EmbeddingMemo | None
    """What judges embed with, and MAUVE where it goes by sentence embeddings; None if neither does."""
    mauve: EmbeddingMemo | None
    """What gives MAUVE its features; None where it is not asked for."""
    mauve_features: Spec
    """What decides these features."""
    labels: Labels | None

    def with_mauve(self) -> bool:
        """Whether MAUVE is asked for, and there are examples enough for it to say something."""
        return self.mauve is not None and self.selection.num_rows >= MIN_TEXTS

    def opponents(self, system: str) -> list[str]:
        """Whom a system's outputs are judged against: the baseline first, then those that `compare` names."""
        baseline = [self.config.baseline] if system != self.config.baseline else []
        return [*baseline, *(second for first, second in dict.fromkeys(self.config.compare) if first == system)]

    def spec(self) -> Spec:
        """What decides the figures. The ranker does not: it decides only how they are marked."""
        config = self.config
        return {
            "definitions": DEFINITIONS,
            "examples": selection_hash(self.selection),
            "systems": {name: model.fingerprint for name, model in self.systems.items()},
            "generations": [[g.system, g.decoding, address(g.rows.spec)] for g in self.generations],
            "baseline": config.baseline,
            **({"compare": [[*pair] for pair in config.compare]} if config.compare else {}),
            "judges": [named_spec(config, judge) for judge in self.judges],
            "mauve": {**self.mauve_features, "seeds": config.mauve_seeds} if self.mauve_features else None,
            **({"samples": several} if (several := _several(config)) else {}),
            **({"labels": self.labels.sha256} if self.labels else {}),
            "bootstrap": config.bootstrap,
            "seed": config.seed,
        }


def evaluate(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, Model | ApiModel],
    *,
    max_new_tokens: int,
    ranker: str | None,
    target_nll: TargetNll,
    judging: Means,
    executor: Executor,
) -> Evaluation:
    """Make what is missing of a comparison; with nothing missing, no model is loaded.

    Args:
        config: the recipe's section.
        store: where artifacts are.
        examples: the prepared examples.
        systems: the models, by system; ensembles are merged already.
        max_new_tokens: longest output, in tokens.
        ranker: fingerprint of the embedding model that ranked the negatives, if one did.
        target_nll: gives the targets' log-probs under a model; called only if figures are to be made.
        judging: what judges are made with.
        executor: samples the outputs.

    Raises:
        InputError: the split is empty, a model's context is too short for a prompt and what follows it, or
            a judge's `pattern` does not fit.
        RunError: an API did not answer all that it was asked; what it answered is kept.
    """
    wanted = _plan(config, store, examples, systems, max_new_tokens, judging)
    product = store.product("metrics", wanted.spec())
    if not product.complete():
        with product.lock():
            if not product.complete():  # again: another process may have made it while we waited
                for name, model in systems.items():
                    outputs = [g for g in wanted.generations if g.system == name]
                    if isinstance(model, ApiModel):
                        _ask(config, examples, wanted.selection, model, outputs)
                    else:
                        _generate(config, examples, wanted.selection, model, outputs, executor)
                _write(product, wanted, store, target_nll)
    log.info("evaluate: %d systems on %d examples in %s", len(systems), wanted.selection.num_rows, product.name)
    ranked = wanted.embedder is not None and wanted.embedder.fingerprint == ranker
    against = [second for _, second in config.compare]
    by_embedding = config.mauve_model is None
    shared = embedding_metrics(_similarity(wanted.judges), against, by_embedding) if ranked else frozenset[str]()
    return Evaluation(product, wanted.selection, shared)


def evaluation_costs(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, Model | ApiModel | None],
    *,
    max_new_tokens: int,
    judging: Means,
) -> tuple[list[tuple[str, ApiModel, Cost]], dict[tuple[str, str], int]]:
    """What APIs would still be asked, as systems and then as judges; nothing is asked, made or loaded.

    Args:
        config: the recipe's section.
        store: where artifacts are.
        examples: the prepared examples.
        systems: the models, by system; None of one that is not there yet.
        max_new_tokens: longest output, in tokens; what an output that is not there yet counts as.
        judging: what judges are made with.

    Returns:
        Who they are asked as (`judge gpt`; `system gpt, greedy`), with their costs; and where judges ask, by system and
        decoding how many outputs are not there yet.
    """
    asking = {name: judge for name, judge in config.judges.items() if judge.kind == "openai"}
    config = config.model_copy(update={"judges": asking, "mauve_seeds": 0, "mauve_model": None, "labels": None})
    there = {name: model for name, model in systems.items() if model is not None}
    wanted = _plan(config, store, examples, there, max_new_tokens, judging)
    cases, ids = _cases(wanted.selection), wanted.selection["example_id"]
    sides: dict[tuple[str, str], list[str | None]] = {
        (name, decoding): [None] * len(cases) for name in systems for decoding in config.decodings
    }
    sides |= {(GROUND_TRUTH, decoding): [case.target for case in cases] for decoding in config.decodings}
    costs: list[tuple[str, ApiModel, Cost]] = []
    counted: dict[str, Cost] = {}

    def add(what: str, api: ApiModel, rows: Rows, whole: Cost) -> None:
        """Of two that share an artifact, the second asks only for what the first does not."""
        before = counted.get(rows.name, Cost(0, Tokens()))
        most = Cost(
            max(whole.calls, before.calls),
            Tokens(max(whole.tokens.prompt, before.tokens.prompt), max(whole.tokens.written, before.tokens.written)),
        )
        counted[rows.name] = most
        costs.append((what, api, Cost(most.calls - before.calls, most.tokens - before.tokens)))

    for g in wanted.generations:
        absent_EN = Wanted(g.rows, config.decodings[g.decoding].samples, g.refused).missing(ids)
        texts = zip(absent_EN[:, 0], read_outputs(g.rows, ids.to_pylist()).texts, strict=True)
        sides[g.system, g.decoding] = [None if absent else text for absent, text in texts]
        if isinstance(api := systems[g.system], ApiModel):
            outputs = outputs_cost(api, wanted.selection, absent_EN.sum(axis=1).tolist(), max_new_tokens)
            add(f"system {g.system}, {g.decoding}", api, g.rows, outputs)
    drafts = [
        Draft(*fields)
        for system in systems
        for whom in wanted.opponents(system)
        for decoding in config.decodings
        for fields in zip(cases, sides[system, decoding], sides[whom, decoding], strict=True)
    ]
    for judge in wanted.judges:
        assert isinstance(judge, OpenAiJudge)
        rows = store.rows("verdicts", judge.spec())
        add(f"judge {judge.name}", judge.api, rows, cost(judge, drafts, max_new_tokens, rows))
    return costs, {of: missing for of, texts in sides.items() if asking and (missing := texts.count(None))}


# ── what is wanted ───────────────────────────────────────────────────────────────────────────────────────────────


def _plan(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, Model | ApiModel],
    max_new_tokens: int,
    judging: Means,
) -> Comparison:
    selection = _select(config, examples)
    if not selection.num_rows:
        raise InputError(f"evaluate.split is {config.split}, which has no examples: raise data.{config.split}")
    embedding_mauve = config.mauve_seeds > 0 and config.mauve_model is None
    needed = embedding_mauve or any(judge.kind == "similarity" for judge in config.judges.values())
    embedder = locate_embedder(config.embedder, store) if needed else None
    memo = EmbeddingMemo(embedder) if embedder else None
    mauve, features = memo, {"embedder": embedder.fingerprint} if embedder else {}
    if config.mauve_model is not None:
        model = judging.model(config.mauve_model)
        encoder = CausalEncoder(model, own_tokenizer(model, store))
        mauve, features = EmbeddingMemo(encoder), encoder.spec()
    judges = open_judges(config, store, judging, examples.rendering["template"], embedder, memo)
    for judge in judges:
        if isinstance(judge, ExactJudge):
            _check_pattern(config, judge, selection)
    generations = [
        wanted
        for system, model in systems.items()
        for wanted in _plan_system(config, store, examples, selection, system, model, max_new_tokens)
    ]
    labels = read_labels(Path(config.labels), store.hash_file) if config.labels is not None else None
    mauve = mauve if config.mauve_seeds else None
    return Comparison(config, selection, systems, generations, judges, embedder, memo, mauve, features, labels)


def _select(config: Evaluate, examples: Examples) -> pa.Table:
    """The examples evaluated on: the split's first, or drawn by a seed."""
    if config.sample_seed is None or config.examples is None:
        return examples.read(config.split, config.examples)
    return draw(examples.read(config.split), config.examples, config.sample_seed)


def _plan_system(
    config: Evaluate,
    store: Store,
    examples: Examples,
    selection: pa.Table,
    system: str,
    model: Model | ApiModel,
    max_new_tokens: int,
) -> list[Generations]:
    if isinstance(model, ApiModel):
        return _plan_asked(config, store, examples, system, model, max_new_tokens)
    check_context(selection, model, max_new_tokens, "evaluate.max_new_tokens")
    _check_targets(config, selection, model)
    ends = end_tokens(model.path, examples.tokenizer)
    generations = []
    for name, decoding in config.decodings.items():
        sampling = _sampling(decoding, max_new_tokens, ends)
        spec: Spec = {"model": model.fingerprint, "prompt": examples.rendering, "sampling": sampling.spec()}
        if sampling.temperature > 0:
            spec["seed"] = config.seed
        generations.append(Generations(system, name, sampling, store.rows("generations", spec)))
    return generations


def _plan_asked(
    config: Evaluate, store: Store, examples: Examples, system: str, api: ApiModel, max_new_tokens: int
) -> list[Generations]:
    generations = []
    for name, decoding in config.decodings.items():
        sampling = _sampling(decoding, max_new_tokens, ())
        spec: Spec = {"model": api.spec(), "prompt": examples.rendering, "sampling": api.obeyed(sampling).spec()}
        if sampling.temperature > 0:
            spec["seed"] = config.seed
        rows, refused = store.rows("generations", spec), store.rows("rejected", {"of": spec})
        generations.append(Generations(system, name, sampling, rows, refused))
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
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        top_p=decoding.top_p,
        beams=decoding.beams,
        max_new_tokens=max_new_tokens,
        stop_ids=ends,
    )


def _check_pattern(config: Evaluate, judge: ExactJudge, selection: pa.Table) -> None:
    if _unanswered(judge, selection) == selection.num_rows:
        raise InputError(
            f"evaluate.judges.{judge.name}.pattern is {config.judges[judge.name].pattern!r}: it matches none of the "
            f"{selection.num_rows} "
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
    """Sample what one system lacks. Its engine is loaded once, and only if needed; beam search may need another."""
    longest = max(wanted.sampling.max_new_tokens for wanted in generations)
    engine = LazyEngine(config.engine, model, check_context(selection, model, longest, "evaluate.max_new_tokens"))
    for wanted in sorted(generations, key=lambda wanted: wanted.sampling.beams):
        samples = config.decodings[wanted.decoding].samples
        made = make_missing(
            Wanted(wanted.rows, samples),
            selection,
            Sampled(wanted.rows, engine, wanted.sampling, config.seed, examples.tokenizer),
            executor,
            batch_size=config.batch_size,
            label=f"evaluate {wanted.system}, {wanted.decoding}",
        )
        log.info("evaluate: outputs of %s, %s in %s (%d made, %d reused)", wanted.system, wanted.decoding,
                 wanted.rows.name, made, selection.num_rows * samples - made)  # fmt: skip


def _ask(
    config: Evaluate, examples: Examples, selection: pa.Table, api: ApiModel, generations: Sequence[Generations]
) -> None:
    """Ask an API for what it has not yet answered; one process sends all requests, and so keeps the caps."""
    for wanted in generations:
        assert wanted.refused is not None
        samples = config.decodings[wanted.decoding].samples
        work = Asked(wanted.rows, wanted.refused, api, wanted.sampling, config.seed, examples.tokenizer, prompt_of)
        made = make_missing(
            Wanted(wanted.rows, samples, wanted.refused),
            selection,
            work,
            LocalExecutor(),
            batch_size=WINDOW,
            label=f"evaluate {wanted.system}, {wanted.decoding}",
        )
        work.check()
        log.info("evaluate: outputs of %s, %s in %s (%d made, %d reused)", wanted.system, wanted.decoding,
                 wanted.rows.name, made, selection.num_rows * samples - made)  # fmt: skip


def _write(product: Product, wanted: Comparison, store: Store, target_nll: TargetNll) -> None:
    """Measure all there is and make the product of it."""
    example_ids = wanted.selection["example_id"].to_pylist()
    outputs = {(g.system, g.decoding): read_outputs(g.rows, example_ids) for g in wanted.generations}
    measured = _measure(wanted, outputs, store, target_nll)
    texts = [text for of in (read_targets(wanted.selection), *outputs.values()) for text in of.texts]
    notes = [*_notes(wanted, measured), *_truncation_notes(wanted, texts)]
    for note in notes:
        log.info("evaluate: %s", note)
    with product.create() as writer:
        writer.facts["notes"] = notes
        pq.write_table(measured.figures(), writer.path / "metrics.parquet")
        pq.write_table(measured.comparisons(), writer.path / "comparisons.parquet")
        pq.write_table(measured.agreements(), writer.path / "agreement.parquet")
        pq.write_table(measured.values(), writer.path / "values.parquet")
        pq.write_table(measured.verdicts(), writer.path / "verdicts.parquet")
        pq.write_table(_output_table(example_ids, outputs), writer.path / "outputs.parquet")


def _measure(
    wanted: Comparison, all_outputs: Mapping[tuple[str, str], Outputs], store: Store, target_nll: TargetNll
) -> Measurement:
    config, example_ids = wanted.config, wanted.selection["example_id"].to_pylist()
    targets = read_targets(wanted.selection)
    texts = [text for outputs in (targets, *all_outputs.values()) for text in outputs.texts]
    if wanted.memo is not None and _similarity(wanted.judges):
        wanted.memo.add(texts, "embed outputs")
    cases = _cases(wanted.selection)
    sides = {**all_outputs, **{(GROUND_TRUTH, decoding): targets for decoding in config.decodings}}
    judgements = _judge(wanted, cases, sides, store)
    scores = _scores(wanted.judges, cases, all_outputs)
    if wanted.mauve is not None and wanted.with_mauve():  # after the judges, whose models may need all the memory
        wanted.mauve.add(texts, "MAUVE's features of outputs")
    measured = Measurement(example_ids, targets, Bootstrap(resamples=config.bootstrap, seed=config.seed))
    measured.measure_text(GROUND_TRUTH, ANY_DECODING, targets)
    for system, model in wanted.systems.items():
        if isinstance(model, ApiModel):  # which says nothing of texts that are not its own
            continue
        measured.measure_nll(system, target_nll(model, wanted.selection))
    for g in wanted.generations:
        system, decoding, outputs = g.system, g.decoding, all_outputs[g.system, g.decoding]
        measured.measure_text(system, decoding, outputs)
        if (n := config.decodings[decoding].samples) > 1:
            measured.measure_diversity(system, decoding, read_samples(g.rows, example_ids, n))
        measured.measure_overlap(system, decoding, outputs)
        if wanted.mauve is not None and wanted.with_mauve():
            seeds = range(config.seed, config.seed + config.mauve_seeds)
            measured.measure_mauve(system, decoding, outputs, wanted.mauve.encode, seeds)
        for judge in wanted.judges:
            if isinstance(judge, ScoreJudge):
                measured.measure_score(judge, system, decoding, scores[judge.name, system, decoding])
            for whom in wanted.opponents(system):
                found, other = judgements[judge.name, system, decoding, whom], sides[whom, decoding]
                against = whom if whom != config.baseline else None
                measured.keep_judgements(judge, system, whom, decoding, found)
                measured.measure_wins(judge, found, system, decoding, outputs, other, against)
                if judge.sees_order and against is None:
                    measured.measure_order(judge, system, decoding, found)
    measured.measure_differences(config.baseline, {name: model.fingerprint for name, model in wanted.systems.items()})
    measured.measure_agreement(*_compared_verdicts(wanted, cases, sides, judgements))
    return measured


def _cases(selection: pa.Table) -> list[Case]:
    columns = (selection[name].to_pylist() for name in ("example_id", "prompt", "rendered"))
    return [Case(*fields) for fields in zip(*columns, read_targets(selection).texts, strict=True)]


def _judge(
    wanted: Comparison, cases: Sequence[Case], sides: Mapping[tuple[str, str], Outputs], store: Store
) -> dict[tuple[str, str, str, str], list[Judgement]]:
    """By judge, system, decoding and opponent, what the judge makes of the outputs against the opponent's.

    All is asked before anything is measured: what an API leaves unanswered keeps nothing else from being judged.
    """
    pairs = {
        (g.system, g.decoding, whom): [
            Pair(*fields)
            for fields in zip(cases, sides[g.system, g.decoding].texts, sides[whom, g.decoding].texts, strict=True)
        ]
        for g in wanted.generations
        for whom in wanted.opponents(g.system)
    }
    verdicts = {judge.name: store.rows("verdicts", judge.spec()) for judge in wanted.judges}
    for judge in wanted.judges:
        make_verdicts(judge, list(chain.from_iterable(pairs.values())), verdicts[judge.name])
    for judge in wanted.judges:
        if isinstance(judge, OpenAiJudge):
            judge.api.check_answered()
    return {
        (judge.name, *of): read_judgements(judge, some, verdicts[judge.name])
        for judge in wanted.judges
        for of, some in pairs.items()
    }


def _compared_verdicts(
    wanted: Comparison,
    cases: Sequence[Case],
    sides: Mapping[tuple[str, str], Outputs],
    judgements: Mapping[tuple[str, str, str, str], Sequence[Judgement]],
) -> tuple[dict[str, list[Winner | None]], list[int]]:
    """By judge its verdicts, and what people say, on each pair of unequal outputs once; and the pairs' examples."""
    verdicts: dict[str, list[Winner | None]] = {judge.name: [] for judge in wanted.judges}
    if wanted.labels is not None:
        verdicts[PEOPLE] = []
    examples: list[int] = []
    seen = set[tuple[int, str, str]]()
    for system, decoding, whom in dict.fromkeys((system, decoding, whom) for _, system, decoding, whom in judgements):
        texts = zip(sides[system, decoding].texts, sides[whom, decoding].texts, strict=True)
        for place, (case, (a, b)) in enumerate(zip(cases, texts, strict=True)):
            if a == b or (place, a, b) in seen:
                continue
            seen |= {(place, a, b), (place, b, a)}
            examples.append(place)
            for judge in wanted.judges:
                verdicts[judge.name].append(judgements[judge.name, system, decoding, whom][place].winner)
            if wanted.labels is not None:
                verdicts[PEOPLE].append(wanted.labels.winner(Pair(case, a, b)))
    return verdicts, examples


def _scores(
    judges: Sequence[Judge], cases: Sequence[Case], all_outputs: Mapping[tuple[str, str], Outputs]
) -> dict[tuple[str, str, str], list[float]]:
    """By judge, system and decoding the outputs' scores; of all in one call, so that a model is loaded once."""
    texts = [text for outputs in all_outputs.values() for text in outputs.texts]
    scores: dict[tuple[str, str, str], list[float]] = {}
    for judge in judges:
        if isinstance(judge, ScoreJudge):
            found = judge.scores([*cases] * len(all_outputs), texts)
            for place, of in enumerate(all_outputs):
                scores[judge.name, *of] = found[place * len(cases) : (place + 1) * len(cases)]
    return scores


def _several(config: Evaluate) -> dict[str, int]:
    """Samples per prompt of the decodings that have more than one."""
    return {name: decoding.samples for name, decoding in config.decodings.items() if decoding.samples > 1}


def _similarity(judges: Sequence[Judge]) -> list[str]:
    """Names of the judges that embed."""
    return [judge.name for judge in judges if isinstance(judge, SimilarityJudge)]


def _notes(wanted: Comparison, measured: Measurement) -> list[str]:
    notes, n, targets = [], wanted.selection.num_rows, wanted.selection["target"].to_pylist()
    if wanted.labels is not None and PEOPLE not in measured.agreements()["judge_b"].to_pylist():
        notes.append(
            f"labels: none of the {len(wanted.labels)} labelled pairs is among those judged here: their texts must be "
            "the same to the letter"
        )
    if wanted.config.mauve_seeds > 0 and not wanted.with_mauve():
        notes.append(f"MAUVE is left out: on {n} examples it says nothing; it needs {MIN_TEXTS} at least")
    for g in wanted.generations:
        if g.refused is not None:
            ids = wanted.selection["example_id"].to_pylist()
            refused = g.refused.read(ids, ["example_id", "source", "reason"])
            refused = refused.filter(pc.equal(refused["source"], refused_source(0)))  # all but the first count as none
            reasons = Counter(refused["reason"].to_pylist())
            why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            if reasons:
                notes.append(
                    f"{g.system}, {g.decoding}: the API refused {reasons.total()} of {n} outputs ({why}); each counts "
                    "as an empty one"
                )
    for judge in wanted.judges:
        if wanted.config.baseline == GROUND_TRUTH and isinstance(judge, ExactJudge | SimilarityJudge):
            notes.append(f"{judge.name}: goes by likeness to the target, so against the ground truth none can win")
        if isinstance(judge, ExactJudge) and (unanswered := _unanswered(judge, wanted.selection)):
            notes.append(
                f"{judge.name}: the pattern matches nothing in {unanswered} of {n} targets; there every output counts "
                "as wrong"
            )
        cuts = [judge.cut_number(target) for target in targets] if isinstance(judge, ExactJudge) else []
        if found := [cut for cut in cuts if cut]:
            answer, number = found[0]
            notes.append(
                f"{judge.name}: the pattern reads only a part of the number in {len(found)} of {n} targets, such as "
                f"{answer} of {number}: different numbers count as equal; extend the first group, as in "
                "####\\s*([-$€£¥]*[0-9,.]*[0-9])"
            )
    return notes


def _truncation_notes(wanted: Comparison, texts: Sequence[str]) -> Iterator[str]:
    """Say which figures ignore the ends of texts, of the outputs and targets that were embedded for them."""
    by_memo: list[tuple[EmbeddingMemo, str, str, str]] = []
    config = wanted.config
    if wanted.memo is not None and (judges := _similarity(wanted.judges)):
        by_memo.append((wanted.memo, ", ".join(judges), config.embedder, "evaluate.embedder"))
    if wanted.mauve is not None and wanted.with_mauve():
        model, setting = config.embedder, "evaluate.embedder"
        if config.mauve_model is not None:
            model, setting = config.mauve_model, "evaluate.mauve_model"
        by_memo.append((wanted.mauve, "MAUVE", model, setting))
    for memo, names, model, setting in by_memo:
        if count := memo.truncated(texts):
            remedy = f"set {setting} to a model that reads more"
            yield f"{names}: {truncation(count, len(texts), model, memo.window(), remedy)}"


def _output_table(example_ids: Sequence[str], all_outputs: Mapping[tuple[str, str], Outputs]) -> pa.Table:
    n = len(example_ids)
    tables = []
    for (system, decoding), outputs in all_outputs.items():
        columns = [example_ids, [system] * n, [decoding] * n, outputs.texts]
        tables.append(pa.table(dict(zip(_OUTPUTS.names, columns, strict=True)), schema=_OUTPUTS))
    return pa.concat_tables(tables)
