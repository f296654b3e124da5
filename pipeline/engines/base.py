"""What an engine is: its interface, and the requests and samples that it exchanges."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.model import Model

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


SamplingDtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(
        description="precision of sampling (`auto`: bfloat16 on a GPU, float32 on a CPU; bfloat16 is faster on CPUs "
        "with AVX512-BF16 or AMX); not part of a row's identity"
    ),
]
"""The key `dtype` of a section that samples."""


def torch_dtype(dtype: SamplingDtype) -> "torch.dtype":
    """Return the dtype to sample in, and warn if bfloat16 is slow here."""
    import torch

    if dtype == "float32" or (dtype == "auto" and not torch.cuda.is_available()):
        return torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not torch.cuda.is_available() and not fast:
        log.warning("dtype bfloat16 is slow on this CPU, which has neither AVX512-BF16 nor AMX; float32 may be faster")
    return torch.bfloat16


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


class Engine(ABC):
    """A program that samples from models; an instance holds one model in memory.

    An engine is a subclass in a module of its own with an entry in `ENGINES` (registry.py). The first line of its
    docstring describes it. Every command that reads a recipe imports the module, so torch and the like are imported
    in the methods.

    The engine does not identify a row: rows made by one engine are found by the others. So it must sample from the
    requested distribution exactly. A sample depends only on its prompt, seed and sampling, not on its batch.
    """

    beam_search: ClassVar[bool] = False
    """Whether it supports beam search (`Sampling.beams`)."""

    @classmethod
    def not_installed(cls) -> str | None:
        """Return the command that installs what the engine needs; None if it is installed."""
        return None

    @classmethod
    def unsupported(cls, model: Model) -> str | None:
        """Return why the engine does not run this model on this machine; None if it does. Needs it installed."""
        return None

    @abstractmethod
    def __init__(self, model: Model, context: int | None = None, dtype: SamplingDtype = "auto"):
        """Load a model.

        Args:
            model: the model to sample from.
            context: tokens of the longest prompt and its continuation together, if known.
            dtype: of weights and arithmetic; `auto`: bfloat16 on a GPU, float32 on a CPU.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """Engine, version and dtype, as recorded with each row."""

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the samples of each request, as they are ready."""


class LogprobEngine(Engine):
    """An engine that also gives next-token log-probs, from which the judge `local` reads a model's answer."""

    @abstractmethod
    def next_logprobs(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield the index of each prompt, as they are ready, and the log-probs of its `tokens`, each as its next token.

        The log-probs are those of the raw model (temperature 1, all tokens), in nats.
        """


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
