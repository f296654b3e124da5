import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.pipeline.engines.base import stop_ids


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def ids(folder: Path) -> tuple[int, ...]:
    return stop_ids(Model("model", folder, "fingerprint"), TokenizerFiles(folder, "fingerprint"))


@pytest.fixture
def folder(new_model: Callable[..., Path]) -> Path:
    model = new_model()
    (model / "generation_config.json").unlink(missing_ok=True)
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


def test_what_the_files_do_not_say_the_tokenizers_class_does(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None, tokenizer_class="GPT2TokenizerFast")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert ids(folder) == (AutoTokenizer.from_pretrained(folder).eos_token_id,) == (0,)


def test_files_that_say_it_load_no_library(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.pipeline.engines.base import stop_ids
folder = Path({str(folder)!r})
print(stop_ids(Model("model", folder, "f"), TokenizerFiles(folder, "f")), "transformers" in sys.modules)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "(0,) False\n"
    )
