"""`Scorer`: a causal language model that returns log-probs of candidates, each distinct token computed once.

Which attention backend computes them is set by `self_check.choose_backend`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cpo_pipe.trainer.scoring.attention import (
    CASCADE,
    FLEX,
    SEQUENCES,
    SPLIT,
    AttentionBackend,
    Unsupported,
    dense_mask,
)
from cpo_pipe.trainer.scoring.group_table import TokenGroup
from cpo_pipe.trainer.scoring.head import Head, draw
from cpo_pipe.trainer.scoring.prefix_tree import Labels, Packed, pack_rows, pack_sequences, pack_trees

PLAIN_BYTES = 16
"""Memory per logit of the model's own forward pass: the logit, its soft-cap, its log-prob, its gradient."""


class Scorer(nn.Module):
    """A causal language model that returns log-probs of candidates.

    Args:
        model: without dropout (`remove_dropout`).
        dtype: `float32`, or `bfloat16` for autocast over float32 weights.
        logits_mb: memory for logits that are kept between forward and backward pass, in MiB.
    """

    def __init__(self, model: PreTrainedModel, dtype: str = "float32", logits_mb: int = 1024):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.attention: AttentionBackend = "padded"
        self.logits_bytes = logits_mb << 20
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        """Whether the model's own forward pass can compute the logits of chosen positions only."""
        self._head = Head.of(model)
        self._own_attention = model.config._attn_implementation
        # FSDP shards by these.
        self._no_split_modules = model._no_split_modules

    def tie_weights(self) -> None:
        """Tie weights; accelerate calls this where one process loads the weights for all (FSDP)."""
        self.model.tie_weights()

    def pack(self, groups: Sequence[TokenGroup], labels: Labels | None = None) -> Packed:
        """Return groups as the input of one forward pass, on the model's device.

        The backend `dense` takes one group. With `labels`, a candidate predicts these tokens
        instead of its own.
        """
        if self.attention == "packed":
            packed = pack_sequences(groups, labels)
        elif self.attention in ("padded", "plain"):
            packed = pack_rows(groups, labels)
        else:
            packed = pack_trees(groups, labels)
        return packed.to(next(self.model.parameters()).device)

    def forward(self, packed: Packed, uniform_SM: Tensor | None = None) -> Tensor:
        """Return the log-probs of the pairs of `packed`, in nats: (E,), float32.

        With uniform numbers, return instead M tokens drawn after each of its S hidden states, without gradient: (S, M).
        """
        with self._precision(packed.ids.device), torch.set_grad_enabled(torch.is_grad_enabled() and uniform_SM is None):
            if uniform_SM is not None:
                if self.attention == "plain":
                    return torch.cat([draw(logits, uniform_SM[part]) for part, logits in self._plain_logits(packed)])
                return self._head.sample(*self._head_inputs(packed), uniform_SM)
            if self.attention == "plain":
                return self._plain_logprobs(packed)
            return self._head.logprobs(
                *self._head_inputs(packed), packed.row_E, packed.label_E, packed.first_S, self.logits_bytes
            )

    @torch.no_grad()
    def logits(self, packed: Packed) -> Iterator[Tensor]:
        """Yield the logits from which each candidate's tokens are predicted, (L, V), in float32.

        Only for the backends `padded` and `plain`. With `padded` they are bit for bit those of the model's own forward
        pass over the padded batch.
        """
        with self._precision(packed.ids.device):
            if self.attention == "plain":
                logits_SV = torch.cat([logits for _, logits in self._plain_logits(packed)])
            else:  # at all positions: a product with fewer rows may round differently
                assert self.attention == "padded"
                output: Any = self.model(input_ids=packed.ids, use_cache=False)
                logits_SV = output.logits.flatten(0, 1)[packed.source_S]
        for pair_L in packed.pair_KL:
            yield logits_SV[packed.row_E[pair_L[pair_L < len(packed.row_E)]]].float()

    def set_attention(self, attention: AttentionBackend) -> None:
        """Compute with this backend from now on. `choose_backend` checks whether it is equivalent."""
        self.attention = attention
        names = {"cascade": CASCADE, "split": SPLIT, "flex": FLEX, "packed": SEQUENCES}
        self._use(names.get(attention, self._own_attention))

    def set_checkpointing(self, on: bool) -> None:
        """Set whether layers are computed again in the backward pass instead of being kept.

        Raises:
            ValueError: the model has no such layers.
        """
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpointed(on)

    def _checkpointed(self, on: bool) -> None:
        # Only layers in training mode are checkpointed. Only their own flag is set, so that dropout inside stays off.
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = on

    @contextmanager
    def own_attention(self) -> Iterator[PreTrainedModel]:
        """Yield the model with transformers' attention, for its own methods, such as `generate`."""
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

    def _head_inputs(self, packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the hidden states that predict something, (S, H), and return them with the head's weight and bias."""
        extra: dict[str, Any] = {}
        if packed.tree is not None:
            extra["position_ids"] = packed.tree.position_N.unsqueeze(0)
            if self.attention == "dense":
                dtype = torch.float32 if self.dtype == "float32" else torch.bfloat16
                extra["attention_mask"] = dense_mask(packed.tree, dtype, self.model)
            else:
                extra["cpo_tree"] = packed.tree
        hidden: Tensor = _body(self.model)(input_ids=packed.ids, use_cache=False, **extra)[0]
        output: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return hidden.flatten(0, 1)[packed.source_S], output.weight, getattr(output, "bias", None)

    def _plain_logprobs(self, packed: Packed) -> Tensor:
        """Return the log-prob of each pair, (E,), by the model's own forward pass over one row at a time.

        Logits that do not fit into `logits_mb` are computed in parts, each by a forward pass of its row that is
        repeated in the backward pass.
        """
        fits = len(packed.source_S) <= self._plain_part() or not torch.is_grad_enabled()
        found = []
        for row, places, part in self._plain_rows(packed):
            # In rows without sharing each position predicts one token: pair e is that of hidden state e.
            inputs = row, places, packed.label_E[part]
            found.append(
                self._own_logprobs(*inputs)
                if fits
                else checkpoint(self._own_logprobs, *inputs, use_reentrant=False, preserve_rng_state=False)
            )
        return torch.cat(found)

    def _plain_logits(self, packed: Packed) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of the S hidden states, by number, with their logits."""
        for row, places, part in self._plain_rows(packed):
            yield part, self._own_logits(row, places)

    def _plain_rows(self, packed: Packed) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each row without padding, with places whose logits fit into memory and the numbers of these places."""
        width = packed.ids.shape[1]
        row_S, place_S = packed.source_S // width, packed.source_S % width
        for number, ids in enumerate(packed.ids):
            mine = (row_S == number).nonzero().flatten()
            row = ids[: int(place_S[mine].max()) + 1]  # after the last scored position is padding
            for part in torch.split(mine, self._plain_part()):
                yield row, place_S[part], part

    def _plain_part(self) -> int:
        """Return how many logit vectors of the model's own forward pass fit into memory."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[no-untyped-call]
        return max(self.logits_bytes // (PLAIN_BYTES * int(vocabulary)), 1)

    def _own_logprobs(self, row: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(self._own_logits(row, places), labels, reduction="none")

    def _own_logits(self, row: Tensor, places: Tensor) -> Tensor:
        """Return the logits that the model's own forward pass gives at these places of a row, in float32."""
        chosen = {"logits_to_keep": places} if self.keeps else {}
        logits: Tensor = self.model(input_ids=row[None], use_cache=False, **chosen).logits[0]
        return (logits if self.keeps else logits[places]).float()


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the part of the model that computes the hidden states."""
    body: nn.Module = model.base_model
    if body is model:  # the name that transformers has for it leads nowhere (Llama 4)
        body = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    return body
