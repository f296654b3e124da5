"""Log-probs of tokens from hidden states, without the logits of the prompt.

Shapes: S hidden states, E (hidden state, token) pairs, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel

CHUNK_BYTES = 1 << 23
"""Bytes of float32 logits turned into log-probs or gradients at once; they fit into the processor's cache."""


@dataclass(frozen=True)
class Head:
    """How a model computes logits from its hidden states: cap · tanh(scale · (h Wᵀ + b) / cap)."""

    scale: float
    cap: float | None

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        """Return the head that the model's config describes.

        If the model has a different head, the self-check refuses all backends but `plain`.
        """
        config = model.config.get_text_config()
        scale = _number(config, "logit_scale", "lm_head_multiplier") or 1.0
        scaling = _number(config, "logits_scaling")
        if config.model_type == "mpt":  # transformers ignores its logit_scale, a number or `inv_sqrt_d_model`
            scale = 1.0
        if scaling is not None:  # HyperCLOVA X multiplies by what Granite divides by
            scale = scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling
        return Head(scale, _number(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))

    def logprobs(
        self,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        row_E: Tensor,
        label_E: Tensor,
        first_S: Sequence[int],
        memory: int,
    ) -> Tensor:
        """Return the log-prob of each pair's token, in nats, float32: (E,).

        Pair e is (hidden state row[e], token label[e]). Pairs are in the order of rows; row s has the pairs from
        first[s] to first[s + 1].

        The logits are kept between forward and backward pass if they fit into `memory` bytes, and their gradient is
        written over them; otherwise they are computed in chunks, twice. Under autocast the products are in its dtype,
        all else is in float32.
        """
        dtype = _product_dtype(hidden_SH)
        if bias_V is not None and self.scale != 1.0:
            bias_V = bias_V * self.scale
        scaled_SH = hidden_SH * self.scale if self.scale != 1.0 else hidden_SH
        with torch.autocast(hidden_SH.device.type, enabled=False):
            result: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
                scaled_SH.to(dtype), weight_VH, bias_V, row_E, label_E, first_S, self.cap, memory
            )
        return result

    @torch.no_grad()
    def sample(self, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, uniform_SM: Tensor) -> Tensor:
        """Return tokens drawn after each hidden state, where its uniform numbers fall in the distribution: (S, M)."""
        dtype = _product_dtype(hidden_SH)
        weight_HV = weight_VH.to(dtype).t()
        drawn = []
        with torch.autocast(hidden_SH.device.type, enabled=False):
            bias_V = None if bias_V is None else bias_V * self.scale
            for rows in _slices(0, len(hidden_SH), max(CHUNK_BYTES // (8 * len(weight_VH)), 1)):
                logits = torch.mm((hidden_SH[rows] * self.scale).to(dtype), weight_HV)
                drawn.append(draw(_finish(logits, bias_V, self.cap), uniform_SM[rows]))
        return torch.cat(drawn)


def _product_dtype(hidden_SH: Tensor) -> torch.dtype:
    """Return the dtype of the product with the weight: that of autocast, if it is on."""
    device = hidden_SH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_SH.dtype


def _number(config: PreTrainedConfig, *names: str) -> float | None:
    """Return the first of these settings that is a number other than 0."""
    values = [getattr(config, name, None) for name in names]
    return next((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v), None)


def draw(logits_SV: Tensor, uniform_SM: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution passes each uniform number: (S, M)."""
    cumulative_SV = logits_SV.double().softmax(-1).cumsum(-1)
    drawn_SM = torch.searchsorted(cumulative_SV, uniform_SM * cumulative_SV[:, -1:], right=True)
    return drawn_SM.clamp(max=logits_SV.shape[-1] - 1)


class _TokenLogprobs(torch.autograd.Function):
    """Differentiable in hidden states, weight and bias; once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        row_E: Tensor,
        label_E: Tensor,
        first_S: Sequence[int],
        cap: float | None,
        memory: int,
    ) -> Tensor:
        count, vocabulary = hidden_SH.shape[0], weight_VH.shape[0]
        weight = weight_VH.to(hidden_SH.dtype)
        rows_in_memory = max(memory // (vocabulary * hidden_SH.itemsize), 1)
        keep = any(ctx.needs_input_grad) and count <= rows_in_memory
        logprob_E = torch.empty(len(label_E), dtype=torch.float32, device=hidden_SH.device)
        lse_S = torch.empty(count, dtype=torch.float32, device=hidden_SH.device)
        for block in _slices(0, count, rows_in_memory):
            logits = torch.mm(hidden_SH[block], weight.t())
            for rows, pairs in _chunks(block, vocabulary, first_S):
                values = _finish(logits[_within(rows, block)], bias_V, cap)
                lse_S[rows] = values.logsumexp(-1)
                row = row_E[pairs]
                logprob_E[pairs] = values[row - rows.start, label_E[pairs]] - lse_S[row]
        ctx.save_for_backward(hidden_SH, weight, bias_V, row_E, label_E, lse_S)
        ctx.weight_dtype = weight_VH.dtype
        ctx.kept_SV = logits if keep else None
        ctx.keep, ctx.cap, ctx.rows_in_memory, ctx.first_S = keep, cap, rows_in_memory, first_S
        return logprob_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_E,) = gradients
        hidden_SH, weight, bias_V, row_E, label_E, lse_S = ctx.saved_tensors
        kept_SV, ctx.kept_SV = ctx.kept_SV, None
        if ctx.keep and kept_SV is None:
            raise RuntimeError(
                "the first backward pass wrote the gradient over the logits; a second one is not possible"
            )
        grad_S = torch.zeros_like(lse_S).index_add_(0, row_E, grad_E)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_SH) if wants_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V) if wants_bias else None
        for block in _slices(0, len(lse_S), ctx.rows_in_memory):
            logits = kept_SV if kept_SV is not None else torch.mm(hidden_SH[block], weight.t())
            for rows, pairs in _chunks(block, weight.shape[0], ctx.first_S):
                chunk = logits[_within(rows, block)]
                values = _finish(chunk, bias_V, ctx.cap)
                # d log-prob / d logit = 1[label] − softmax
                grad = (values - lse_S[rows, None]).exp_().mul_(-grad_S[rows, None])
                grad[row_E[pairs] - rows.start, label_E[pairs]] += grad_E[pairs]  # pairs are distinct
                if ctx.cap is not None:
                    grad *= 1 - (values / ctx.cap).square()
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                chunk.copy_(grad)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[block])
            if wants_weight:
                if grad_weight is None:
                    grad_weight = torch.mm(logits.t(), hidden_SH[block]).to(ctx.weight_dtype)
                elif grad_weight.dtype == logits.dtype:
                    grad_weight.addmm_(logits.t(), hidden_SH[block])  # no second matrix of this size
                else:
                    grad_weight += torch.mm(logits.t(), hidden_SH[block])
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _slices(start: int, end: int, size: int) -> Iterator[slice]:
    for first in range(start, end, size):
        yield slice(first, min(first + size, end))


def _chunks(block: slice, vocabulary: int, first_S: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield rows of a block whose logits fit into the processor's cache, with their pairs, in the order of rows."""
    for rows in _slices(block.start, block.stop, max(CHUNK_BYTES // (4 * vocabulary), 1)):
        yield rows, slice(first_S[rows.start], first_S[rows.stop])


def _within(rows: slice, block: slice) -> slice:
    return slice(rows.start - block.start, rows.stop - block.start)


def _finish(logits: Tensor, bias_V: Tensor | None, cap: float | None) -> Tensor:
    """Return logits in float32 with bias and soft-cap applied."""
    values = logits.float()
    if bias_V is not None:
        values = values + bias_V
    if cap is not None:
        values = cap * torch.tanh(values / cap)
    return values
