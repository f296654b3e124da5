"""Autoregressive negatives (AN): continuations sampled from a model given the prompt, top-k with k = 50 (§3)."""

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.pipeline.engines.base import Sampling

STRATEGY = "autoregressive"


def autoregressive_spec(rendering: Spec, generator: str | Spec, sampling: Sampling, seed: int) -> Spec:
    """A sampled row's identity is its distribution and its seed; how many there are is not part of it.

    `generator` is a model's fingerprint, or what identifies an API's.
    """
    return {
        "strategy": STRATEGY,
        "generator": generator,
        "prompt": rendering,
        "sampling": sampling.spec(),
        "seed": seed,
    }
