"""The self-check: find an attention backend that is numerically equivalent to the model's own forward pass.

Each backend computes log-probs and gradients of real groups (the probes) in float32. It is taken if both agree with
those of the backend `plain`, the model's own forward pass over one row at a time, up to rounding.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.trainer.scoring.attention import AttentionBackend, Unsupported
from cpo_pipe.trainer.scoring.batching import PassTokens, micro_batches, pass_tokens
from cpo_pipe.trainer.scoring.group_table import TokenGroup
from cpo_pipe.trainer.scoring.probes import Probes
from cpo_pipe.trainer.scoring.scorer import Scorer

log = logging.getLogger(__name__)

BACKENDS: dict[str, tuple[AttentionBackend, ...]] = {
    "cpu": ("cascade", "split", "dense", "padded", "plain"),
    "cuda": ("flex", "split", "dense", "padded", "plain"),
}
"""Backends that `auto` tries, by device type. The first equivalent one is taken; never the fastest, because the choice
must not vary from run to run."""

BACKENDS_WITHOUT_SHARING: dict[str, tuple[AttentionBackend, ...]] = {
    "cpu": ("packed", "padded", "plain"),
    "cuda": ("flex", "packed", "padded", "plain"),
}
"""The same where every group has a single candidate, so that nothing is shared."""

TOLERANCE = 2e-5
"""Relative error of log-probs, in float32, up to which a backend is equivalent. A wrong one shows 1e-3 or more."""

GRADIENT_TOLERANCE = 1e-3
"""The same for gradients, whose sums round more: in a pretrained model of 30 layers, transformers' own forward pass
over a padded batch is off by 1e-4 to 2e-4 from that over single rows (docs/log.md)."""

CAUSAL_TOLERANCE = 1e-3
"""Relative difference allowed between a log-prob and the same log-prob in a row that continues after it."""

SHORT_TOKENS = 8
"""Tokens of a prompt and of a candidate that suffice to compare logits of chosen positions with those of all."""


@dataclass(frozen=True)
class BackendChoice:
    """An attention backend that passed the self-check."""

    attention: AttentionBackend
    logprob_error: float
    """Largest difference of a token's log-prob from that of `plain`, relative to the largest log-prob."""
    gradient_error: float
    """Largest difference of a parameter's gradient, relative to its norm."""
    noise: float
    """Rounding of the scorer's dtype: how far the probes' log-probs are from those of `plain` in float32, in nats per
    square root of a token. Rounding errors are independent, so the error of a sum grows with the root of its terms."""
    refused: dict[str, str]
    """Backends that were tried before, with the reason for the refusal."""


def choose_backend(
    name: str,
    scorer: Scorer,
    probes: Probes,
    requested: AttentionBackend | Literal["auto"] | Sequence[AttentionBackend] = "auto",
    micro_batch_tokens: PassTokens = "auto",
    *,
    module: nn.Module | None = None,
    gradients: bool = True,
) -> BackendChoice:
    """Set the scorer to the first attention backend that passes the self-check, and return it.

    Args:
        name: of the model or training, for messages.
        scorer: gets the backend set.
        probes: of the groups that will be computed; a group with a fork is checked as well.
        requested: `auto`, the backend to use, or the backends to try instead of those that `auto` tries.
        micro_batch_tokens: tokens per forward pass, as in the work that follows: then the check needs no more memory.
        module: the scorer as wrapped for several processes.
        gradients: whether gradients will be computed as well.

    Raises:
        InputError: the requested backend is not equivalent for this model or does not run on this device; or the model
            is not causal.
        RunError: the model's log-probs are not finite or not deterministic.
    """
    start = time.monotonic()
    device = next(scorer.parameters()).device.type
    order = _order(name, scorer.model, probes, requested, device)
    precision, scorer.dtype = scorer.dtype, "float32"
    try:
        _check_chosen_positions(scorer, module or scorer, probes.groups[0])
        check = _SelfCheck(scorer, module or scorer, probes, pass_tokens(micro_batch_tokens, device), gradients)
        if not all(bool(values.isfinite().all()) for values in check.truth):
            raise RunError(f"{name}: the model's log-probs are not finite; check whether its weights are damaged")
        if not check.is_deterministic():
            raise RunError(
                f"{name}: the model's log-probs differ from one forward pass to the next, so it draws random numbers; "
                "train another model"
            )
        if not check.is_causal():
            raise InputError(
                f"{name}: the model is not causal: a token's log-prob changes with the tokens after it; use a causal "
                "language model"
            )
        refused: dict[str, str] = {}
        for attention in order:
            reason, errors = _counts_row_tokens(scorer.model, attention, probes), (math.nan, math.nan)
            if reason is None:
                reason, errors = check.compare(attention)
            if reason is None:
                break
            refused[attention] = reason
        else:
            raise InputError(_not_equivalent(name, order[-1], refused[order[-1]]))
        scorer.dtype = precision  # whose rounding is measured
        choice = BackendChoice(attention, *errors, check.noise(), refused)
        if not math.isfinite(choice.noise):
            raise RunError(f"{name}: the model's log-probs are not finite in {precision}; use dtype float32")
    finally:
        scorer.dtype = precision
        (module or scorer).zero_grad(set_to_none=True)
    reasons = "; ".join(f"not {attention}: {reason}" for attention, reason in refused.items())
    log.info(
        "%s: attention backend %s, equivalent up to %.0e, checked in %.1f s%s",
        name, choice.attention, max(errors), time.monotonic() - start, f" ({reasons})" if reasons else "",
    )  # fmt: skip
    return choice


def _not_equivalent(name: str, requested: str, reason: str) -> str:
    return f"{name}: attention {requested} is not numerically equivalent for this model: {reason}; use auto"


def _order(
    name: str,
    model: PreTrainedModel,
    probes: Probes,
    requested: AttentionBackend | Literal["auto"] | Sequence[AttentionBackend],
    device: str,
) -> Sequence[AttentionBackend]:
    """Return the backends to try, in order."""
    if not isinstance(requested, str):
        return ("plain",) if _rope_changes_between(model, *probes.rows) else requested
    if requested not in ("auto", *BACKENDS[device], *BACKENDS_WITHOUT_SHARING[device]):
        raise InputError(f"{name}: attention {requested} does not run on {device}; use auto")
    if _rope_changes_between(model, *probes.rows):
        if requested != "auto":
            reason = "its rotary embeddings change with the length of the longest row computed at once"
            raise InputError(_not_equivalent(name, requested, reason))
        return ("plain",)
    if requested != "auto":
        return (requested,)
    return (BACKENDS_WITHOUT_SHARING if probes.candidates == 1 else BACKENDS)[device]


def _rope_changes_between(model: PreTrainedModel, shortest: int, longest: int) -> bool:
    """Return whether rotary embeddings depend on the longest row computed at once, and differ for rows so long."""
    parameters: Any = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        layer["original_max_position_embeddings"]
        for layer in layers
        if layer.get("rope_type") in ("longrope", "dynamic") and layer.get("original_max_position_embeddings")
    ]
    return any(shortest <= limit < longest for limit in limits)


def _counts_row_tokens(model: PreTrainedModel, attention: AttentionBackend, probes: Probes) -> str | None:
    """Return why a backend is wrong for a model that counts a row's tokens instead of using positions (Llama 4)."""
    settings: Any = model.config.get_text_config()
    step = settings.floor_scale if getattr(settings, "attn_temperature_tuning", False) else None
    if step is None or attention in ("padded", "plain"):
        return None
    if attention != "dense" or probes.tokens >= step:  # rows of several groups have any length
        return f"its attention changes with every {step} tokens of a row, whatever their positions"
    return None


def _check_chosen_positions(scorer: Scorer, module: nn.Module, probe: TokenGroup) -> None:
    """Make the model compute all logits of a row if `logits_to_keep` gives it wrong ones."""
    prompt, (candidate, *_) = probe
    scorer.set_attention("plain")
    with torch.no_grad():
        packed = scorer.pack([(prompt[-SHORT_TOKENS:], [candidate[:SHORT_TOKENS]])])
        found = module(packed) if scorer.keeps else None
        scorer.keeps = False
        if found is not None:
            expected = module(packed)
            scorer.keeps = bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


class _SelfCheck:
    """Compares backends with the model's own forward pass (`plain`), in float32.

    As in a training step, memory holds the logits of one forward pass and one gradient of each parameter: that of
    `plain`, negated. Another backend adds its own, and the sum is its error.
    """

    def __init__(self, scorer: Scorer, module: nn.Module, probes: Probes, budget: int, gradients: bool):
        self._scorer, self._module, self._budget, self._gradients = scorer, module, budget, gradients
        longest = probes.groups[0]
        prompt, candidates = longest
        # The small one shares a forward pass with another group wherever any two groups will.
        small = prompt[-SHORT_TOKENS:], [max(candidates, key=len)[:SHORT_TOKENS]]
        self._groups = [*probes.groups, _fork(scorer.model, longest), small]
        bounds = [0, *accumulate(len(candidates) for _, candidates in self._groups)]
        self._numbers = [range(start, end) for start, end in pairwise(bounds)]
        """Numbers of each group's candidates among all candidates."""
        lengths = [len(candidate) for _, candidates in self._groups for candidate in candidates]
        self._places = torch.split(torch.arange(sum(lengths)), lengths)
        self.truth: list[Tensor] = []
        """Log-probs of each candidate's tokens by `plain`."""
        self._norms: dict[str, float] = {}
        """Norms of its gradients, by parameter."""
        self._negated = False
        """Whether the parameters' gradients are these, negated."""
        self._take_truth()

    def _take_truth(self) -> None:
        self._scorer.set_attention("plain")
        self._module.zero_grad(set_to_none=True)
        self.truth = []
        for prompt, candidates in self._groups:
            for candidate in candidates:
                (values,) = self._logprobs([(prompt, [candidate])], self._gradients)
                if self._gradients:
                    self._backward([values], [len(self.truth)])
                self.truth.append(values.detach())
        self._norms = {name: _norm(p.grad) for name, p in self._module.named_parameters() if p.grad is not None}
        for parameter in self._module.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()
        self._negated = True

    def is_deterministic(self) -> bool:
        """Return whether a second forward pass gives the same log-probs."""
        return self._repeats_truth(self._groups[0], TOLERANCE)

    def is_causal(self) -> bool:
        """Return whether log-probs stay the same where a row ends earlier, if that changes no rotary embeddings."""
        prompt, (candidate, *_) = self._groups[0]
        cut = candidate[: len(candidate) // 2 + 1]
        rows = len(prompt) + len(cut) - 1, len(prompt) + len(candidate) - 1
        return _rope_changes_between(self._scorer.model, *rows) or self._repeats_truth(
            (prompt, [cut]), CAUSAL_TOLERANCE
        )

    def compare(self, attention: AttentionBackend) -> tuple[str | None, tuple[float, float]]:
        """Return why a backend is not equivalent (None if it is), and its errors of log-probs and of gradients."""
        try:
            if not self._negated:
                self._take_truth()
            self._scorer.set_attention(attention)
            scale = max(float(values.abs().max()) for values in self.truth)
            worst = 0.0
            for groups, numbers in self._passes():
                found = self._logprobs(groups, self._gradients)
                errors = [float((a.detach() - self.truth[n]).abs().max()) for a, n in zip(found, numbers, strict=True)]
                worst = _largest([worst, *(error / scale for error in errors)])
                if not worst <= TOLERANCE:
                    return f"log-probs are off by {worst:.0e}", (worst, math.nan)
                if self._gradients:
                    self._negated = False
                    self._backward(found, numbers)
        except Unsupported as reason:
            return str(reason), (math.nan, math.nan)
        except torch.OutOfMemoryError:
            raise  # says nothing about the model, and the choice must not depend on what else is in memory
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
            # Models refuse unknown inputs in many ways. Whatever the error, the backend does not work for this model.
            detail = cause(error) if str(error).strip() else "no reason given"
            return f"{type(error).__name__}: {detail[:100]}", (math.nan, math.nan)
        gradient_error = self._gradient_error()
        if not gradient_error <= GRADIENT_TOLERANCE:
            return f"gradients are off by {gradient_error:.0e}", (worst, gradient_error)
        return None, (worst, gradient_error)

    def noise(self) -> float:
        """Return the rounding error of the current dtype and backend, in nats per square root of a token."""
        found = []
        for groups, numbers in self._passes():
            for logprobs, number in zip(self._logprobs(groups, False), numbers, strict=True):
                errors = (logprobs - self.truth[number]) / len(logprobs) ** 0.5
                found += [float(errors.norm()), abs(float(errors.sum()))]
        return _largest(found)

    def _passes(self) -> Iterator[tuple[list[TokenGroup], list[int]]]:
        """Yield the groups of each forward pass, as training makes them, and the numbers of their candidates."""
        (plan,) = micro_batches(self._groups, self._scorer.attention, self._budget)
        for chosen in plan:
            yield [self._groups[index] for index in chosen], [n for index in chosen for n in self._numbers[index]]

    def _logprobs(self, groups: Sequence[TokenGroup], gradients: bool) -> list[Tensor]:
        """Return the log-probs of each candidate's tokens."""
        with torch.set_grad_enabled(gradients):
            packed = self._scorer.pack(groups)
            rows = packed.per_token(self._module(packed))
            lengths = [len(candidate) for _, candidates in groups for candidate in candidates]
            return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def _backward(self, logprobs: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Backpropagate a weighted sum whose weights let no error cancel another."""
        flat = torch.cat(list(logprobs))
        places = torch.cat([self._places[number] for number in numbers]).to(flat)
        (flat * (7 * places).sin()).sum().backward()  # type: ignore[no-untyped-call]

    def _repeats_truth(self, group: TokenGroup, tolerance: float) -> bool:
        """Return whether `plain` gives a group's first candidate the log-probs that begin those of the first group."""
        self._scorer.set_attention("plain")
        (found,) = self._logprobs([(group[0], group[1][:1])], False)
        expected = self.truth[0][: len(found)]
        return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())

    def _gradient_error(self) -> float:
        """Return the largest error of a parameter's gradient, relative to its norm."""
        total = math.sqrt(sum(norm**2 for norm in self._norms.values()))
        found = {name: p.grad for name, p in self._module.named_parameters() if p.grad is not None}
        # Some are 0 in theory, such as those of key biases.
        return _largest([_norm(found[name]) / max(norm, 1e-2 * total) for name, norm in self._norms.items()])


def _fork(model: PreTrainedModel, group: TokenGroup) -> TokenGroup:
    """Return a group with what all others may lack: a fork, and padding."""
    prompt, candidates = group
    longest = max(candidates, key=len)
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    fork = [(token + 1) % output.weight.shape[0] for token in longest[: len(longest) // 2 + 1]]
    return prompt, [longest, fork]


def _largest(values: Sequence[float]) -> float:
    """Return the largest value (0 for no values), or NaN if any value is NaN; `max` may skip NaN."""
    return float(np.max(values, initial=0.0))


def _norm(tensor: Tensor) -> float:
    norm = tensor.float().norm()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
