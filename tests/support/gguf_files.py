"""GGUF files of tiny Llama models."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return OUTER[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order in which llama.cpp rotates them: pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: Path, file: Path, kind: str = "F32", **metadata: Any) -> dict[str, np.ndarray]:
    """Write a tiny Llama as GGUF, its matrices quantized as `kind`; returns the values that the file holds.

    Types that the gguf package cannot quantize to get random blocks. `metadata` overrides that of the file; None leaves
    a key out.
    """
    gguf = pytest.importorskip("gguf")
    config = json.loads((model / "config.json").read_text())
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    values = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": key_heads,
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.token_type": [3] + [1] * (len(vocabulary) - 1),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | metadata
    writer = gguf.GGUFWriter(file, arch=values.pop("general.architecture", "llama"))
    for key, value in values.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
               list: writer.add_array}  # fmt: skip
        if value is not None:
            add[type(value)](key, value)
    held = {}
    quantization = gguf.GGMLQuantizationType[kind]
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleaved(weight, heads if ".q_proj" in name else key_heads)
        if weight.ndim == 1:
            held[gguf_name(name)] = weight
            writer.add_tensor(gguf_name(name), weight)
            continue
        try:
            blocks = gguf.quants.quantize(weight, quantization)
        except NotImplementedError:
            shape = gguf.quant_shape_to_byte_shape(weight.shape, quantization)
            blocks = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        with suppress(NotImplementedError):  # which is what a test of that type is about
            held[gguf_name(name)] = gguf.quants.dequantize(blocks, quantization)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
