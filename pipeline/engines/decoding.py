"""Decoding with `transformers.generate`: prompts computed once, rows that end, and the choice of each token."""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from cpo_pipe.data.errors import cause
from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.engines.base import Sample, Sampling, SamplingDtype, torch_dtype

log = logging.getLogger(__name__)

SEGMENT = 8
"""Tokens decoded between two checks for rows that have ended, which then leave the batch."""


@dataclass(frozen=True)
class Batching:
    """How rows are batched."""

    share: bool
    """Compute a prompt once, and copy its cache for each of its rows."""
    pad: bool
    """Batch prompts of different lengths, padded on the left; otherwise only prompts of equal length."""


PLAIN = Batching(share=False, pad=False)
BATCHINGS = {
    Batching(share=True, pad=True): "a prompt is computed once for all its samples",
    Batching(share=True, pad=False): "only prompts of equal length are batched",
    PLAIN: "every sample computes its own prompt, and only prompts of equal length are batched",
}
"""Descriptions, from the fastest batching to the one that every model supports."""


class Decoder:
    """Decodes with a model in memory, by the fastest batching that is numerically equivalent to `PLAIN`."""

    def __init__(self, model: Model, dtype: SamplingDtype = "auto"):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = torch_dtype(dtype)
        network: Any = model.load(chosen)  # transformers types neither `to` nor `generate` well
        self.model = network.to(self._device).eval()
        # The authors' sampling defaults, such as a repetition penalty, must not change the requested distribution.
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        state_space = "cache_params" in inspect.signature(network.forward).parameters
        self._cache_name = "cache_params" if state_space else "past_key_values"
        self.batching = self._fastest_equivalent()
        self.description = f"transformers {transformers.__version__}, {str(chosen).removeprefix('torch.')}"

    def sample(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling) -> list[Sample]:
        """Return a sample after each prompt, by its own seed."""
        return self._decoded(prompts, SeededChoice(seeds, sampling, self._device))

    @torch.inference_mode()
    def search(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> list[Sample]:
        """Return the continuation of each prompt that beam search finds.

        The search is transformers' own with its defaults: candidates are compared by log-prob per token
        (`length_penalty` 1), and a prompt is done when it has as many finished candidates as beams and no unfinished
        one currently beats the worst of them (`early_stopping` false).
        """
        ids_BP, mask_BP = self._padded(prompts)
        stop_ids = list(sampling.stop_ids)
        found = self.model.generate(
            ids_BP,
            attention_mask=mask_BP,
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                num_beams=sampling.beams,
                do_sample=False,
                length_penalty=1.0,
                early_stopping=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=stop_ids or None,
                pad_token_id=stop_ids[0] if stop_ids else None,
                use_cache=self.batching.share,  # otherwise the caches may be wrong
            ),
        )
        # The search gives no log-probs of the raw model: decode what it found.
        return self._decoded(prompts, GivenChoice(found[:, ids_BP.shape[1] :].tolist(), stop_ids, self._device))

    def _decoded(self, prompts: Sequence[tuple[int, ...]], choice: "Choice") -> list[Sample]:
        self._decode(prompts, choice, self.batching)
        return choice.samples()

    def _fastest_equivalent(self) -> Batching:
        """Return the fastest batching whose log-probs are those of `PLAIN`; log the choice if it is not the first.

        Each is tried, since a list of architectures would miss new ones: two prompts with two samples each, of
        given tokens. One sample ends before the others, so that caches are copied, cut and continued.
        """
        stop, tolerance = 1, 1e-4 if self.model.dtype == torch.float32 else 5e-2
        prompts = [(2, 3, 4, 5, 6, 7)] * 2 + [(5, 3)] * 2
        given = [[2, 3, 4, 5, 6], [stop, 2, 2, 2, 2], [4, 2, 5, 3, 6], [6, 5, 4, 3, 2]]

        def logprobs(batching: Batching) -> torch.Tensor:
            found = []
            for part in [slice(0, 4)] if batching.pad else [slice(0, 2), slice(2, 4)]:
                choice = GivenChoice(given[part], [stop], self._device)
                self._decode(prompts[part], choice, batching, segment=2)
                found += [sample.logprob for sample in choice.samples()]
            return torch.tensor(found)

        expected, why = logprobs(PLAIN), ""
        for batching in BATCHINGS:
            try:
                error = ((logprobs(batching) - expected) / expected.abs().clamp(min=1)).abs().max().item()
                if error < tolerance:
                    break
                why = f"otherwise log-probs were wrong by {error:.1%}"
            except Exception as refusal:  # models with another kind of cache raise various errors
                why = f"{type(refusal).__name__}: {cause(refusal)}"
        if why:
            log.info("engine transformers: %s (%s)", BATCHINGS[batching], why)
        return batching

    def _padded(self, prompts: Collection[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and mask of the prompts, padded on the left, each (prompts, tokens of the longest)."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[tuple[int, ...]], choice: "Choice", batching: Batching, segment: int = SEGMENT
    ) -> None:
        """Continue each row's prompt; `choice` collects the samples.

        Shapes: B rows, of which R go on; U distinct prompts, P tokens of the longest.
        """
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        ids_UP, mask_UP = self._padded(distinct)
        prompt_B = torch.tensor([distinct[prompt] for prompt in prompts], device=self._device)
        ids, mask, cache = ids_UP[prompt_B], mask_UP[prompt_B], None
        if batching.share and len(prompts) > len(distinct) and ids_UP.shape[1] > 1:
            # All but the last token; each row continues with that, so its first new token is a step like the others.
            cache = self._generate(ids_UP[:, :-1], mask_UP[:, :-1], 1)
            cache.reorder_cache(prompt_B)  # made for beams, so caches of every kind have it
            ids = ids[:, -1:]
        while True:
            steps = min(segment, choice.remaining) if batching.share else choice.remaining
            cache = self._generate(ids, mask, steps, choice, cache)
            going_R = choice.drop_ended()
            if not len(going_R) or not choice.remaining:
                return
            if len(going_R) < len(mask):
                cache.reorder_cache(going_R)
            ids, mask = choice.last(), torch.nn.functional.pad(mask[going_R], (0, steps), value=1)

    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, steps: int, choice: "Choice | None" = None, cache: Any = None
    ) -> Any:
        """Decode `steps` tokens, fewer if all rows end before.

        Args:
            ids: the rows' tokens that the cache does not contain yet, (R, tokens).
            mask: 0 for padding and 1 otherwise, (R, tokens in the cache and in `ids`).
            steps: number of tokens.
            choice: chooses the tokens; None where any will do.
            cache: of the tokens before `ids`; changed in place.

        Returns:
            The cache, without the last token chosen.
        """
        return self.model.generate(
            ids,
            attention_mask=mask,
            logits_processor=[choice] if choice else [],
            stopping_criteria=[AllEnded(choice)] if choice else [],
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False,  # `choice` has sampled: one token per row is left
                max_new_tokens=steps,
                return_dict_in_generate=True,
            ),
            **({} if cache is None else {self._cache_name: cache}),
        ).past_key_values


class Choice(LogitsProcessor, ABC):
    """Chooses each row's next token and keeps it with its log-prob.

    Shapes: B rows, of which R are still decoded; T tokens at most, V vocabulary.
    """

    def __init__(self, rows: int, tokens: int, stop_ids: Sequence[int], device: torch.device):
        self.stop_ids = stop_ids
        self.remaining = tokens
        """Number of steps left."""
        self.ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
        """Whether a row has an end token; later tokens of the row are ignored."""
        self._row_R = torch.arange(rows, device=device)
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self._token_BT = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self._logprob_BT = torch.zeros(rows, tokens, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Choose tokens from scores (R, V); return scores with one finite entry per row."""
        scores_RV, step = scores.float(), self._step
        token_R = self.choose(scores_RV, self._row_R, step)
        self._token_BT[self._row_R, step] = token_R
        self._logprob_BT[self._row_R, step] = scores_RV.log_softmax(-1).gather(-1, token_R[:, None]).squeeze(-1)
        self.ended_R |= torch.isin(token_R, self._stop_ids)
        self.remaining -= 1
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(-1, token_R[:, None], 0.0)  # type: ignore[return-value]

    @abstractmethod
    def choose(self, scores_RV: torch.Tensor, row_R: torch.Tensor, step: int) -> torch.Tensor:
        """Return the next tokens (R,) of rows `row_R`."""

    def last(self) -> torch.Tensor:
        """Return the tokens chosen last, (R, 1)."""
        return self._token_BT[self._row_R, self._step - 1, None]

    def drop_ended(self) -> torch.Tensor:
        """Drop the rows that have ended; return the indices of the others, (R after), among the rows before."""
        going = (~self.ended_R).nonzero().squeeze(-1)
        self._row_R, self.ended_R = self._row_R[going], self.ended_R[going]
        return going

    def samples(self) -> list[Sample]:
        """Return the sample of each row, in order."""
        rows = zip(self._token_BT.tolist(), self._logprob_BT.double().cpu(), strict=True)
        return [_finish(token_ids, logprobs, self.stop_ids) for token_ids, logprobs in rows]

    @property
    def _step(self) -> int:
        return self._token_BT.shape[1] - self.remaining


class AllEnded(StoppingCriteria):
    """Stops decoding when all rows have ended."""

    def __init__(self, choice: Choice):
        self._choice = choice

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """Return which rows have ended, (R,)."""
        return self._choice.ended_R  # type: ignore[return-value]


class SeededChoice(Choice):
    """Samples with each row's own random numbers, so that no row depends on its batch."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device):
        super().__init__(len(seeds), sampling.max_new_tokens, sampling.stop_ids, device)
        self._sampling = sampling
        if sampling.temperature > 0:
            self._uniform_BT = torch.stack([_uniform(seed, sampling.max_new_tokens) for seed in seeds]).to(device)

    def choose(self, scores_RV: torch.Tensor, row_R: torch.Tensor, step: int) -> torch.Tensor:
        """Sample by temperature, top-k (k of the V tokens) and top-p."""
        if self._sampling.temperature == 0:
            return scores_RV.argmax(-1)
        k = min(self._sampling.top_k or scores_RV.shape[-1], scores_RV.shape[-1])
        top_Rk, token_Rk = scores_RV.topk(k)
        cumulative_Rk = (top_Rk.double() / self._sampling.temperature).softmax(-1).cumsum(-1)
        top_p_R1 = torch.full_like(cumulative_Rk[:, :1], self._sampling.top_p)
        last_R1 = torch.searchsorted(cumulative_Rk, top_p_R1).clamp(max=k - 1)
        draw_R1 = self._uniform_BT[row_R, step, None] * cumulative_Rk.gather(-1, last_R1)
        place_R1 = torch.searchsorted(cumulative_Rk, draw_R1, right=True).minimum(last_R1)
        return token_Rk.gather(-1, place_R1).squeeze(-1)


class GivenChoice(Choice):
    """Chooses given tokens, (B, T)."""

    def __init__(self, token_ids: list[list[int]], stop_ids: Sequence[int], device: torch.device):
        super().__init__(len(token_ids), len(token_ids[0]), stop_ids, device)
        self._given_BT = torch.tensor(token_ids, device=device)

    def choose(self, scores_RV: torch.Tensor, row_R: torch.Tensor, step: int) -> torch.Tensor:
        """Return the next given token of each row."""
        return self._given_BT[row_R, step]


def _finish(token_ids: list[int], logprobs: torch.Tensor, stop_ids: Sequence[int]) -> Sample:
    """Return the sample of a row, cut after its first stop token."""
    end = next((at + 1 for at, token in enumerate(token_ids) if token in stop_ids), None)
    length = end if end is not None else len(token_ids)
    reason = "stop" if end is not None else "length"
    return Sample(token_ids[:length], reason, float(logprobs[:length].sum()))


def _uniform(seed: int, count: int) -> torch.Tensor:
    """Return `count` uniform numbers in [0, 1) from a generator with this seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
