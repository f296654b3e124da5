"""`cpo-pipe convert` of GGUF files: the same weights, tokens and chat template, or one line that says why not."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.pipeline.convert.convert import convert
from cpo_pipe.pipeline.convert.gguf import TYPES
from tests.support.gguf_files import gguf_name, interleaved, write_gguf
from tests.support.marks import slow_except
from tests.support.project import Result

gguf = pytest.importorskip("gguf")

Cli = Callable[..., Result]
NOT_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}
HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(scope="module")
def llama(new_model: Callable[..., Path]) -> Path:
    """A Llama whose matrices have rows of 256, as the types of super-blocks need."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return new_model(num_hidden_layers=1, tie_word_embeddings=False, bos_token_id=0, **sizes)


def test_a_model_and_its_tokenizer_come_back(llama: Path, tmp_path: Path, cli: Cli) -> None:
    write_gguf(llama, tmp_path / "model.gguf")
    result = cli("convert", tmp_path / "model.gguf", "--out", tmp_path / "new")
    assert result.status == 0, result.err
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    old, new = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "new"))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[name], new[name]) for name in old)
    ids = torch.tensor([[5, 7, 11, 13]])
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (llama, tmp_path / "new")]
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=1e-5, atol=1e-5)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (llama, tmp_path / "new")]
    text = "the quick  brown fox, naïve 12345<|endoftext|>\n"
    assert tokenizers[1](text).input_ids == tokenizers[0](text).input_ids
    assert tokenizers[1].eos_token_id == 0
    assert tokenizers[1].apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_every_type_of_the_format_is_read_or_refused() -> None:
    quantized = {kind.name for kind in gguf.GGMLQuantizationType} - NOT_WEIGHTS
    assert {
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    } <= TYPES
    # Q8_1 and Q8_K are of activations.
    assert quantized - TYPES <= {"Q8_1", "Q8_K", "Q1_0"}


@pytest.mark.parametrize("kind", slow_except(sorted(TYPES), "Q4_K", "Q5_0", "BF16"))
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_the_weights_are_those_that_the_blocks_stand_for(llama: Path, tmp_path: Path, kind: str) -> None:
    held = write_gguf(llama, tmp_path / "model.gguf", kind)
    convert(str(tmp_path), tmp_path / "new")
    for name, weight in load_file(tmp_path / "new" / "model.safetensors").items():
        assert weight.dtype == np.float32
        heads = next((count for part, count in HEADS.items() if part in name), None)
        found = interleaved(weight, heads) if heads else weight
        np.testing.assert_array_equal(found, held[gguf_name(name)], name)


def test_digits_are_split_off_where_the_model_was_trained_so(llama: Path, tmp_path: Path) -> None:
    merges = ["1 2", "Ġ Ġ", "Ġ 1"]
    vocabulary = AutoTokenizer.from_pretrained(llama).get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)[:297], "12", "ĠĠ", "Ġ1"]
    for pre, expected in (("gpt-2", ["12", "3", "Ġ", "Ġ1"]), ("smollm", ["1", "2", "3", "ĠĠ", "1"])):
        values: dict[str, Any] = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens}
        write_gguf(llama, tmp_path / f"{pre}.gguf", **values, **{"tokenizer.ggml.merges": merges})
        convert(str(tmp_path / f"{pre}.gguf"), tmp_path / pre)
        assert AutoTokenizer.from_pretrained(tmp_path / pre).tokenize("123  1") == expected


def test_texts_begin_with_bos_where_the_file_says_so(llama: Path, tmp_path: Path) -> None:
    for wanted, first in ((True, [0]), (False, [])):
        name = str(wanted)
        write_gguf(
            llama,
            tmp_path / f"{name}.gguf",
            **{"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": wanted},
        )
        convert(str(tmp_path / f"{name}.gguf"), tmp_path / name)
        new, old = AutoTokenizer.from_pretrained(tmp_path / name), AutoTokenizer.from_pretrained(llama)
        assert new("the fox").input_ids == first + old("the fox").input_ids


def test_a_pre_tokenizer_that_transformers_knows_is_left_to_it(llama: Path, tmp_path: Path, cli: Cli) -> None:
    write_gguf(llama, tmp_path / "model.gguf", **{"tokenizer.ggml.pre": "llama-bpe"})
    result = cli("convert", tmp_path / "model.gguf", "--out", tmp_path / "new")
    assert "pre-tokenizer" not in result.err
    # Llama 3 splits digits by threes; GPT-2 does not split them.
    backend = AutoTokenizer.from_pretrained(tmp_path / "new").backend_tokenizer
    parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str("12345")]
    assert parts == ["123", "45"]


def test_an_unknown_pre_tokenizer_is_warned_of(llama: Path, tmp_path: Path, cli: Cli) -> None:
    write_gguf(llama, tmp_path / "model.gguf", **{"tokenizer.ggml.pre": "own-split"})
    result = cli("convert", tmp_path / "model.gguf", "--out", tmp_path / "new")
    assert result.status == 0
    assert "its pre-tokenizer own-split is unknown" in result.err


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("metadata", "kind", "said"),
    [
        ({"split.count": 3}, "F32", "is one of 3 parts; join them with llama.cpp's `llama-gguf-split --merge` first"),
        ({}, "Q8_K", "has tensors of type Q8_K, which cannot be read; get a file of another quantization, such as F16"),
        ({"general.architecture": "own"}, "F32", "transformers cannot read this GGUF file"),
        ({"tokenizer.ggml.model": "own"}, "F32", "transformers cannot read this GGUF file"),
        ({"llama.block_count": 2}, "F32", "its weights lack 9 tensors of its architecture"),
        ({"cut": True}, "F32", "is damaged or no GGUF file"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    llama: Path, tmp_path: Path, cli: Cli, metadata: dict[str, Any], kind: str, said: str
) -> None:
    damaged = metadata.pop("cut", False)
    write_gguf(llama, tmp_path / "model.gguf", kind, **metadata)
    if damaged:
        cut(tmp_path / "model.gguf")
    result = cli("convert", tmp_path / "model.gguf", "--out", tmp_path / "new")
    assert result.status == 2, result.err
    assert said in result.error()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_folder_must_say_which_file_is_meant(tmp_path: Path, cli: Cli) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    result = cli("convert", tmp_path, "--out", tmp_path / "new")
    assert result.status == 2
    assert f"has 2 GGUF files; name one of them, such as {tmp_path / 'a.gguf'}" in result.error()
    result = cli("convert", tmp_path / "c.gguf", "--out", tmp_path / "new")
    assert (result.status, "no such file" in result.error()) == (2, True)


def test_without_the_package_it_is_said(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = cli("convert", tmp_path, "--out", tmp_path / "new")
    assert result.status == 2
    assert 'gguf is not installed: pip install -e ".[gguf]"' in result.error()
