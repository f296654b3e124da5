"""Attention over trees of tokens, hooked into transformers by name.

`cascade`: attention to the prompt and to the own branch separately, merged by their log-sum-exps (CPU).
`split`: each branch attends to the prompt and itself; branches are computed in parallel (any device; sliding windows).
`dense`: a mask over all tokens, with the model's own attention (any device).
`flex`: FlexAttention with a block mask over the tokens of several groups (CUDA).
`sequences`: each sequence of a row attends to itself, for rows without forks (any device; sliding windows).
All but `dense` take several groups in one row.

Shapes: N tokens of all groups; of one group, P tokens of the prompt, B behind it, R paths of at most D of these; A
heads of W channels.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from cpo_pipe.trainer.scoring.prefix_tree import Branches, Tree

AttentionBackend = Literal["cascade", "split", "flex", "dense", "packed", "padded", "plain"]
"""How candidates are computed. `cascade`, `split`, `flex` and `dense` compute a prefix tree; `packed` puts candidates
one after the other in one row, `padded` each in a row of its own; `plain` is the model's own forward pass over one row
at a time."""

CASCADE, SPLIT, FLEX, SEQUENCES = "cpo_cascade", "cpo_split", "cpo_flex", "cpo_sequences"
"""Names in transformers' AttentionInterface."""


class Unsupported(Exception):
    """The backend cannot compute this model; the text says why."""


Attend = Callable[[Branches, Tensor, Tensor, Tensor, float | None, int | None], Tensor]
"""Attention over one group: from query, key and value of all heads, (1, A, P + B, W) each, a scale and a sliding
window."""


def _over_groups(attend: Attend) -> Callable[..., tuple[Tensor, None]]:
    """Return an attention function for transformers: it checks the layer, and calls `attend` for each group."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        cpo_tree: Tree | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        tree = _checked(module, key, cpo_tree, attention_mask, dropout, rest)
        # Rotary embeddings leave autocast in float32, and on CPUs the kernel's backward pass is faster in it.
        dtype = torch.float32 if value.device.type == "cpu" else value.dtype
        query, keys, values = query.to(dtype), key.to(dtype), value.to(dtype)
        keys, values = (_for_all_heads(tensor, query) for tensor in (keys, values))
        # `split`, because the gradient of each slice would be a tensor of the whole row.
        of_groups = [torch.split(tensor, list(tree.lengths), dim=2) for tensor in (query, keys, values)]
        with torch.autocast(value.device.type, enabled=False):
            found = [
                attend(branches, q, k, v, scaling, sliding_window)
                for branches, q, k, v in zip(tree.branches, *of_groups, strict=True)
            ]
        return torch.cat(found, dim=2).transpose(1, 2).to(value.dtype).contiguous(), None

    return attention


def _cascade(
    branches: Branches, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> Tensor:
    if window is not None and window < branches.depth():
        raise Unsupported(f"its window of {window} is shorter than a prompt with its candidate")
    if key.shape[-1] != value.shape[-1]:
        raise Unsupported("its keys and values are of different sizes")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Cascade.apply(query, key, value, branches, scale)  # type: ignore[no-untyped-call]
    return out


class _Cascade(torch.autograd.Function):
    """Three calls of the flash kernel: the prompt, the branches to the prompt, the branches to themselves."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, branches: Branches, scale: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        trunk, branch = slice(0, branches.prompt), slice(branches.prompt, None)
        key_P, value_P = key[:, :, trunk], value[:, :, trunk]
        out = torch.empty_like(query)
        out_P, lse_P = flash(query[:, :, trunk], key_P, value_P, 0.0, True, scale=scale)
        out[:, :, trunk] = out_P
        saved = [query, key, value, lse_P]
        if branches.path_RD.numel():
            to_prompt, lse_prompt = flash(query[:, :, branch], key_P, value_P, 0.0, False, scale=scale)
            query_R, key_R, value_R = (_paths(tensor[:, :, branch], branches) for tensor in (query, key, value))
            to_own_R, lse_own_R = flash(query_R, key_R, value_R, 0.0, True, scale=scale)
            to_own, lse_own = _owned(to_own_R, branches), _owned(lse_own_R.unsqueeze(-1), branches).squeeze(-1)
            lse = torch.logaddexp(lse_prompt, lse_own)
            out[:, :, branch] = to_prompt * (lse_prompt - lse).exp().unsqueeze(-1) + to_own * (
                lse_own - lse
            ).exp().unsqueeze(-1)
            saved += [lse]
        ctx.save_for_backward(*saved, out)
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        branches, scale = ctx.branches, ctx.scale
        query, key, value, lse_P, *merged, out = ctx.saved_tensors
        (grad,) = gradients
        trunk, branch = slice(0, branches.prompt), slice(branches.prompt, None)
        key_P, value_P = key[:, :, trunk], value[:, :, trunk]
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        query_P, out_P = query[:, :, trunk], out[:, :, trunk]
        parts = flash(grad[:, :, trunk], query_P, key_P, value_P, out_P, lse_P, 0.0, True, scale=scale)
        grad_query[:, :, trunk], grad_key[:, :, trunk], grad_value[:, :, trunk] = parts
        if merged:
            # Given the merged output and log-sum-exp, each part's kernel returns that part's share of the gradient.
            (lse,) = merged
            query_B, out_B, grad_B = (tensor[:, :, branch] for tensor in (query, out, grad))
            part_query, part_key, part_value = flash(
                grad_B, query_B, key_P, value_P, out_B, lse, 0.0, False, scale=scale
            )
            grad_key[:, :, trunk] += part_key
            grad_value[:, :, trunk] += part_value
            query_R, key_R, value_R, out_R = (_paths(t[:, :, branch], branches) for t in (query, key, value, out))
            # Each token's query counts in one of its rows; in the others, and in padding, it must contribute nothing.
            grad_R = _spread(grad_B, branches, 0.0)
            lse_R = _spread(lse.unsqueeze(-1), branches, torch.inf).squeeze(-1)
            own_query, own_key, own_value = flash(grad_R, query_R, key_R, value_R, out_R, lse_R, 0.0, True, scale=scale)
            grad_query[:, :, branch] = part_query + _owned(own_query, branches)
            grad_key[:, :, branch] = _collected(own_key, branches, query_B.shape[2])
            grad_value[:, :, branch] = _collected(own_value, branches, query_B.shape[2])
        return grad_query, grad_key, grad_value, None, None


def _split(
    branches: Branches, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> Tensor:
    attend = functional.scaled_dot_product_attention
    trunk, branch = slice(0, branches.prompt), slice(branches.prompt, None)
    query_P, key_P, value_P = (tensor[:, :, trunk] for tensor in (query, key, value))
    window = window if window is not None and window < branches.depth() else None
    mask_PP = _visible(0, branches.prompt, branches.prompt, window, query.device) if window else None
    out = attend(query_P, key_P, value_P, attn_mask=mask_PP, is_causal=window is None, scale=scale)
    if branches.path_RD.numel():
        rows, depth = branches.path_RD.shape
        query_R, key_R, value_R = (_paths(tensor[:, :, branch], branches) for tensor in (query, key, value))
        key_R = torch.cat([key_P.expand(rows, -1, -1, -1), key_R], dim=2)
        value_R = torch.cat([value_P.expand(rows, -1, -1, -1), value_R], dim=2)
        mask = _visible(branches.prompt, depth, branches.prompt + depth, window, query.device)
        out_R = attend(query_R, key_R, value_R, attn_mask=mask, scale=scale)
        out = torch.cat([out, _owned(out_R, branches)], dim=2)
    return out


def _sequence(
    branches: Branches, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> Tensor:
    length = query.shape[2]
    window = window if window is not None and window < length else None
    mask = _visible(0, length, length, window, query.device) if window else None
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=window is None, scale=scale
    )


def _visible(first: int, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys (at positions 0, 1, …) each query (at positions `first`, …) attends to: (queries, keys)."""
    position = torch.arange(first, first + queries, device=device).unsqueeze(1)
    distance = position - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _checked(
    module: nn.Module, key: Tensor, tree: Tree | None, mask: Tensor | None, dropout: float, rest: dict[str, Any]
) -> Tree:
    """Return the tree, if the layer computes ordinary causal attention over it; else raise Unsupported."""
    if tree is None:
        raise Unsupported("it does not pass keywords on to its attention")
    if mask is not None:
        raise Unsupported("it makes an attention mask of its own")
    if dropout:
        raise Unsupported("its attention has dropout")
    if not (rest.get("is_causal") if rest.get("is_causal") is not None else getattr(module, "is_causal", True)):
        raise Unsupported("its attention is not causal")
    if key.shape[0] != 1 or key.shape[2] != len(tree.end_N):
        raise Unsupported("it attends to other tokens than its input")
    for name, what in _EXTRAS.items():
        if rest.get(name) is not None:
            raise Unsupported(f"its attention has {what}")
    return tree


_EXTRAS = {
    "softcap": "soft-capped scores",
    "s_aux": "sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "attention_chunk_size": "chunks",
}


def _for_all_heads(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _paths(branch: Tensor, branches: Branches) -> Tensor:
    """Map (1, A, B, W) to (R, A, D, W): the tokens of each path."""
    return branch[0][:, branches.path_RD].transpose(0, 1)


def _owned(rows: Tensor, branches: Branches) -> Tensor:
    """Map (R, A, D, W) to (1, A, B, W): each token's value from the first path it is on."""
    return rows.transpose(1, 2).flatten(0, 1)[branches.own_B].transpose(0, 1).unsqueeze(0)


def _spread(branch: Tensor, branches: Branches, elsewhere: float) -> Tensor:
    """Map (1, A, B, W) to (R, A, D, W): each token's value on the first path it is on, `elsewhere` everywhere else."""
    rows, depth = branches.path_RD.shape
    flat = branch.new_full((rows * depth, branch.shape[1], branch.shape[3]), elsewhere)
    flat[branches.own_B] = branch[0].transpose(0, 1)
    return flat.view(rows, depth, *flat.shape[1:]).transpose(1, 2)


def _collected(rows: Tensor, branches: Branches, tokens: int) -> Tensor:
    """Map (R, A, D, W) to (1, A, B, W): the sum over all paths that a token is on. Padding must be 0."""
    flat = rows.transpose(1, 2).flatten(0, 1)
    total = flat.new_zeros(tokens, *flat.shape[1:]).index_add_(0, branches.path_RD.flatten(), flat)
    return total.transpose(0, 1).unsqueeze(0)


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cpo_tree: Tree | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    tree = _checked(module, key, cpo_tree, attention_mask, dropout, rest)
    query, key = query.to(value.dtype), key.to(value.dtype)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out = _flex_kernel(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=tree.block_mask(sliding_window),
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


@cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


for _name, _attend in ((CASCADE, _cascade), (SPLIT, _split), (SEQUENCES, _sequence)):
    AttentionInterface.register(_name, _over_groups(_attend))
AttentionInterface.register(FLEX, _flex)


def dense_mask(tree: Tree, dtype: torch.dtype, model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """Return 0 where a token attends to another, −inf elsewhere: (1, 1, N, N); by layer type where layers differ."""

    def additive(window: int | None) -> Tensor:
        allowed = tree.mask(window)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)

    masks = {kind: additive(window)[None, None] for kind, window in _windows(model).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Return the sliding window by layer type; one entry where all layers are of one type."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds and kinds <= {"full_attention", "sliding_attention"}:
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
    return {"all": window}
