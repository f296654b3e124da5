"""Log-probs of a group's candidates, each distinct token computed once where the model allows it.

`Scorer` is what the training loop calls (and wraps for several processes); `choose` finds out, on real groups, which
way of computing is exact for a model, before anything depends on it.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.trainer.attention import CASCADE, FLEX, SEQUENCES, SPLIT, Unsupported, dense_mask
from cpo_pipe.trainer.head import Head, draw
from cpo_pipe.trainer.trees import Labels, Packed, Texts, pack_rows, pack_sequences, pack_trees

log = logging.getLogger(__name__)

Attention = Literal["cascade", "split", "flex", "dense", "packed", "padded", "plain"]
"""`packed` puts every candidate behind the one before in one row, `padded` in a row of its own; `plain` does that one
by one by the model's own forward pass."""

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

TOLERANCE = 2e-5
"""Relative error, in float32, up to which two ways of computing are the same. What is wrong shows as 1e-3 and more."""

GRADIENT_TOLERANCE = 1e-4
"""The same for gradients."""

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
        """Row by row, as anyone would: logits of all positions, log-softmax."""
        rows = packed.source_S // packed.ids.shape[1]
        places = packed.source_S % packed.ids.shape[1]
        found = []
        for number, ids in enumerate(packed.ids):
            # What stands behind the last scored position is padding.
            mine = rows == number
            length = int(places[mine].max()) + 1
            logits = self.model(input_ids=ids[None, :length], use_cache=False).logits[0].float()
            if uniform_SM is not None:
                found.append(draw(logits[places[mine]], uniform_SM[mine]))
                continue
            pairs = mine[packed.row_E]
            found.append(logits.log_softmax(-1)[places[packed.row_E[pairs]], packed.label_E[pairs]])
        return torch.cat(found)


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
    """The longest, the middle and the shortest, by their longest row."""
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
    refused: dict[str, str]
    """Ways that were tried before, with the reason why not."""


def choose(
    name: str,
    scorer: Scorer,
    probes: Probes,
    requested: Attention | Literal["auto"] = "auto",
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
        module: the scorer as wrapped for several processes.
        gradients: whether gradients will be wanted, too.

    Raises:
        InputError: the requested one is not exact for this model, or not for this device; or the model is not causal.
        RunError: the model's log-probs are not finite.
    """
    device = next(scorer.parameters()).device.type
    order = _order(name, scorer.model, probes, requested, device)
    tried = [*probes.groups, _fork(scorer.model, probes.groups[0])]
    precision, scorer.dtype = scorer.dtype, "float32"
    try:
        truth = _probe(scorer, module or scorer, "plain", tried, gradients)
        if not all(bool(values.isfinite().all()) for values in truth[0]):
            raise RunError(f"{name}: the model gives log-probs that are not finite; are its weights damaged?")
        if not _rope_changes_between(scorer.model, probes):  # there a row's length does change its beginning
            _check_causal(name, scorer, module or scorer, tried[0], truth[0])
        refused: dict[str, str] = {}
        for attention in order:
            reason, errors = _sees_the_row(scorer.model, attention, probes), (math.nan, math.nan)
            if reason is None:
                reason, errors = _compare(scorer, module or scorer, attention, tried, truth, gradients)
            if reason is None:
                choice = Choice(attention, *errors, refused)
                break
            refused[attention] = reason
        else:
            raise InputError(
                f"{name}: attention {requested} is not exact for this model: {refused[order[-1]]}; use auto"
            )
    finally:
        scorer.dtype = precision
    said = "; ".join(f"not {attention}: {reason}" for attention, reason in refused.items())
    log.info("%s: attention %s, exact to %.0e%s", name, choice.attention, max(errors), f" ({said})" if said else "")
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


def _check_causal(name: str, scorer: Scorer, module: nn.Module, probe: Texts, truth: Sequence[Tensor]) -> None:
    """Refuse a model whose tokens see what comes after them: its log-probs are none of a continuation.

    `truth` begins with the log-probs of the probe's first candidate.
    """
    prompt, (candidate, *_) = probe
    half = candidate[: len(candidate) // 2 + 1]
    (alone,), _ = _probe(scorer, module, "plain", [(prompt, [half])], gradients=False)
    whole = truth[0][: len(half)]
    if float((alone - whole).abs().max()) > CAUSAL_TOLERANCE * float(whole.abs().max()):
        raise InputError(f"{name}: the model is not causal: a token's log-prob changes with the tokens behind it")


_Probe = tuple[list[Tensor], dict[str, Tensor]]
"""Log-probs of each candidate's tokens, probe by probe, and gradients by parameter."""


def _compare(
    scorer: Scorer, module: nn.Module, attention: Attention, probes: Sequence[Texts], truth: _Probe, gradients: bool
) -> tuple[str | None, tuple[float, float]]:
    """The reason why a way of computing is not exact, if it isn't; and its errors."""
    try:
        logprobs, grads = _probe(scorer, module, attention, probes, gradients)
    except Unsupported as reason:
        return str(reason), (math.nan, math.nan)
    except torch.OutOfMemoryError:
        raise  # says nothing of the model; the choice must not depend on what else is in memory
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        # Models refuse what they don't know in many ways; whatever it is, this way of computing is not theirs.
        return f"{type(error).__name__}: {cause(error)[:100]}", (math.nan, math.nan)
    scale = max(float(values.abs().max()) for values in truth[0])
    wrong = max(float((a - b).abs().max()) for a, b in zip(logprobs, truth[0], strict=True)) / scale
    wrong_gradient = 0.0
    if gradients:
        total = math.sqrt(sum(_norm(grad) ** 2 for grad in truth[1].values()))
        for parameter, expected in truth[1].items():
            if parameter not in grads:
                return f"no gradient reaches {parameter}", (wrong, math.nan)
            size = max(_norm(expected), 1e-2 * total)  # some are 0 in theory, such as those of key biases
            wrong_gradient = max(wrong_gradient, _norm(grads[parameter] - expected) / size)
    if not wrong <= TOLERANCE:
        return f"log-probs are off by {wrong:.0e}", (wrong, wrong_gradient)
    if not wrong_gradient <= GRADIENT_TOLERANCE:
        return f"gradients are off by {wrong_gradient:.0e}", (wrong, wrong_gradient)
    return None, (wrong, wrong_gradient)


def _probe(scorer: Scorer, module: nn.Module, attention: Attention, probes: Sequence[Texts], gradients: bool) -> _Probe:
    scorer.set_attention(attention)
    module.zero_grad(set_to_none=True)
    logprobs: list[Tensor] = []
    with torch.set_grad_enabled(gradients):
        for together in _passes(attention, probes):
            packed = scorer.pack(together)
            rows = packed.per_token(module(packed))
            lengths = [len(candidate) for _, candidates in together for candidate in candidates]
            values = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            if gradients:  # of a sum with weights that let no error cancel another
                start, flat = sum(map(len, logprobs)), torch.cat(values)
                places = torch.arange(start, start + len(flat), dtype=flat.dtype, device=flat.device)
                (flat * (7 * places).sin()).sum().backward()  # type: ignore[no-untyped-call]
            logprobs += [value.detach() for value in values]
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return logprobs, grads


def _passes(attention: Attention, probes: Sequence[Texts]) -> list[list[Texts]]:
    """Probes as they are computed: together where training does that, and one row at a time the plain way."""
    if attention == "plain":
        return [[(prompt, [candidate])] for prompt, candidates in probes for candidate in candidates]
    if attention in ("packed", "padded", "flex"):
        return [[probes[0]], list(probes[1:])]
    return [[probe] for probe in probes]


def _norm(tensor: Tensor) -> float:
    norm = tensor.float().norm()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
