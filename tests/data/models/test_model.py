"""Models and tokenizers on disk: do they go together?"""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from cpo_pipe.data import fingerprint
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, check_vocabulary
from cpo_pipe.data.store import Store
from tests.support.damage import rot
from tests.support.models import make_tokenizer

VOCABULARY = {"a": 0, "b": 1, "ab": 2}
SPECIAL = [{"id": 3, "content": "<end>", "special": True}]


def write(folder: Path, vocabulary: Any, added: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir()
    content = {"added_tokens": added, "model": {"vocab": vocabulary}, **more}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def check(root: Path, given: Path, own: Path) -> None:
    check_vocabulary(Model("mine", own, "f"), TokenizerFiles(given, "g"), Store(root / "store"))


@pytest.mark.parametrize(
    ("vocabulary", "added"),
    [
        (VOCABULARY, SPECIAL),
        (dict(reversed(VOCABULARY.items())), [{"id": 3, "content": "<end>", "lstrip": True}]),
        ({**VOCABULARY, "<end>": 3}, []),
        ([["a", -1.5], ["b", -2.0], ["ab", -3.0]], SPECIAL),  # as Unigram models have it
    ],
)
def test_the_same_tokens_pass_however_they_are_saved(tmp_path: Path, vocabulary: Any, added: list[Any]) -> None:
    given = write(tmp_path / "given", VOCABULARY, SPECIAL)
    check(tmp_path, given, write(tmp_path / "own", vocabulary, added, version="2.0"))


@pytest.mark.parametrize(
    ("vocabulary", "added", "said"),
    [
        ({"a": 1, "b": 0, "ab": 2}, SPECIAL, "the token id 0 is 'a' in the one and 'b' in the other"),
        (VOCABULARY, [{"id": 3, "content": "<eos>"}], "the token id 3 is '<end>' in the one and '<eos>' in the other"),
        (VOCABULARY, [], "the token id 3 is '<end>' in the one and None in the other"),
        ({**VOCABULARY, "ba": 4}, SPECIAL, "the token id 4 is None in the one and 'ba' in the other"),
    ],
)
def test_other_tokens_are_refused(tmp_path: Path, vocabulary: Any, added: list[Any], said: str) -> None:
    given = write(tmp_path / "given", VOCABULARY, SPECIAL)
    with pytest.raises(InputError) as error:
        check(tmp_path, given, write(tmp_path / "own", vocabulary, added))
    assert str(error.value) == (
        f"data.tokenizer is not that of the model mine: {said}; set data.tokenizer to the model's own"
    )


def test_what_cannot_be_compared_passes(tmp_path: Path) -> None:
    given = write(tmp_path / "given", VOCABULARY, SPECIAL)
    (tmp_path / "bare").mkdir()
    check(tmp_path, given, tmp_path / "bare")
    check(tmp_path, tmp_path / "bare", given)


@pytest.mark.parametrize(
    "content", ["", "[]", "\x00", '{"model": 3}', '{"model": {"vocab": [1]}}', '{"added_tokens": [{}]}', "[" * 100_000]
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    given, own = (write(tmp_path / name, VOCABULARY, SPECIAL) for name in ("given", "own"))
    (own / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{own}/tokenizer.json: ")):
        check(tmp_path, given, own)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_damaged_index_of_weights_is_named(tmp_path: Path, tiny_model: Path, content: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: .*; download or save the model again"):
        locate_model(str(folder), Store(tmp_path / "store"))


def test_damaged_weights_are_never_loaded_under_the_intact_fingerprint(tmp_path: Path, tiny_model: Path) -> None:
    import torch

    folder, root = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "store"
    intact = locate_model(str(folder), Store(root)).fingerprint
    weights = folder / "model.safetensors"
    rot(weights, root)
    found: Model = pickle.loads(pickle.dumps(locate_model(str(folder), Store(root))))  # as a worker gets it
    assert found.fingerprint == intact, "a run that loads no weights does not read them"
    with pytest.raises(RunError, match=r"model\.safetensors: damaged: .* restore the file, or run the command again"):
        found.load(torch.float32)
    damaged = locate_model(str(folder), Store(root))
    assert damaged.fingerprint != intact, "the user was told, and who goes on has another model"
    damaged.load(torch.float32)
    shutil.copyfile(tiny_model / weights.name, weights)
    assert locate_model(str(folder), Store(root)).fingerprint == intact


def test_a_process_hashes_weights_once_and_the_next_one_not_before_it_loads_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(fingerprint, "_CLOCK_TICK_NS", 0)  # the model may have been written a moment ago
    read, hash_file = list[str](), fingerprint.sha256_file
    monkeypatch.setattr(fingerprint, "sha256_file", lambda path: read.append(path.name) or hash_file(path))
    for expected in (1, 0), (0, 1):
        fingerprint._hashes.clear()
        read.clear()
        found = [locate_model(str(tiny_model), Store(tmp_path)) for _ in range(2)]
        assert read.count("model.safetensors") == expected[0]
        for model in found:
            model.load(torch.float32)
        assert read.count("model.safetensors") == sum(expected)


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("hqq", "HQQ")])
def test_quantized_weights_whose_package_is_missing(method: str, package: str, new_model: Callable[..., Path]) -> None:
    import torch

    folder = new_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    with pytest.raises(InputError) as error:
        Model("big", folder, "f").load(torch.float32)
    said = str(error.value)
    assert said.startswith("model big: cannot be loaded (")
    assert package in said
    assert said.endswith(
        f"; its weights are quantized ({method}): install the package that transformers needs for them, or name a "
        "model whose weights are not quantized"
    )
    assert "\n" not in said


def test_context_and_vocabulary_of_a_nested_config(tmp_path: Path) -> None:
    """A model that also sees images has the config of its language model in `text_config`."""
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 24,
    }  # fmt: skip
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=images, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    model = locate_model(str(tmp_path), Store(tmp_path / "store"))
    assert (model.context(), model.vocabulary()) == (24, 300)
