"""Models as they were saved before safetensors and tokenizer.json: pickles, and SentencePiece tokenizers."""

import io
import json
import pickle
import pydoc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


def as_pickles(model: Path, folder: Path, *, shards: int = 1, **format: Any) -> dict[str, torch.Tensor]:
    """Save a model as PyTorch did before safetensors; returns its tensors."""
    tensors = dict(AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict())
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **format)
        return tensors
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        held = names[shard::shards]
        torch.save({name: tensors[name] for name in held}, folder / file, **format)
        weight_map |= dict.fromkeys(held, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


CORPUS = [
    line for text in (pydoc.__doc__, io.__doc__, json.__doc__, pickle.__doc__) for line in (text or "").split("\n")
]

CORPUS += ["naïve café “quoted” 日本語 テスト", "thermal tasks", "def f(x):\n    return  x"] * 9

LIKE = {
    "OpenLLaMA": {"normalization_rule_name": "identity"},  # drops repeated spaces, keeps line breaks
    "Llama": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "no space before a text": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
}


def with_sentencepiece(folder: Path, **settings: Any) -> Any:
    """Give a folder of pickles such a tokenizer, as OpenLLaMA has it; returns SentencePiece's own."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 700, "byte_fallback": True, **settings},
    )
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    facts = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | {"unk_token": "<unk>", "model_max_length": 2048}))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
