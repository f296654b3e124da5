"""Log-probs of a group's candidates, each distinct token computed once where the model allows it.

`Scorer` is what the training loop calls (and wraps for several processes); `choose` finds out, on real groups, which
way of computing is exact for a model, before anything depends on it.
"""

import inspect
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.trainer.attention import CASCADE, FLEX, SEQUENCES, SPLIT, Attention, Unsupported, dense_mask
from cpo_pipe.trainer.batches import micro_batches
from cpo_pipe.trainer.head import Head, draw
from cpo_pipe.trainer.trees import Labels, Packed, Texts, pack_rows, pack_sequences, pack_trees

log = logging.getLogger(__name__)

ORDER: dict[str, tuple[Attention, ...]] = {
    "cpu": ("cascade", "split", "dense", "padded", "plain"),
    "cuda": ("flex", "split", "dense", "padded", "plain"),
}
"""What `auto` tries, by kind of device; the first exact one is taken. Never by timing: the choice must not vary."""

ORDER_ALONE: dict[str, tuple[Attention, ...]] = {
    "cpu": ("packed", "padded", "plain"),
    "cuda": ("flex", "packed", "padded", "plain"),
}
"""The same where no group has more than one candidate, so that nothing is shared."""

PLAIN_BYTES = 16
"""Memory per logit of the model's own forward pass: the logit, its soft-cap, its log-prob, its gradient."""

TOLERANCE = 2e-5
"""Relative error, in float32, up to which two ways of computing are the same. What is wrong shows as 1e-3 and more."""

GRADIENT_TOLERANCE = 1e-4
"""The same for gradients."""

KEPT_TOKENS = 8
"""Of a prompt and of a candidate: enough to see whether logits of chosen positions are those of all."""

CAUSAL_TOLERANCE = 1e-3
"""Relative difference that a log-prob may have from itself when the row goes on behind it."""


class Scorer(nn.Module):
    """A causal language model that gives log-probs of candidates.

    Args:
        model: with all dropout off.
        dtype: `float32`, or `bfloat16` for autocast over float32 weights.
        logits_mb: memory for logits that are kept between forward and backward pass, in MiB.
    """

    def __init__(self, model: PreTrainedModel, dtype: str = "float32", logits_mb: int = 1024):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.attention: Attention = "padded"
        self.logits_bytes = logits_mb << 20
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        """Whether the model's own forward pass makes logits of chosen positions only."""
        self._head = Head.of(model)
        self._own_attention = model.config._attn_implementation
        # What accelerate shards by (FSDP).
        self._no_split_modules = model._no_split_modules

    def tie_weights(self) -> None:
        """Called by accelerate where one process loads the weights for all (FSDP)."""
        self.model.tie_weights()

    def pack(self, groups: Sequence[Texts], labels: Labels | None = None) -> Packed:
        """Groups as the input of one forward pass, on the model's device. Cascade, split and dense take one group.

        With `labels` a candidate is to predict these tokens instead of its own.
        """
        if self.attention == "packed":
            packed = pack_sequences(groups, labels)
        elif self.attention in ("padded", "plain"):
            packed = pack_rows(groups, labels)
        else:
            packed = pack_trees(groups, labels)
        return packed.to(next(self.model.parameters()).device)

    def forward(self, packed: Packed, uniform_SM: Tensor | None = None) -> Tensor:
        """Log-probs of the pairs of `packed`, in nats: (E,), float32.

        With uniform numbers instead M tokens drawn after each of its S hidden states, without gradient: (S, M).
        """
        with self._precision(packed.ids.device), torch.set_grad_enabled(torch.is_grad_enabled() and uniform_SM is None):
            if self.attention == "plain":
                return self._plain(packed, uniform_SM)
            hidden = self._hidden(packed)
            output: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
            bias = getattr(output, "bias", None)
            hidden_SH = hidden.flatten(0, 1)[packed.source_S]
            if uniform_SM is not None:
                return self._head.sample(hidden_SH, output.weight, bias, uniform_SM)
            return self._head.logprobs(
                hidden_SH, output.weight, bias, packed.row_E, packed.label_E, packed.first_S, self.logits_bytes
            )

    def set_attention(self, attention: Attention) -> None:
        """Compute in this way from now on. `choose` checks whether it is exact."""
        self.attention = attention
        names = {"cascade": CASCADE, "split": SPLIT, "flex": FLEX, "packed": SEQUENCES}
        self._use(names.get(attention, self._own_attention))

    def set_checkpointing(self, on: bool) -> None:
        """Whether layers are computed again in the backward pass instead of being kept.

        Raises:
            ValueError: the model has no such layers.
        """
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpointed(on)

    def _checkpointed(self, on: bool) -> None:
        # Only layers in training mode are checkpointed. Just their own flag: what is inside them stays without dropout.
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = on

    @contextmanager
    def own_attention(self) -> Iterator[PreTrainedModel]:
        """The model with transformers' attention, for what it does itself, such as generating."""
        attention = self.attention
        checkpointed = any(module.training for module in self.model.modules())
        self.set_attention("plain")
        self._checkpointed(False)
        try:
            yield self.model
        finally:
            self.set_attention(attention)
            self._checkpointed(checkpointed)

    def _use(self, implementation: str) -> None:
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
            if self.model.config._attn_implementation != implementation:
                raise Unsupported("its attention cannot be replaced")

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == "float32" else torch.autocast(device.type, torch.bfloat16)

    def _hidden(self, packed: Packed) -> Tensor:
        extra: dict[str, Any] = {}
        if packed.tree is not None:
            extra["position_ids"] = packed.tree.position_N.unsqueeze(0)
            if self.attention == "dense":
                dtype = torch.float32 if self.dtype == "float32" else torch.bfloat16
                extra["attention_mask"] = dense_mask(packed.tree, dtype, self.model)
            else:
                extra["cpo_tree"] = packed.tree
        hidden: Tensor = _body(self.model)(input_ids=packed.ids, use_cache=False, **extra)[0]
        return hidden

    def _plain(self, packed: Packed, uniform_SM: Tensor | None) -> Tensor:
        """Row by row by the model's own forward pass; of each distinct pair, or drawn.

        Logits that do not fit into `logits_mb` are made in parts, each by a forward pass of its row that is repeated in
        the backward pass.
        """
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[no-untyped-call]
        part_size = max(self.logits_bytes // (PLAIN_BYTES * vocabulary), 1)
        fits = len(packed.source_S) <= part_size or not torch.is_grad_enabled()
        width = packed.ids.shape[1]
        row_S, place_S = packed.source_S // width, packed.source_S % width
        found = []
        for number, ids in enumerate(packed.ids):
            mine = (row_S == number).nonzero().flatten()
            row = ids[: int(place_S[mine].max()) + 1]  # behind the last scored position is padding
            for part in torch.split(mine, part_size):
                if uniform_SM is not None:
                    found.append(draw(self._own_logits(row, place_S[part]), uniform_SM[part]))
                    continue
                # In rows without sharing each position predicts one token: pair e is that of hidden state e.
                inputs = row, place_S[part], packed.label_E[part]
                found.append(
                    self._own_logprobs(*inputs)
                    if fits
                    else checkpoint(self._own_logprobs, *inputs, use_reentrant=False, preserve_rng_state=False)
                )
        return torch.cat(found)

    def _own_logprobs(self, row: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(self._own_logits(row, places), labels, reduction="none")

    def _own_logits(self, row: Tensor, places: Tensor) -> Tensor:
        """Return the logits that the model's own forward pass gives at these places of a row, in float32."""
        chosen = {"logits_to_keep": places} if self.keeps else {}
        logits: Tensor = self.model(input_ids=row[None], use_cache=False, **chosen).logits[0]
        return (logits if self.keeps else logits[places]).float()


def _body(model: PreTrainedModel) -> nn.Module:
    """What makes the hidden states."""
    body: nn.Module = model.base_model
    if body is model:  # where transformers' own name for it leads nowhere (Llama 4)
        body = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    return body


@dataclass(frozen=True)
class Probes:
    """Of the groups that will be computed, however many, what decides how. Small, and can be pickled."""

    groups: Sequence[Texts]
    """The longest, the middle and the shortest, by their longest row; and the one with the largest tree."""
    rows: tuple[int, int]
    """Input tokens of the shortest and of the longest of all rows."""
    candidates: int
    """Of the group that has most."""
    tokens: int
    """Of the largest group, prompt and candidates."""


@dataclass(frozen=True)
class Choice:
    """A way of computing that was found exact."""

    attention: Attention
    logprob_error: float
    """Largest difference of a token's log-prob from the plain way's, relative to the largest log-prob."""
    gradient_error: float
    """Largest difference of a parameter's gradient, relative to its norm."""
    noise: float
    """Rounding of the scorer's dtype: how far the log-probs of the probes are off those of the plain way in float32,
    in nats per square root of a token. Rounding errors are independent, so that of a sum grows with its root."""
    refused: dict[str, str]
    """Ways that were tried before, with the reason why not."""


def choose(
    name: str,
    scorer: Scorer,
    probes: Probes,
    requested: Attention | Literal["auto"] = "auto",
    micro_batch_tokens: int = 8192,
    *,
    module: nn.Module | None = None,
    gradients: bool = True,
) -> Choice:
    """Take the first exact way of computing, by comparing with the plain one, in float32.

    Args:
        name: of the model or training, for messages.
        scorer: gets the choice set.
        probes: of what will be computed; one with a fork is tried, too.
        requested: `auto`, or the one to take.
        micro_batch_tokens: tokens per forward pass, as in what follows: then this needs no more memory.
        module: the scorer as wrapped for several processes.
        gradients: whether gradients will be wanted, too.

    Raises:
        InputError: the requested one is not exact for this model, or not for this device; or the model is not causal.
        RunError: the model's log-probs are not finite, or not the same each time.
    """
    start = time.monotonic()
    device = next(scorer.parameters()).device.type
    order = _order(name, scorer.model, probes, requested, device)
    precision, scorer.dtype = scorer.dtype, "float32"
    try:
        _check_kept(scorer, module or scorer, probes.groups[0])
        check = _SelfCheck(scorer, module or scorer, probes, micro_batch_tokens, gradients)
        if not all(bool(values.isfinite().all()) for values in check.truth):
            raise RunError(f"{name}: the model gives log-probs that are not finite; are its weights damaged?")
        if not check.repeats():
            raise RunError(
                f"{name}: the model gives other log-probs each time: it draws random numbers; train another model"
            )
        # A row's length may change its beginning where rotary embeddings do.
        if not _rope_changes_between(scorer.model, probes) and not check.causal():
            raise InputError(f"{name}: the model is not causal: a token's log-prob changes with the tokens behind it")
        refused: dict[str, str] = {}
        for attention in order:
            reason, errors = _sees_the_row(scorer.model, attention, probes), (math.nan, math.nan)
            if reason is None:
                reason, errors = check.compare(attention)
            if reason is None:
                break
            refused[attention] = reason
        else:
            raise InputError(
                f"{name}: attention {requested} is not exact for this model: {refused[order[-1]]}; use auto"
            )
        scorer.dtype = precision  # whose rounding is measured
        choice = Choice(attention, *errors, check.noise(), refused)
    finally:
        scorer.dtype = precision
        (module or scorer).zero_grad(set_to_none=True)
    said = "; ".join(f"not {attention}: {reason}" for attention, reason in refused.items())
    log.info(
        "%s: attention %s, exact to %.0e, checked in %.1f s%s",
        name, choice.attention, max(errors), time.monotonic() - start, f" ({said})" if said else "",
    )  # fmt: skip
    return choice


def _order(name: str, model: PreTrainedModel, probes: Probes, requested: str, device: str) -> tuple[Attention, ...]:
    """The ways to try."""
    if requested not in ("auto", *ORDER[device], *ORDER_ALONE[device]):
        raise InputError(f"{name}: attention {requested} does not run on {device}; use auto")
    if _rope_changes_between(model, probes):
        if requested != "auto":
            raise InputError(
                f"{name}: attention {requested} is not exact for this model: its rotary embeddings change with the "
                "length of the longest row computed at once; use auto"
            )
        return ("plain",)
    if requested != "auto":
        return (cast(Attention, requested),)
    return (ORDER_ALONE if probes.candidates == 1 else ORDER)[device]


def _fork(model: PreTrainedModel, group: Texts) -> Texts:
    """One that has what all others may lack: a fork, and padding."""
    prompt, candidates = group
    longest = max(candidates, key=len)
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    fork = [(token + 1) % output.weight.shape[0] for token in longest[: len(longest) // 2 + 1]]
    return prompt, [longest, fork]


def _rope_changes_between(model: PreTrainedModel, probes: Probes) -> bool:
    """Whether rotary embeddings depend on the longest row computed at once, and rows on both sides of a limit occur."""
    parameters: Any = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        layer["original_max_position_embeddings"]
        for layer in layers
        if layer.get("rope_type") in ("longrope", "dynamic") and layer.get("original_max_position_embeddings")
    ]
    shortest, longest = probes.rows
    return any(shortest <= limit < longest for limit in limits)


def _sees_the_row(model: PreTrainedModel, attention: Attention, probes: Probes) -> str | None:
    """Why a way of computing is wrong for a model that counts a row's tokens, where others have positions (Llama 4)."""
    settings: Any = model.config.get_text_config()
    step = settings.floor_scale if getattr(settings, "attn_temperature_tuning", False) else None
    if step is None or attention in ("padded", "plain"):
        return None
    if attention in ("packed", "flex") or probes.tokens >= step:  # rows of several groups have any length
        return f"its attention changes with every {step} tokens of a row, whatever their positions"
    return None


def _check_kept(scorer: Scorer, module: nn.Module, probe: Texts) -> None:
    """Have the model make all logits of a row where those of chosen positions are others."""
    prompt, (candidate, *_) = probe
    short = prompt[-KEPT_TOKENS:], [candidate[:KEPT_TOKENS]]
    scorer.set_attention("plain")
    with torch.no_grad():
        packed = scorer.pack([short])
        found = module(packed) if scorer.keeps else None
        scorer.keeps = False
        if found is not None:
            whole = module(packed)
            scorer.keeps = bool((found - whole).abs().max() <= TOLERANCE * whole.abs().max())


class _SelfCheck:
    """Compares ways of computing with the model's own forward pass, row by row, in float32.

    In memory are, as in a training step, the logits of one forward pass and one gradient of each parameter: the plain
    way's, negated. Another way adds its own, and what is left is its error.
    """

    def __init__(self, scorer: Scorer, module: nn.Module, probes: Probes, budget: int, gradients: bool):
        self._scorer, self._module, self._budget, self._gradients = scorer, module, budget, gradients
        longest = probes.groups[0]
        prompt, candidates = longest
        # The last shares a forward pass with another one wherever any two groups will.
        small = prompt[-8:], [max(candidates, key=len)[:8]]
        self._texts = [*probes.groups, _fork(scorer.model, longest), small]
        bounds = [0, *accumulate(len(candidates) for _, candidates in self._texts)]
        self._numbers = [range(start, end) for start, end in pairwise(bounds)]
        """Of each text's candidates, among all."""
        lengths = [len(candidate) for _, candidates in self._texts for candidate in candidates]
        self._places = torch.split(torch.arange(sum(lengths)), lengths)
        self.truth: list[Tensor] = []
        """The plain way's log-probs of each candidate's tokens."""
        self._norms: dict[str, float] = {}
        """Of its gradients, by parameter."""
        self._negated = False
        """Whether the parameters' gradients are these, negated."""
        self._take_truth()

    def _take_truth(self) -> None:
        self._scorer.set_attention("plain")
        self._module.zero_grad(set_to_none=True)
        self.truth = []
        for prompt, candidates in self._texts:
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

    def repeats(self) -> bool:
        """Whether the model gives the same log-probs again."""
        return self._same(self._texts[0], TOLERANCE)

    def causal(self) -> bool:
        """Whether log-probs stay the same where a row ends earlier."""
        prompt, (candidate, *_) = self._texts[0]
        return self._same((prompt, [candidate[: len(candidate) // 2 + 1]]), CAUSAL_TOLERANCE)

    def compare(self, attention: Attention) -> tuple[str | None, tuple[float, float]]:
        """The reason why a way of computing is not exact, if it isn't; and its errors."""
        try:
            if not self._negated:
                self._take_truth()
            self._scorer.set_attention(attention)
            scale = max(float(values.abs().max()) for values in self.truth)
            wrong = 0.0
            for texts, numbers in self._passes():
                found = self._logprobs(texts, self._gradients)
                errors = [float((a.detach() - self.truth[n]).abs().max()) for a, n in zip(found, numbers, strict=True)]
                wrong = max(wrong, *(error / scale for error in errors))
                if not wrong <= TOLERANCE:
                    return f"log-probs are off by {wrong:.0e}", (wrong, math.nan)
                if self._gradients:
                    self._negated = False
                    self._backward(found, numbers)
        except Unsupported as reason:
            return str(reason), (math.nan, math.nan)
        except torch.OutOfMemoryError:
            raise  # says nothing of the model; the choice must not depend on what else is in memory
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
            # Models refuse what they don't know in many ways; whatever it is, this way of computing is not theirs.
            said = cause(error) if str(error).strip() else "no reason given"
            return f"{type(error).__name__}: {said[:100]}", (math.nan, math.nan)
        wrong_gradient = self._gradient_error()
        if not wrong_gradient <= GRADIENT_TOLERANCE:
            return f"gradients are off by {wrong_gradient:.0e}", (wrong, wrong_gradient)
        return None, (wrong, wrong_gradient)

    def noise(self) -> float:
        """How far the log-probs are off, as they are computed now, in nats per square root of a token."""
        worst = 0.0
        for texts, numbers in self._passes():
            for found, number in zip(self._logprobs(texts, False), numbers, strict=True):
                errors = found - self.truth[number]
                worst = max(
                    worst, float(errors.norm()) / len(errors) ** 0.5, abs(float(errors.sum())) / len(errors) ** 0.5
                )
        return worst

    def _passes(self) -> Iterator[tuple[list[Texts], list[int]]]:
        """The texts of each forward pass, as training makes them, small ones first; and which candidates they are."""
        (plan,) = micro_batches(self._texts, self._scorer.attention, self._budget)
        for chosen in plan:
            yield [self._texts[index] for index in chosen], [n for index in chosen for n in self._numbers[index]]

    def _logprobs(self, texts: Sequence[Texts], gradients: bool) -> list[Tensor]:
        """Of each candidate's tokens."""
        with torch.set_grad_enabled(gradients):
            packed = self._scorer.pack(texts)
            rows = packed.per_token(self._module(packed))
            lengths = [len(candidate) for _, candidates in texts for candidate in candidates]
            return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def _backward(self, logprobs: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Of a sum with weights that let no error cancel another."""
        flat = torch.cat(list(logprobs))
        places = torch.cat([self._places[number] for number in numbers]).to(flat)
        (flat * (7 * places).sin()).sum().backward()  # type: ignore[no-untyped-call]

    def _same(self, text: Texts, tolerance: float) -> bool:
        """Whether the plain way gives a text's first candidate the log-probs that begin those of the first text."""
        self._scorer.set_attention("plain")
        (found,) = self._logprobs([(text[0], text[1][:1])], False)
        expected = self.truth[0][: len(found)]
        return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())

    def _gradient_error(self) -> float:
        """The largest error of a parameter's gradient, relative to its norm."""
        total = math.sqrt(sum(norm**2 for norm in self._norms.values()))
        found = {name: p.grad for name, p in self._module.named_parameters() if p.grad is not None}
        # Some are 0 in theory, such as those of key biases.
        return max((_norm(found[name]) / max(norm, 1e-2 * total) for name, norm in self._norms.items()), default=0.0)


def _norm(tensor: Tensor) -> float:
    norm = tensor.float().norm()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
