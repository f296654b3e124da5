"""Tiny real models and tokenizers, made on the spot."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported
# Tensors here are tiny: more threads only wait for each other, the longer the busier the machine is.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 entries; `<|endoftext|>` (id 0) is EOS and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)


def make_model(folder: Path, *, seed: int = 0, architecture: str = "llama", **config: object) -> Path:
    """A model folder with random weights, scaled up so that its distribution is far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    sizes: dict[str, object] = {"vocab_size": 300, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    if architecture == "llama":
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
    elif architecture == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**sizes, **config}))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda **config: make_model(tmp_path_factory.mktemp("model"), **config)


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Ground-truth rows, each unlike the others."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    return [
        {"prompt": f"say {words[i % 8]} {i}", "target": f"{words[i % 7]} {words[i % 5]} {i * 7}"}
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rot(file: Path, store: Path) -> None:
    """Flip a bit of a file whose hash the store has cached, as a failing disk does: size and times stay the same."""
    from cpo_pipe.data import fingerprint

    cache = store / "file-hashes.json"
    files = json.loads(cache.read_text())["files"] if cache.exists() else {}
    intact = fingerprint.sha256_file(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    files[str(file.resolve())] = [fingerprint._stamp(file.resolve())[0], intact]
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"checksum": fingerprint.digest(files), "files": files}))
    fingerprint._hashes.clear()  # another process has read nothing yet
