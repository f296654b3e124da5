"""Autoregressive negatives (AN): continuations sampled from a model given the prompt, top-k with k = 50 (§3)."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pyarrow as pa

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import Model
from cpo_pipe.data.recipe import Negatives
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.engines.base import Engine, Sample, Sampling, sample_missing

STRATEGY = "autoregressive"


def negatives_spec(examples: Examples, model: Model, sampling: Sampling, seed: int) -> Spec:
    """A sampled row's identity is its distribution and its seed; how many there are is not part of it."""
    return {
        "strategy": STRATEGY,
        "generator": model.fingerprint,
        "prompt": examples.rendering,
        "sampling": sampling.spec(),
        "seed": seed,
    }


def make_autoregressive(
    config: Negatives,
    rows: Rows,
    examples: Examples,
    selection: pa.Table,
    model: Model,
    sampling: Sampling,
    engine: Callable[[], Engine],
) -> int:
    """Make what `rows` lacks of `config.counts.autoregressive` negatives an example; returns how many."""
    tokenizer = cache(examples.tokenizer.load)  # loaded only if there is something to decode

    def make_row(base: Mapping[str, Any], sample: Sample) -> Mapping[str, Any]:
        text = tokenizer().decode(sample.token_ids, skip_special_tokens=True)
        return {"strategy": STRATEGY, "text": text, "logprob": sample.logprob, "generator": model.fingerprint}

    return sample_missing(
        rows,
        selection,
        n=config.counts.autoregressive,
        seed=config.seed,
        sampling=sampling,
        engine=engine,
        make_row=make_row,
        batch_size=config.batch_size,
        label="generate-negatives",
    )
