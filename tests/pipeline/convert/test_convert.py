"""`cpo-pipe convert`: pickles to safetensors, and SentencePiece models to tokenizers that encode as they do."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.data.models.fetch import fetch_folder
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.convert.convert import convert
from cpo_pipe.pipeline.convert.sentencepiece import TEXTS
from tests.support.old_models import CORPUS, LIKE, as_pickles, with_sentencepiece
from tests.support.project import Result

Cli = Callable[..., Result]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).state_dict())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_model_is_the_same(tiny_model: Path, tmp_path: Path, cli: Cli, shards: int, zipped: bool) -> None:
    tensors = as_pickles(tiny_model, tmp_path / "old", shards=shards, _use_new_zipfile_serialization=zipped)
    (tmp_path / "old" / "README.md").write_text("mine")
    (tmp_path / "old" / "training_args.bin").write_bytes(b"of no use")
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "new")
    assert result.status == 0, result.err
    assert_equal(loaded(tmp_path / "new"), tensors)
    given = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir() if path.suffix != ".bin"}
    given.pop("pytorch_model.bin.index.json", None)
    assert {name: (tmp_path / "new" / name).read_bytes() for name in given} == given
    assert outputs(tmp_path / "new") == sorted([*given, "model.safetensors"])
    text = "the quick  brown fox\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "new").encode(text) == AutoTokenizer.from_pretrained(
        tiny_model
    ).encode(text)
    assert locate_model(str(tmp_path / "new"), Store(tmp_path / "store")).fingerprint


@pytest.mark.parametrize("shards", [1, 3])
def test_large_models_become_several_files(tiny_model: Path, tmp_path: Path, shards: int) -> None:
    tensors = as_pickles(tiny_model, tmp_path / "old", shards=shards)
    limit = 100_000
    convert(str(tmp_path / "old"), tmp_path / "new", shard_size=limit)
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < limit + 10_000 for file in files)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {name for file in files for name in load_file(file)} == index["weight_map"].keys() == tensors.keys()
    assert_equal(loaded(tmp_path / "new"), tensors)


def test_the_dtype_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    tensors = as_pickles(tmp_path / "half", tmp_path / "old")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert_equal(loaded(tmp_path / "new"), tensors)


@pytest.mark.parametrize("shards", [1, 2])
def test_tied_tensors_are_saved_once(new_model: Callable[..., Path], tmp_path: Path, shards: int) -> None:
    """Also where the pickles have each of them, which of two files are two."""
    model = new_model(tie_word_embeddings=True)
    tensors = as_pickles(model, tmp_path / "old", shards=shards)
    assert "lm_head.weight" in tensors
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == tensors.keys() - {"lm_head.weight"}
    assert_equal(loaded(tmp_path / "new"), tensors)


def test_tensors_that_only_share_memory_are_both_saved(tiny_model: Path, tmp_path: Path) -> None:
    tensors = as_pickles(tiny_model, tmp_path / "old")
    same = "model.layers.{}.mlp.down_proj.weight"
    tensors[same.format(1)] = tensors[same.format(0)]
    whole = torch.arange(64.0 * 2)  # two norms that are parts of one tensor
    tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] = whole[:64], whole[64:]
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert_equal(loaded(tmp_path / "new"), tensors)


def test_names_without_the_prefix_are_those_of_the_body(new_model: Callable[..., Path], tmp_path: Path) -> None:
    """GPT-2's pickles begin with `wte.weight`, and have buffers that the model no longer has."""
    model = new_model(architecture="gpt2")
    tensors = as_pickles(model, tmp_path / "old")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    torch.save(bare | {"h.0.attn.bias": torch.ones(1, 1, 128, 128)}, tmp_path / "old" / "pytorch_model.bin")
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert_equal(loaded(tmp_path / "new"), tensors)


def test_one_pickle_is_in_memory_at_a_time(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pickles(tiny_model, tmp_path / "old", shards=3)
    load, earlier = torch.load, []

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert not any(tensor() is not None for tensor in earlier)
        content = load(*arguments, **settings)
        earlier.extend(weakref.ref(tensor) for tensor in content.values())
        return content

    monkeypatch.setattr(torch, "load", watched)
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert len(earlier) > 3


def test_of_a_hub_model_the_pickles_are_downloaded_and_no_copies(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_pickles(tiny_model, tmp_path / "old")
    asked = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path / "old")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("me/old", tmp_path / "new")
    wanted = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json",
              "generation_config.json", "tokenizer.model", "tokenizer.json", "chat_template.jinja",
              "README.md"]  # fmt: skip
    others = ["model.safetensors", "model-00001-of-00002.safetensors", "original/pytorch_model.bin",
              "training_args.bin", "tf_model.h5", "flax_model.msgpack", "onnx/config.json",
              "optimizer.bin"]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert asked["name"] == "me/old"
    assert list(filter_repo_objects([*others, *wanted], **patterns)) == wanted
    fetch_folder("me/old", "model")
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    found = set(filter_repo_objects([*others, *wanted], **patterns))
    assert {"model.safetensors", "config.json"} <= found
    assert not any(name.endswith(".bin") for name in found), "elsewhere no pickle is downloaded"


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_a_pickle_that_runs_code_does_not(tiny_model: Path, tmp_path: Path, cli: Cli, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for number, format in enumerate([{}, {"_use_new_zipfile_serialization": False}]):
        old = tmp_path / f"old{number}"
        tensors = as_pickles(tiny_model, old)
        torch.save(tensors | {"lm_head.weight": _Runs()}, old / "pytorch_model.bin", **format)
        result = cli("convert", old, "--out", "new")
        assert result.status == 2
        assert f"model {old}: pytorch_model.bin runs code when it is loaded (" in result.error()
        assert "system" in result.error()
    (old / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs()))
    assert cli("convert", old, "--out", "new").status == 2
    assert outputs(tmp_path) == ["old0", "old1"], "nothing ran, and nothing was left"


def _cut(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-3000])


def _pointer(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _saved_quantized(folder: Path) -> None:
    """In a process of its own: pickle looks for the scheme in all modules, and those of transformers import others."""
    tensor = "torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8)"
    code = f"import sys, torch; torch.save({{'a': {tensor}}}, sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder / "pytorch_model.bin")], check=True)


def _saved(folder: Path, content: Any) -> None:
    torch.save(content, folder / "pytorch_model.bin")


def _without(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    _saved(folder, tensors)


def _other_shape(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin")
    _saved(folder, tensors | {"model.norm.weight": torch.ones(63)})


def _config(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | settings))


def _index(folder: Path, *files: str) -> None:
    (folder / "pytorch_model.bin").unlink()
    weight_map = dict(zip("abc", files, strict=False))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no pickle": (lambda folder: (folder / "pytorch_model.bin").unlink(), "has neither pytorch_model.bin nor"),
    "safetensors": (
        lambda folder: (folder / "model.safetensors").touch(),
        "is safetensors already; use it without converting",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "cut short": (_cut, "pytorch_model.bin is damaged or contains no tensors ("),
    "a pointer": (_pointer, "pytorch_model.bin is damaged or contains no tensors ("),
    "empty": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
        "damaged or contains no tensors (0 bytes)",
    ),
    "a list": (lambda folder: _saved(folder, [1]), "contains something other than tensors by name"),
    "a state": (lambda folder: _saved(folder, {"model": {}}), "contains something other than tensors by name"),
    "missing": (_without, "its weights lack 2 tensors of its architecture, such as model.layers.1.mlp.up_proj.weight"),
    "a shape": (_other_shape, "the tensor model.norm.weight has the shape [63], but config.json expects [64]"),
    "an index": (
        lambda folder: _index(folder, "x.bin"),
        "x.bin is missing, which pytorch_model.bin.index.json names",
    ),
    "an index of others": (lambda folder: _index(folder, "../y.bin"), "y.bin is missing, which"),
    "an index of none": (_index, "pytorch_model.bin.index.json names no file"),
    "a config cut short": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON ("),
    "a config of no model": (
        lambda folder: _config(folder, num_attention_heads=3),
        "config.json makes no model (",
    ),
    "nothing": (lambda folder: _saved(folder, {}), "contains something other than tensors by name"),
    "no content": (
        lambda folder: _saved(folder, {"model.norm.weight": torch.ones(64, device="meta")}),
        "contains something other than tensors by name",
    ),
    "quantized": (
        _saved_quantized,
        "contains something other than tensors by name",
    ),
    "a tensor": (lambda folder: _saved(folder, torch.ones(64)), "contains something other than tensors by name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_converted_is_one_line(tiny_model: Path, tmp_path: Path, cli: Cli, kind: str) -> None:
    spoil, said = BAD[kind]
    as_pickles(tiny_model, tmp_path / "old")
    (tmp_path / "y.bin").touch()
    spoil(tmp_path / "old")
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "new")
    assert result.status == 2, result.err
    assert result.error().startswith(f"error: model {tmp_path / 'old'}: ")
    assert said in result.error()
    assert outputs(tmp_path) == ["old", "y.bin"]


def test_a_tokenizer_that_does_not_load_is_warned_of_and_runs_no_code(
    tiny_model: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    as_pickles(tiny_model, tmp_path / "old")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / "old" / name).unlink(missing_ok=True)
    facts = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(facts))
    (tmp_path / "old" / "mine.py").write_text("raise SystemExit('run')\n")
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "new")
    assert result.status == 0, result.err
    assert "its tokenizer does not load (tokenizer_config.json asks to run Python code" in result.err
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_a_link_to_an_empty_folder_is_that_folder(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    as_pickles(tiny_model, tmp_path / "old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "elsewhere")
    assert cli("convert", tmp_path / "old", "--out", tmp_path / "new").status == 0
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert (tmp_path / "new").is_symlink()


def test_nothing_is_written_over(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    as_pickles(tiny_model, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "old")
    assert result.status == 2
    assert f"--out {tmp_path / 'old'}: already exists; name a folder that is new or empty" in result.error()
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


# ── SentencePiece ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", LIKE)
def test_texts_are_encoded_as_sentencepiece_does(
    new_model: Callable[..., Path], tmp_path: Path, cli: Cli, kind: str
) -> None:
    as_pickles(new_model(vocab_size=700), tmp_path / "old")
    truth = with_sentencepiece(tmp_path / "old", **LIKE[kind])
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "new")
    assert result.status == 0, result.err
    assert ("may normalize rare combinations" in result.err) == (kind == "normalized")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    texts = [*CORPUS, *TEXTS, *(f" {line}  {line}\n" for line in CORPUS)]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == truth.encode(texts)
    assert tokenizer("a  b")["input_ids"] == [truth.bos_id(), *truth.encode("a  b")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 2048)
    for text in CORPUS:
        assert tokenizer.decode(truth.encode(text)) == truth.decode(truth.encode(text))
    # What transformers makes of the same file by itself is another tokenizer, which is why this is done.
    theirs = AutoTokenizer.from_pretrained(tmp_path / "old", use_fast=False)
    assert theirs(texts, add_special_tokens=False)["input_ids"] != truth.encode(texts)


def test_a_tokenizer_that_is_exact_stays_as_it_is(new_model: Callable[..., Path], tmp_path: Path) -> None:
    as_pickles(new_model(vocab_size=700), tmp_path / "old")
    with_sentencepiece(tmp_path / "old", **LIKE["Llama"])
    convert(str(tmp_path / "old"), tmp_path / "new")
    shutil.copyfile(tmp_path / "new" / "tokenizer.json", tmp_path / "old" / "tokenizer.json")
    shutil.copyfile(tmp_path / "new" / "tokenizer_config.json", tmp_path / "old" / "tokenizer_config.json")
    with (tmp_path / "old" / "tokenizer.json").open("a") as file:
        file.write("\n")
    convert(str(tmp_path / "old"), tmp_path / "again")
    kept = [(tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("old", "again")]
    assert kept[0] == kept[1]


def test_added_tokens_stay(new_model: Callable[..., Path], tmp_path: Path) -> None:
    as_pickles(new_model(vocab_size=702), tmp_path / "old")
    truth = with_sentencepiece(tmp_path / "old", **LIKE["OpenLLaMA"])
    (tmp_path / "old" / "added_tokens.json").write_text(json.dumps({"[PAD]": 700, "<|user|>": 701}))
    convert(str(tmp_path / "old"), tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer("a<|user|>b  c", add_special_tokens=False)["input_ids"] == [
        *truth.encode("a"), 701, *truth.encode("b  c")
    ]  # fmt: skip
    assert tokenizer.convert_tokens_to_ids("[PAD]") == 700


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "unigram"}, "tokenizer.model: only SentencePiece's BPE models are converted"),
        # SentencePiece puts no space before what follows a symbol; tokenizer.json has no way to say so.
        ({"user_defined_symbols": ["<sep>"]}, "tokenizer.model: no tokenizer.json encodes 'a<sep>b' as it does"),
        (None, "tokenizer.model: no SentencePiece model"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    new_model: Callable[..., Path], tmp_path: Path, cli: Cli, settings: dict[str, Any] | None, said: str
) -> None:
    as_pickles(new_model(vocab_size=700), tmp_path / "old")
    with_sentencepiece(tmp_path / "old", **(settings or {}))
    if settings is None:
        (tmp_path / "old" / "tokenizer.model").write_bytes(b"none")
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "new")
    assert result.status == 2, result.err
    assert said in result.error()
    assert outputs(tmp_path) == ["old"]


def test_without_sentencepiece_it_is_said(tiny_model: Path, tmp_path: Path, cli: Cli, monkeypatch: Any) -> None:
    as_pickles(tiny_model, tmp_path / "old")
    (tmp_path / "old" / "tokenizer.model").write_bytes(b"a model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    result = cli("convert", tmp_path / "old", "--out", tmp_path / "new")
    assert result.status == 2
    assert 'sentencepiece is not installed: pip install -e ".[sentencepiece]"' in result.error()
