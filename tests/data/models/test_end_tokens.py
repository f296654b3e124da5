import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.end_tokens import end_tokens, joined, name_end_tokens, without_end, write_end_tokens
from cpo_pipe.data.models.tokenizer import TokenizerFiles


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def ids(folder: Path) -> tuple[int, ...]:
    return end_tokens(folder, TokenizerFiles(folder, "fingerprint"))


@pytest.fixture
def folder(new_model: Callable[..., Path]) -> Path:
    model = new_model()
    (model / "generation_config.json").unlink(missing_ok=True)
    edit(model / "config.json", eos_token_id=None)
    return model


def test_the_tokenizers_eos_ends_a_text(folder: Path) -> None:
    assert ids(folder) == (AutoTokenizer.from_pretrained(folder).eos_token_id,) == (0,)


def test_a_declaration_may_be_an_object_or_stand_in_the_old_file(folder: Path) -> None:
    token = {"content": "<|endoftext|>", "lstrip": False, "__type": "AddedToken"}
    edit(folder / "tokenizer_config.json", eos_token=token)
    assert ids(folder) == (0,)
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "special_tokens_map.json", eos_token=token)
    assert ids(folder) == (0,)


def test_an_ordinary_token_may_be_the_eos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="dog")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    token = next(name for name in vocabulary if name.isalpha() and len(name) > 1)
    edit(folder / "tokenizer_config.json", eos_token=token)
    assert ids(folder) == (vocabulary[token],)


def test_the_generation_configs_ids_end_it_too(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 5])
    assert ids(folder) == (0, 5, 7)
    edit(folder / "generation_config.json", eos_token_id=9)
    assert ids(folder) == (0, 9)


def test_the_configs_ids_end_it_too_also_nested_ones(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=8)
    assert ids(folder) == (0, 8)
    edit(folder / "config.json", text_config={"eos_token_id": [6, 8]})
    edit(folder / "generation_config.json", eos_token_id=[3, 0])
    assert ids(folder) == (0, 3, 6, 8)
    assert end_tokens(folder, None) == (0, 3, 6, 8)
    assert end_tokens(None, TokenizerFiles(folder, "fingerprint")) == (0,)


def test_the_tokenizers_eos_comes_first(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=[0, 9])
    token = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(5)
    edit(folder / "tokenizer_config.json", eos_token=token)
    assert ids(folder) == (5, 0, 9)
    assert joined([], [4, 2, 4]) == (2, 4)


def test_ids_that_the_model_cannot_write_are_left_out(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=-1)
    edit(folder / "generation_config.json", eos_token_id=[299, 300])
    assert ids(folder) == (0, 299)


@pytest.mark.parametrize("value", ["2", [2, "3"], 2.0, True, {"id": 2}])
def test_what_is_no_id_is_refused(folder: Path, value: Any) -> None:
    edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is .*; set it to a token id or"):
        ids(folder)


AUTHORS = {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.3, "min_length": 9, "suppress_tokens": [3],
           "forced_eos_token_id": 4, "pad_token_id": 7, "bos_token_id": 6}  # fmt: skip
"""Contradictory, as Vicuna's and Llama 2's are: transformers refuses to save them."""


def test_a_network_names_its_end_tokens_and_nothing_that_its_authors_sample_with(folder: Path, tmp_path: Path) -> None:
    edit(folder / "generation_config.json", **AUTHORS, eos_token_id=0)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        network.save_pretrained(tmp_path / "before")
    name_end_tokens(network, (5, 0))
    network.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after" / "config.json").read_text())["eos_token_id"] == [5, 0]
    written = json.loads((tmp_path / "after" / "generation_config.json").read_text())
    del written["transformers_version"]
    assert written == {"eos_token_id": [5, 0], "pad_token_id": 7, "bos_token_id": 6}
    assert end_tokens(tmp_path / "after", None) == (0, 5)
    name_end_tokens(network, (5,))
    assert network.config.eos_token_id == network.generation_config.eos_token_id == 5


def test_both_files_name_the_end_tokens_in_order_and_no_sampling(folder: Path) -> None:
    edit(folder / "generation_config.json", temperature=0.5, eos_token_id=[9, 0], pad_token_id=7)
    before = json.loads((folder / "config.json").read_text())
    write_end_tokens(folder, (0, 9))
    assert json.loads((folder / "config.json").read_text()) == {**before, "eos_token_id": [0, 9]}
    assert json.loads((folder / "generation_config.json").read_text()) == {"pad_token_id": 7, "eos_token_id": [0, 9]}


def test_a_text_without_its_end() -> None:
    assert without_end([5, 6, 0], True) == [5, 6]
    assert without_end([5, 6, 0], False) == [5, 6, 0]
    assert without_end([0], True) == []


def test_what_the_files_do_not_say_the_tokenizers_class_does(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None, tokenizer_class="GPT2TokenizerFast")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert ids(folder) == (AutoTokenizer.from_pretrained(folder).eos_token_id,) == (0,)


def test_files_that_say_it_load_no_library(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.tokenizer import TokenizerFiles
folder = Path({str(folder)!r})
print(end_tokens(folder, TokenizerFiles(folder, "f")), "transformers" in sys.modules)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "(0,) False\n"
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": None}),
        ("tokenizer.json", {"added_tokens": [1]}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
        ("tokenizer_config.json", {"eos_token": {"text": "</s>"}}),
    ],
)
def test_damaged_tokenizer_files_are_left_to_the_tokenizer(tmp_path: Path, file: str, content: dict) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"vocab": {}}}')
    (tmp_path / file).write_text(json.dumps({**json.loads((tmp_path / file).read_text()), **content}))
    with pytest.raises(InputError, match="cannot be loaded"):
        end_tokens(None, TokenizerFiles(tmp_path, "f"))
