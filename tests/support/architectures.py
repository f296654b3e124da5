"""Tiny models of many architectures, with random weights scaled up so that a wrong computation shows."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.model import new_network
from cpo_pipe.data.schemas import CANDIDATE, GROUPS
from cpo_pipe.trainer.scoring.group_table import TokenGroup

VOCABULARY = 96

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, untied": ("llama", {}),
    "Llama, tied, attention bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "GPT-2 (learned positions, tied)": ("gpt2", _GPT),
    "GPT-BigCode (multi-query)": ("gpt_bigcode", _GPT),
    "OPT (learned positions)": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "GPT-NeoX (partial rotary)": ("gpt_neox", {}),
    "Qwen2 (GQA)": ("qwen2", {}),
    "Qwen3 (GQA, head norm)": ("qwen3", {"head_dim": 16}),
    "Qwen3-MoE (experts)": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "Mixtral (experts)": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mistral, no window": ("mistral", {"sliding_window": None}),
    "Mistral, window longer than all": ("mistral", {"sliding_window": 64}),
    "Mistral, window 16": ("mistral", {"sliding_window": 16}),
    "Gemma 2 (soft-caps, windows of 64)": (
        "gemma2",
        {**_GEMMA, "sliding_window": 64, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "Gemma 2, window 16": (
        "gemma2",
        {**_GEMMA, "sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "Gemma 3, window 16 in some layers": (
        "gemma3_text",
        {**_GEMMA, "sliding_window": 16, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    ),
    "VaultGemma (soft-caps)": (
        "vaultgemma",
        {**_GEMMA, "sliding_window": 64, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "Phi (head bias)": ("phi", {"num_key_value_heads": 4}),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "Granite (scaled logits)": ("granite", {"logits_scaling": 2.0}),
    "Cohere (scaled logits)": ("cohere", {"logit_scale": 0.25}),
    "SmolLM 3": ("smollm3", {}),
    "StarCoder 2": ("starcoder2", {}),
    "DeepSeek-V3 (latent attention, experts)": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
        },
    ),
    "GPT-OSS (sinks, window 16, experts)": (
        "gpt_oss",
        {"sliding_window": 16, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Llama 4 (experts, chunks longer than all)": (
        "llama4_text",
        {"intermediate_size_mlp": 96, "num_local_experts": 4, "head_dim": 16, "attention_chunk_size": 128},
    ),
    "StableLM": ("stablelm", {}),
    "Falcon (rotary)": ("falcon", {"num_kv_heads": 2}),
    "Falcon (ALiBi)": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "BLOOM (ALiBi)": ("bloom", {"n_layer": 2, "n_head": 4}),
    "MPT (ALiBi)": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "GPT-J": ("gptj", {**_GPT, "rotary_dim": 8}),
    "GPT-Neo (local layers of 16)": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    ),
    "XGLM": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "BioGPT": ("biogpt", {}),
    "BART (decoder)": (
        "bart",
        {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    ),
    "Doge": ("doge", {}),
    "Mamba (state space)": ("mamba", {"state_size": 8}),
    "Mamba 2 (state space)": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}),
    "Jamba (attention and state space)": (
        "jamba",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "LFM 2 (attention and convolution)": ("lfm2", {"full_attn_idxs": [1]}),
}
"""By the name in the table: transformers' model type and what differs from the common sizes."""

_LIKE_OTHERS = {
    "OPT (learned positions)", "Qwen3-MoE (experts)", "Mistral, no window", "Mistral, window longer than all",
    "Gemma 2 (soft-caps, windows of 64)", "VaultGemma (soft-caps)", "XGLM", "BioGPT", "BART (decoder)", "Doge", "Phi-3",
    "OLMo 2", "Granite (scaled logits)", "SmolLM 3", "StarCoder 2",
    "Falcon (rotary)", "Falcon (ALiBi)", "MPT (ALiBi)", "GPT-J", "Mamba 2 (state space)",
}  # fmt: skip
"""What is particular about them another has, too: these are tested by `just soak` only, and by `just exactness`."""

_FAST = {
    "Llama, untied", "GPT-2 (learned positions, tied)", "Gemma 2, window 16", "Gemma 3, window 16 in some layers",
    "BLOOM (ALiBi)",
}  # fmt: skip
"""One for each attention backend that `auto` may take, and one with learned positions."""

_SLOWEST = {"Mamba (state space)", "Jamba (attention and state space)"}
"""Computed token by token in Python, many times slower than the others."""


def each(slowest: bool = True) -> list[Any]:
    """The names, for a test of every architecture: some in `just test`, others in `just test-slow` or `just soak`.

    Without `slowest` also those are left to the soak.
    """
    soak = _LIKE_OTHERS if slowest else _LIKE_OTHERS | _SLOWEST
    marks = {name: [pytest.mark.soak] if name in soak else [pytest.mark.slow] for name in {*ARCHITECTURES} - _FAST}
    return [pytest.param(name, marks=marks.get(name, [])) for name in ARCHITECTURES]


def make(name: str, **others: Any) -> PreTrainedModel:
    """A model of that name, as Model.load would give it, with `others` in its config."""
    kind, settings = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **settings, **others})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_network(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:  # some set their own range
                parameter.mul_(5)
    return model.train(False)


def group(prompt: int, candidates: int, tokens: int, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and its candidates: the target, two cuts of it, EOS alone, one token, a late fork, samples
    of few different tokens (so that they share beginnings), and an exact double."""
    rng = random.Random(seed)
    target = [rng.randrange(1, VOCABULARY) for _ in range(tokens - 1)] + [0]
    made = [target, [*target[: tokens // 2], 0], [target[0], 0], [0], [7], [*target[:-3], 9, 9, 9]]
    while len(made) < candidates - 1:
        made.append([rng.randrange(1, 5) for _ in range(rng.randrange(1, tokens))])
    made.append(made[-1])
    return [rng.randrange(1, VOCABULARY) for _ in range(prompt)], made[:candidates]


def table(
    groups: Mapping[str, TokenGroup] | Sequence[TokenGroup], ranks: Mapping[str, Sequence[int]] | None = None
) -> pa.Table:
    """Groups (by example id, or numbered) as the trainer has them."""
    named = groups if isinstance(groups, Mapping) else {str(number): group for number, group in enumerate(groups)}
    return pa.Table.from_pylist(
        [
            {
                "example_id": name,
                "prompt_ids": prompt,
                "candidates": [
                    {"candidate_id": candidate_id(prompt, ids), "token_ids": ids,
                     "rank": None if ranks is None else ranks[name][place]}
                    for place, ids in enumerate(candidates)
                ],
            }
            for name, (prompt, candidates) in named.items()
        ],
        schema=pa.schema([GROUPS.field("example_id"), GROUPS.field("prompt_ids"),
                          pa.field("candidates", pa.list_(pa.struct(
                              [CANDIDATE.field(name) for name in ("candidate_id", "token_ids", "rank")])))]),
    )  # fmt: skip


def openai_gpt() -> PreTrainedModel:
    """Knows no cache at all."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = AutoConfig.for_model("openai-gpt", **sizes, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
