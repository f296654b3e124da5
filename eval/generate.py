"""The outputs of the systems: where they are stored, how missing ones are generated, and how they are read."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import Executor, LocalExecutor
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.end_tokens import end_tokens, without_end
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.eval.config import Evaluate
from cpo_pipe.eval.output_file import OutputFile, OutputFileWork
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.api.work import ApiWork, prompt_of
from cpo_pipe.pipeline.engines.base import Sampling, check_context
from cpo_pipe.pipeline.samples import WINDOW, EngineWork, LazyEngine, SampleRequest, make_missing, refused_source

log = logging.getLogger(__name__)

SystemModel = Model | ApiModel | OutputFile
"""What a system is."""

OUTPUTS = pa.schema(
    [("example_id", pa.string()), ("system", pa.string()), ("decoding", pa.string()), ("text", pa.string())]
)


@dataclass(frozen=True)
class Generation:
    """Where the outputs of one system under one decoding configuration are stored, generated or not."""

    system: str
    decoding: str
    sampling: Sampling
    samples: int
    """Outputs per prompt."""
    rows: Rows
    refused: Rows | None = None
    """Of an API: outputs that it refused, with the reason (REJECTED schema)."""

    @property
    def request(self) -> SampleRequest:
        """The samples to have."""
        return SampleRequest(self.rows, self.samples, self.refused)


@dataclass(frozen=True)
class Outputs:
    """Texts of one system and decoding, or the targets, in the order of the examples."""

    texts: list[str]
    """In NFC: texts that differ only in their Unicode form are equal in every metric, judgement and tie."""
    token_ids: list[list[int]]
    """Without the end token, which metrics do not count."""


def plan_generations(
    config: Evaluate,
    store: Store,
    examples: Examples,
    selection: pa.Table,
    system: str,
    model: SystemModel,
    max_new_tokens: int,
) -> list[Generation]:
    """Return where the outputs of a system are stored, one per decoding.

    Raises:
        InputError: the model's context is too short for a prompt and an output, or for a prompt and its target; or an
            example has no output in a system's file.
    """
    if isinstance(model, OutputFile):
        spec: Spec = {"outputs": model.fingerprint, "prompt": examples.rendering}
        rows = store.rows("generations", spec)
        sampling = Sampling(temperature=0, top_k=0, max_new_tokens=max_new_tokens, stop_ids=())
        found = [Generation(system, name, sampling, 1, rows) for name in config.decodings]
        if found[0].request.missing(selection["example_id"]).any():
            model.outputs(selection)
        return found
    if isinstance(model, Model):
        check_context(selection, model, max_new_tokens, "evaluate.max_new_tokens")
        _check_targets(config, selection, model)
    ends = end_tokens(model.path, examples.tokenizer, examples.end_tokens) if isinstance(model, Model) else ()
    generations = []
    for name, decoding in config.decodings.items():
        sampling = Sampling(
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            beams=decoding.beams,
            max_new_tokens=max_new_tokens,
            stop_ids=ends,
        )
        if isinstance(model, ApiModel):
            spec = {"model": model.spec(), "sampling": model.obeyed(sampling).spec()}
        else:
            spec = {"model": model.fingerprint, "sampling": sampling.spec()}
        spec |= {"prompt": examples.rendering, **({"seed": config.seed} if sampling.temperature > 0 else {})}
        refused = store.rows("rejected", {"of": spec}) if isinstance(model, ApiModel) else None
        rows = store.rows("generations", spec)
        generations.append(Generation(system, name, sampling, decoding.samples, rows, refused))
    return generations


def _check_targets(config: Evaluate, selection: pa.Table, model: Model) -> None:
    """Refuse targets that exceed a model's context, so that it cannot give their log-probability."""
    context = model.context()
    lengths = [pc.list_value_length(selection[name]) for name in ("prompt_ids", "target_ids")]
    longest = pc.max(pc.add(*lengths)).as_py()
    if context is not None and longest > context:
        raise InputError(
            f"evaluate.split is {config.split}, whose longest prompt and target together have {longest} tokens, but "
            f"the context of {model.name} is {context} tokens: lower data.max_prompt_tokens and data.max_target_tokens "
            "(of cut text data.chunk_tokens), or compare models with a longer context"
        )


def generate_outputs(
    config: Evaluate,
    examples: Examples,
    selection: pa.Table,
    model: SystemModel,
    generations: Sequence[Generation],
    executor: Executor,
) -> None:
    """Generate the missing outputs of one system.

    A model's engine is loaded once, and only if an output is missing; beam search may need another engine. An API is
    asked by this process alone, which keeps the API's caps.

    Raises:
        RunError: an API did not answer every request; its answers are stored.
    """
    engine = None
    if isinstance(model, Model):
        longest = max(generation.sampling.max_new_tokens for generation in generations)
        length = check_context(selection, model, longest, "evaluate.max_new_tokens")
        engine = LazyEngine(config.engine, model, length, config.dtype)
    for generation in sorted(generations, key=lambda generation: generation.sampling.beams):
        rows, sampling, seed, tokenizer = generation.rows, generation.sampling, config.seed, examples.tokenizer
        name = f"{generation.system}, {generation.decoding}"
        if isinstance(model, OutputFile):
            read = OutputFileWork(rows, model, selection, tokenizer, examples.rendering)
            label = f"evaluate {name}"
            made = make_missing(generation.request, selection, read, LocalExecutor(), batch_size=WINDOW, label=label)
        elif isinstance(model, ApiModel):
            assert generation.refused is not None
            asked = ApiWork(rows, generation.refused, model, sampling, seed, tokenizer, examples.rendering, prompt_of)
            made = make_missing(
                generation.request, selection, asked, LocalExecutor(), batch_size=WINDOW, label=f"evaluate {name}"
            )
            model.check_answered()
        else:
            assert engine is not None
            sampled = EngineWork(rows, engine, sampling, seed, tokenizer)
            batch_size = config.batch_size
            made = make_missing(
                generation.request, selection, sampled, executor, batch_size=batch_size, label=f"evaluate {name}"
            )
        log.info("evaluate: outputs of %s in %s (%d generated, %d reused)", name, rows.name, made,
                 selection.num_rows * generation.samples - made)  # fmt: skip


def read_outputs(generations: Rows, example_ids: Sequence[str]) -> Outputs:
    """Return the first sample of each example; a refused one is empty."""
    first = read_samples(generations, example_ids, 1)
    return Outputs([(one.texts or [""])[0] for one in first], [(one.token_ids or [[]])[0] for one in first])


def read_samples(generations: Rows, example_ids: Sequence[str], n: int) -> list[Outputs]:
    """Return the first n samples of each example, without those that an API refused."""
    table = generations.read(example_ids, ["example_id", "sample_index", "text", "token_ids", "finish_reason"])
    table = table.filter(pc.less(table["sample_index"], n))
    ended = pc.equal(table["finish_reason"], "stop").to_pylist()
    columns = (table["example_id"].to_pylist(), table["text"].to_pylist(),
               list(map(without_end, table["token_ids"].to_pylist(), ended)))  # fmt: skip
    found: dict[str, Outputs] = {example_id: Outputs([], []) for example_id in example_ids}
    for example_id, text, token_ids in zip(*columns, strict=True):
        found[example_id].texts.append(unicodedata.normalize("NFC", text))
        found[example_id].token_ids.append(token_ids)
    return list(found.values())


def read_targets(selection: pa.Table) -> Outputs:
    """Return the targets as the outputs of a system."""
    ids = map(without_end, selection["target_ids"].to_pylist(), selection["ends"].to_pylist())
    return Outputs([unicodedata.normalize("NFC", text) for text in selection["target"].to_pylist()], list(ids))


def outputs_table(example_ids: Sequence[str], outputs: Sequence[tuple[tuple[str, str], Outputs]]) -> pa.Table:
    """Return all outputs (OUTPUTS schema), from pairs of (system, decoding) and their texts."""
    n = len(example_ids)
    tables = []
    for (system, decoding), written in outputs:
        columns = [example_ids, [system] * n, [decoding] * n, written.texts]
        tables.append(pa.table(dict(zip(OUTPUTS.names, columns, strict=True)), schema=OUTPUTS))
    return pa.concat_tables(tables)


def refusal_note(generation: Generation, selection: pa.Table) -> str | None:
    """Return a sentence on the outputs that an API refused; None if it refused none."""
    if generation.refused is None:
        return None
    refused = generation.refused.read(selection["example_id"].to_pylist(), ["example_id", "source", "reason"])
    refused = refused.filter(pc.equal(refused["source"], refused_source(0)))  # only the first sample is measured
    reasons = Counter(refused["reason"].to_pylist())
    if not reasons:
        return None
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    return (
        f"{generation.system}, {generation.decoding}: the API refused {reasons.total()} of {selection.num_rows} "
        f"outputs ({counts}); each counts as an empty one"
    )
