"""Negatives from other models (Xu et al. 2024): a file of continuations, an API, or a model that runs here.

A model may have a tokenizer of its own. Its token ids mean nothing to the trained model, so its continuations are taken
as text and encoded like targets.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from pydantic import Field, model_validator

from cpo_pipe.data.config import Location
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, Spec, digest
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.answers import AnswerEncoder, text_behind
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.control_tokens import finder, special_tokens
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, tokenizer_in
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.text import abridged
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.negatives.autoregressive import EngineSampler, sampled_spec
from cpo_pipe.pipeline.negatives.pool_file import Columns, Continuations, PoolFile
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job, negative
from cpo_pipe.pipeline.samples import SAMPLE_INDICES, EngineWork, LazyEngine, refused_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ENCODED_FOR = ["example_id", "prompt", "messages", "target_ids", "ends"]
"""Columns of an example that decide how a continuation is encoded."""
ENCODING = 4
"""Raise when the encoding of a text changes."""


class Pool(EngineSampler):
    """Continuations from another model: a file of them, an API, or a model that runs here."""

    kind: ClassVar[str] = "pool"

    model: Location | None = Field(None, description="an API of `apis`, a training's name, a folder or a hub name")
    file: Location | None = Field(
        None,
        description="existing continuations: a file, pattern, folder, URL or hub name, as for data.source, such as the "
        "folder that `cpo-pipe export` writes",
    )
    columns: Columns = Field(default_factory=Columns, description="column mapping of the file")

    @model_validator(mode="after")
    def _check(self) -> "Pool":
        if (self.model is None) == (self.file is None):
            raise ValueError("give either model or file")
        for key in ("columns",) if self.file is None else ("top_k", "temperature", "engine", "dtype", "batch_size"):
            if key in self.model_fields_set:
                raise ValueError(f"{key}: not used with a {'model' if self.file is None else 'file'}; remove it")
        return self

    def plan(self, inputs: Inputs) -> Job:
        """Plan to read the file, or to sample from the model."""
        if self.file is not None:
            source = locate_source(self.file, key=f"{inputs.key}.file", columns_key=f"{inputs.key}.columns")
            return self._plan_file(inputs, PoolFile(source, self.columns))
        assert self.model is not None
        model = inputs.find(self.model, any_tokenizer=True)
        if isinstance(model, ApiModel):
            return self.plan_api(inputs, model)
        own = other_tokenizer(model, inputs.examples.tokenizer, inputs.store)
        if own is None:
            model = inputs.find(self.model)
            assert isinstance(model, Model)
            return self.plan_model(inputs, model)
        examples, sampling = inputs.examples, self.sampling(inputs, end_tokens(model.path, own))
        template = examples.rendering["template"]
        day = chat_date(own, inputs.store) if template == templates.CHAT else None
        spec = sampled_spec(examples.rendering, model.fingerprint, sampling, inputs.seed, self.kind,
                            tokenizer=own.fingerprint, encoding=ENCODING,
                            **({"chat_date": day} if day else {}))  # fmt: skip
        rows, refused = inputs.rows(spec), inputs.refused(spec)
        columns = {"strategy": self.kind, "generator": model.fingerprint}
        engine = LazyEngine(self.engine, model, None, self.dtype)
        work = PoolModelWork(rows, refused, engine, own, examples.rendering, sampling, inputs.seed, examples.tokenizer,
                             columns, day)  # fmt: skip
        return Job(inputs.source(rows, self.count, refused), work, self.batch_size)

    def _plan_file(self, inputs: Inputs, file: PoolFile) -> Job:
        identity, limit = file.source.identity(inputs.store.hash_file), self.max_new_tokens or inputs.max_tokens
        spec = pool_file_spec(inputs.examples.rendering, identity, self.columns, limit)
        rows, refused = inputs.rows(spec), inputs.refused(spec)
        selection = inputs.selection.select(["example_id", "prompt"])
        examples = inputs.examples
        work = PoolFileWork(rows, refused, file, identity, selection, self.count, examples.tokenizer,
                            examples.rendering, limit)  # fmt: skip
        return Job(inputs.source(rows, self.count, refused), work, check_inputs=file.check)

    @property
    def origin(self) -> str:
        """The file or the model."""
        return f"The file {self.file}" if self.file is not None else f"Sampled from {self.model}"

    def models(self) -> list[str]:
        """Return the model, if it is not a file."""
        return [self.model] if self.model is not None else []


def pool_file_spec(rendering: Spec, identity: Spec, columns: Columns, max_tokens: int) -> Spec:
    """Return the identity of a file's rows: its content, but neither its path nor the source's name or strength."""
    return {"strategy": Pool.kind, "file": digest(identity), "columns": columns.model_dump(), "prompt": rendering,
            "max_tokens": max_tokens, "encoding": ENCODING}  # fmt: skip


def other_tokenizer(model: Model, tokenizer: TokenizerFiles, store: Store) -> TokenizerFiles | None:
    """Return the model's own tokenizer; None where it has none, or `tokenizer` itself."""
    if not any((model.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    own = tokenizer_in(model.path, store)
    return None if own.fingerprint == tokenizer.fingerprint else own


def _refusal(example_id: str, sample_index: int, reason: str, detail: str) -> dict[str, Any]:
    """Return a row of the REJECTED schema."""
    return {"source": refused_source(sample_index), "example_id": example_id, "reason": reason, "detail": detail[:200]}


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PoolFileWork(Work):
    """Work that reads sample k of an example from a file: the file's k-th continuation for the example."""

    rows: Rows
    refused: Rows
    """Samples that the file does not have (REJECTED schema)."""
    file: PoolFile
    identity: Spec
    """What determined the file's rows when the work was planned."""
    selection: pa.Table
    """`example_id` and `prompt` of all examples."""
    count: int
    """Samples per example."""
    tokenizer: TokenizerFiles
    rendering: Spec
    """Of the examples."""
    max_tokens: int

    def open(self) -> Make:
        """Read the file and load the tokenizer.

        Raises:
            InputError: the file breaks a rule, or has no continuation for any example.
        """
        source = self.file.source
        source.check(self.identity)
        key = self.file.match_column()
        log.info("%s %s: reading it", source.key, source.name)
        keys = (value.as_py() for value in self.selection[key])
        tokenizer = self.tokenizer.load()
        is_control = finder(special_tokens(tokenizer))
        encoder = AnswerEncoder(tokenizer, self.rendering, continuations=True)
        found = Continuations(keys, self.count, self.file.continuations(key), is_control)
        self._report(key, found)
        if found.control_tokens:
            log.warning(
                "%s %s: %d continuations have special tokens in their text; they are text to the "
                "model, except for an EOS token at the end", source.key, source.name, found.control_tokens,
            )  # fmt: skip

        fingerprint = digest(self.identity)

        def make(batch: pa.Table) -> Iterator[NewRows]:
            refused, taken, texts = [], [], []
            for example in batch.select([*ENCODED_FOR, SAMPLE_INDICES]).to_pylist():
                for k in example[SAMPLE_INDICES]:
                    text = found.text(example[key], k)
                    if text is None and (bad := found.refusal(example[key], k)) is not None:
                        refused.append(_refusal(example["example_id"], k, bad.reason, f"{bad.source}: {bad.detail}"))
                    elif text is None:
                        refused.append(_refusal(example["example_id"], k, "not in the file", example["prompt"]))
                    else:
                        taken.append((example, k))
                        texts.append(text)
            encoded = encoder.encode([example for example, _ in taken], texts, self.max_tokens, [True] * len(texts))
            rows = []
            for (example, k), answer in zip(taken, encoded, strict=True):
                if answer.problem:
                    refused.append(_refusal(example["example_id"], k, "not renderable", answer.problem))
                    continue
                rows.append(negative(example, k, 0, strategy=Pool.kind, text=answer.text, token_ids=answer.token_ids,
                                     ends=answer.ends, generator=fingerprint))  # fmt: skip
            yield NewRows([refused, rows], len(refused) + len(rows))

        return make

    def _report(self, key: str, found: Continuations) -> None:
        """Warn of rejected rows, and where the file covers only a part of the selection.

        Raises:
            InputError: it has no continuation for any example.
        """
        source, counts = self.file.source, found.counts
        if found.rejections.reasons:
            log.warning("%s %s: %s", source.key, source.name, found.rejections)
        there, whole, what = int((counts > 0).sum()), int((counts == self.count).sum()), key.replace("_", " ") + "s"
        if not there:
            hint = f"; without its column {key} it is matched by prompt" if key == "example_id" else ""
            raise source.request({}).error(
                f"has none of the examples' {len(counts):,} {what}; there is {abridged(repr(found.unmatched), 60)}, "
                f"the first example has {abridged(repr(self.selection[key][0].as_py()), 60)}{hint}"
            )
        if whole < len(counts):
            log.warning(
                "%s %s: has %d of %d %s, %d of them with %d continuations; others get fewer",
                *(source.key, source.name, there, len(counts), what, whole, self.count),
            )


# ── a model ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PoolModelWork(Work):
    """Work that samples from a model with a tokenizer of its own, and encodes its texts like targets."""

    rows: Rows
    refused: Rows
    """Samples that cannot be made, for example because a prompt fills the model's context (REJECTED schema)."""
    engine: LazyEngine
    own_tokenizer: TokenizerFiles
    rendering: Spec
    """Of the examples. With the template `chat`, the model's own chat template renders the prompt; otherwise it is
    rendered as for the trained model."""
    sampling: Sampling
    """In the model's own tokens; `max_new_tokens` also limits the text's tokens in the trained model's tokenizer."""
    seed: int
    tokenizer: TokenizerFiles
    """The trained model's."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns with the same value in all rows."""
    chat_date: str | None = None
    """The date that the model's chat template inserts."""

    def open(self) -> Make:
        """Load the engine and both tokenizers.

        Raises:
            InputError: data.template is chat, but the model's tokenizer has no chat template.
        """
        own = self.own_tokenizer.load()
        encoder = AnswerEncoder(self.tokenizer.load(), self.rendering, continuations=True)
        chat = self.rendering["template"] == templates.CHAT
        if chat and not own.chat_template:
            raise InputError(
                f"model {self.engine.model.name}: data.template is chat, but its tokenizer has no chat template; "
                "use a chat version of the model, or another template"
            )
        sample = EngineWork(self.rows, self.engine, self.sampling, self.seed, self.own_tokenizer, self.columns).open()
        context, new = self.engine.model.context(), self.sampling.max_new_tokens

        def make(batch: pa.Table) -> Iterator[NewRows]:
            prompts = self._prompts(batch, own)
            fits = [bool(ids) and (context is None or len(ids) + new <= context) for ids in prompts]
            columns = batch["example_id"].to_pylist(), batch[SAMPLE_INDICES].to_pylist()
            refused = [
                _refusal(
                    example_id, k, "prompt too long" if ids else "empty prompt", f"{len(ids)} tokens, of {context}"
                )
                for example_id, indices, ids, fit in zip(*columns, prompts, fits, strict=True)
                if not fit
                for k in indices
            ]
            yield NewRows([refused, []], len(refused))
            place = batch.schema.get_field_index("prompt_ids")
            batch = batch.set_column(place, "prompt_ids", pa.array(prompts, batch.schema.field(place).type))
            examples = {example["example_id"]: example for example in batch.select(ENCODED_FOR).to_pylist()}
            behind = dict(zip(examples, prompts, strict=True))
            for made in sample(batch.filter(pa.array(fits))) if any(fits) else ():
                yield NewRows(encode(made.rows[0], examples, behind), made.units)

        def encode(
            samples: Sequence[Mapping[str, Any]],
            examples: Mapping[str, Mapping[str, Any]],
            prompts: Mapping[str, list[int]],
        ) -> list[list[dict[str, Any]]]:
            """Return rows of refused samples, and negatives."""
            ends = [sample["finish_reason"] == "stop" for sample in samples]
            texts = []
            for sample, whole in zip(samples, ends, strict=True):
                # An answer in a chat begins a text; other continuations follow the prompt, perhaps after a space.
                before = [] if chat else prompts[sample["example_id"]]
                text = text_behind(before, sample["token_ids"][:-1] if whole else sample["token_ids"], own)
                texts.append(text if whole else text.rstrip("\ufffd"))  # the first bytes of a character that was cut
            refused, rows = [], []
            encoded = encoder.encode([examples[sample["example_id"]] for sample in samples], texts, new, ends)
            for sample, answer in zip(samples, encoded, strict=True):
                if answer.token_ids:
                    rows.append({**sample, "text": answer.text, "token_ids": answer.token_ids,
                                 "finish_reason": "stop" if answer.ends else "length", "logprob": None})  # fmt: skip
                else:
                    reason, detail = ("not renderable", answer.problem) if answer.problem else ("empty", answer.text)
                    refused.append(_refusal(sample["example_id"], sample["sample_index"], reason, detail))
            return [refused, rows]

        return make

    def _prompts(self, batch: pa.Table, own: "PreTrainedTokenizerBase") -> list[list[int]]:
        """Encode the examples' prompts with the model's own tokenizer."""
        rendered = batch["rendered"].to_pylist()
        asked = [Conversation.of_example(example) for example in batch.select(ENCODED_FOR).to_pylist()]
        template = str(self.rendering["template"])
        return templates.encode_prompts_again(template, asked, rendered, own, self.chat_date)
