"""Sampling with `transformers.generate`, on any machine."""

from collections.abc import Iterator, Sequence

from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.engines.base import Engine, Request, Sample, Sampling, SamplingDtype

BATCH_TOKENS = 1 << 14
"""Tokens of a batch, prompts and limits together; bounds the memory of the KV cache."""


class TransformersEngine(Engine):
    """transformers' `generate`, on any machine.

    Each row is sampled with its own seed.
    """

    beam_search = True

    def __init__(self, model: Model, context: int | None = None, dtype: SamplingDtype = "auto"):
        """Load the model; the cache grows as needed, whatever the `context`."""
        from cpo_pipe.pipeline.engines.decoding import Decoder  # imports torch

        self._decoder = Decoder(model, dtype)

    @property
    def description(self) -> str:
        """Engine, version and dtype."""
        return self._decoder.description

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the samples of each request, as they are ready."""
        assert sampling.beams == 1 or all(request.n == 1 for request in requests)
        rows = [(place, k) for place, request in enumerate(requests) for k in range(request.n)]
        prompts = [tuple(request.prompt_ids) for request in requests]
        # Long prompts first, equal ones together: little padding, and a lack of memory shows at once.
        rows.sort(key=lambda row: (-len(prompts[row[0]]), prompts[row[0]], row))
        waiting: dict[int, list[Sample]] = {}
        for batch in self._batches([len(prompts[place]) for place, _ in rows], sampling):
            inputs = [prompts[place] for place, _ in rows[batch]]
            if sampling.beams > 1:
                found = self._decoder.search(inputs, sampling)
            else:
                found = self._decoder.sample(inputs, [requests[place].seed + k for place, k in rows[batch]], sampling)
            for (place, _), sample in zip(rows[batch], found, strict=True):
                samples = waiting.setdefault(place, [])
                samples.append(sample)
                if len(samples) == requests[place].n:
                    yield place, waiting.pop(place)

    def _batches(self, lengths: Sequence[int], sampling: Sampling) -> Iterator[slice]:
        """Yield batches of rows whose prompts have these lengths, the longest first."""
        start = 0
        while start < len(lengths):
            tokens = (lengths[start] + sampling.max_new_tokens) * sampling.beams
            end = min(start + max(1, BATCH_TOKENS // tokens), len(lengths))
            if not self._decoder.batching.pad:
                end = start + lengths[start:end].count(lengths[start])
            yield slice(start, end)
            start = end
