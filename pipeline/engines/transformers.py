"""Sampling with `transformers.generate`, on any machine."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cpo_pipe.data.models import Model
from cpo_pipe.pipeline.engines.base import Request, Sample, Sampling

BATCH_TOKENS = 1 << 14
"""Tokens of all samples decoded side by side, prompts and limits together: bounds the memory of the KV cache."""


class TransformersEngine:
    """Samples row by row with a seed of its own, in batches of left-padded prompts."""

    def __init__(self, model: Model):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        network: Any = model.load(dtype)  # transformers types neither `to` nor `generate` well
        self._model = network.to(self._device).eval()
        # What the model's authors would sample with (a repetition penalty, say) must not leak into what was asked for.
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self.description = f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """For each request its `n` samples, in order."""
        rows = [(request.prompt_ids, request.seed + k) for request in requests for k in range(request.n)]
        samples: list[Sample] = []
        longest = max(len(prompt) for prompt, _ in rows) + sampling.max_new_tokens
        size = max(1, BATCH_TOKENS // longest)
        for start in range(0, len(rows), size):
            samples += self._decode(rows[start : start + size], sampling)
        flat = iter(samples)
        return [[next(flat) for _ in range(request.n)] for request in requests]

    @torch.inference_mode()
    def _decode(self, rows: Sequence[tuple[Sequence[int], int]], sampling: Sampling) -> list[Sample]:
        width = max(len(prompt) for prompt, _ in rows)
        pad = sampling.stop_ids[0] if sampling.stop_ids else 0
        input_ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(input_ids)
        for row, (prompt, _) in enumerate(rows):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        choose = SeededChoice([seed for _, seed in rows], sampling, self._device)
        output = self._model.generate(
            input_ids.to(self._device),
            attention_mask=mask.to(self._device),
            logits_processor=LogitsProcessorList([choose]),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False,  # `choose` has sampled: what it leaves is one token a row
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(sampling.stop_ids) or None,
                pad_token_id=pad,
            ),
        )
        logprobs = torch.stack(choose.logprobs, 1).double().cpu()
        return [
            _finish(ids, logprob, sampling) for ids, logprob in zip(output[:, width:].tolist(), logprobs, strict=True)
        ]


def _finish(token_ids: list[int], logprobs: torch.Tensor, sampling: Sampling) -> Sample:
    """Cut a row of the batch where its own text ended."""
    end = next((at + 1 for at, token in enumerate(token_ids) if token in sampling.stop_ids), None)
    length = end if end is not None else len(token_ids)
    reason = "stop" if end is not None else "length"
    return Sample(token_ids[:length], reason, float(logprobs[:length].sum()))


class SeededChoice(LogitsProcessor):
    """Chooses each row's next token with that row's own random numbers, so that no row depends on its batch.

    Shapes: B rows, V vocabulary, k of top-k. After the choice the scores of all other tokens are −inf.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device):
        self._sampling = sampling
        self.logprobs: list[torch.Tensor] = []
        if sampling.temperature > 0:
            self._uniform_BT = torch.stack([_uniform(seed, sampling.max_new_tokens) for seed in seeds]).to(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) in, scores with one finite entry per row out; its raw log-prob is kept in `logprobs`."""
        scores_BV = scores.float()
        if self._sampling.temperature == 0:
            token_B = scores_BV.argmax(-1)
        else:
            k = min(self._sampling.top_k or scores_BV.shape[-1], scores_BV.shape[-1])
            top_Bk, token_Bk = scores_BV.topk(k)
            cumulative_Bk = (top_Bk.double() / self._sampling.temperature).softmax(-1).cumsum(-1)
            draw_B1 = self._uniform_BT[:, len(self.logprobs), None] * cumulative_Bk[:, -1:]
            place_B1 = torch.searchsorted(cumulative_Bk, draw_B1, right=True).clamp(max=k - 1)
            token_B = token_Bk.gather(-1, place_B1).squeeze(-1)
        self.logprobs.append(scores_BV.log_softmax(-1).gather(-1, token_B[:, None]).squeeze(-1))
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(-1, token_B[:, None], 0.0)  # type: ignore[return-value]


def _uniform(seed: int, count: int) -> torch.Tensor:
    """`count` uniform numbers in [0, 1) of one row's own generator."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
