"""Models that ask to run code of their own: refused when they are located, and nothing of theirs runs."""

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.embedder import locate_embedder
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model, ScratchModel
from cpo_pipe.data.models.tokenizer import locate_tokenizer, tokenizer_in
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.initial_model import scratch_model

Files = dict[str, dict[str, Any]]
"""What to change in JSON files, by name."""

CODE = "asks to run Python code that comes with the model, and cpo-pipe runs no such code; use a model that"
CLASSES = {"AutoConfig": "code.TinyConfig", "AutoModel": "code.Tiny", "AutoModelForCausalLM": "code.Tiny"}


@pytest.fixture(autouse=True)
def _asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question on the terminal is a failure, not a wait."""

    def asked(question: str = "") -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr(builtins, "input", asked)


def changed(source: Path, folder: Path, files: Files) -> Path:
    """A copy of a model whose JSON files are changed, with code that leaves a file `ran` behind."""
    shutil.copytree(source, folder)
    for name, settings in files.items():
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content | settings))
    ran = f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
    (folder / "code.py").write_text(
        f"{ran}from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class TinyConfig(LlamaConfig):\n    model_type = 'tiny_own'\n"
        "class Tiny(LlamaForCausalLM):\n    config_class = TinyConfig\n"
        "class TinyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{ran}def generate(model, **_):\n    pass\n")
    return folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"model_type": "tiny_own", "auto_map": CLASSES}}, f"config.json {CODE}"),
        # A configuration that transformers has, and a network that it has not.
        ({"config.json": {"model_type": "vit", "auto_map": CLASSES}}, f"config.json {CODE}"),
        ({"config.json": {"_attn_implementation": "me/kernel"}},
         "config.json sets _attn_implementation to 'me/kernel', a kernel that would be downloaded and run; remove"),
        ({"config.json": {"attn_implementation": "me/kernel@v1:fn"}}, "sets attn_implementation to 'me/kernel@v1:fn'"),
        ({"config.json": {"_attn_implementation_internal": "flash|me/kernel"}}, "to 'flash|me/kernel'"),
        ({"config.json": {"attn_implementation": {"text_config": "me/kernel"}}}, "to 'me/kernel'"),
        ({"config.json": {"text_config": {"_attn_implementation": "me/kernel"}}}, "to 'me/kernel'"),
        ({"config.json": {"experts_implementation": "me/kernel"}}, "sets experts_implementation to 'me/kernel'"),
    ],
)  # fmt: skip
def test_a_model_with_code_of_its_own_is_refused_when_it_is_located(
    tmp_path: Path, tiny_model: Path, files: Files, said: str
) -> None:
    folder = changed(tiny_model, tmp_path / "m", files)
    with pytest.raises(InputError) as caught:
        locate_model(str(folder), Store(tmp_path / "store"))
    assert str(caught.value).startswith(f"model {folder}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("settings", [{"auto_map": CLASSES}, {"_attn_implementation": "sdpa"}])
def test_code_that_transformers_does_not_need_is_no_reason_and_does_not_run(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any]
) -> None:
    import torch

    folder = changed(tiny_model, tmp_path / "m", {"config.json": settings})
    model = locate_model(str(folder), Store(tmp_path / "store"))
    assert type(model.load(torch.float32)).__module__.startswith("transformers.")
    assert type(model.skeleton()).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()


def test_a_model_that_was_not_located_is_not_asked_about_either(tmp_path: Path, tiny_model: Path) -> None:
    import torch

    folder = changed(tiny_model, tmp_path / "m", {"config.json": {"model_type": "tiny_own", "auto_map": CLASSES}})
    for load in (lambda model: model.load(torch.float32), Model.skeleton):
        with pytest.raises(InputError, match=r"^model mine: "):
            load(Model("mine", folder, "f"))
    assert not (folder / "ran").exists()


def test_an_adapters_base_is_refused_too(tmp_path: Path, tiny_model: Path) -> None:
    base = changed(tiny_model, tmp_path / "base", {"config.json": {"model_type": "tiny_own", "auto_map": CLASSES}})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copyfile(tiny_model / "model.safetensors", adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"the base of this adapter: model {base}: config.json asks to run"):
        locate_model(str(adapter), Store(tmp_path / "store"))


OWN_TOKENIZER = {
    "config.json": {"model_type": "tiny_own"},
    "tokenizer_config.json": {
        "tokenizer_class": "TinyTokenizer",
        "auto_map": {"AutoTokenizer": ["code.TinyTokenizer", "code.TinyTokenizer"]},
    },
}


def test_a_tokenizer_with_code_of_its_own_is_refused_when_it_is_located(tmp_path: Path, tiny_model: Path) -> None:
    folder, store = changed(tiny_model, tmp_path / "t", OWN_TOKENIZER), Store(tmp_path / "store")
    for locate in (lambda: locate_tokenizer(str(folder), store), lambda: tokenizer_in(folder, store)):
        with pytest.raises(InputError, match=f"^tokenizer {folder}: tokenizer_config.json {CODE}"):
            locate()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "code.Tiny"}], "modules.json ('code.Tiny')"),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformersX.Y"}], "modules.json ("),
        ("modules.json", {"not": "a list"}, "modules.json lists no modules"),
        ("router_config.json", {"types": {"query": "code.Tiny"}}, "router_config.json ('code.Tiny')"),
        ("2_Dense/config.json", {"activation_function": "builtins.exec"}, "config.json ('builtins.exec')"),
        ("0_Transformer/config.json", {"model_type": "tiny_own", "auto_map": CLASSES}, f"config.json {CODE}"),
        ("config.json", {"model_type": "bert", "_attn_implementation": "me/kernel"}, "to 'me/kernel'"),
        ("sentence_bert_config.json", {"model_args": {"attn_implementation": "me/kernel"}}, "to 'me/kernel'"),
    ],
)  # fmt: skip
def test_an_embedding_model_with_code_of_its_own_is_refused_when_it_is_located(
    tmp_path: Path, file: str, content: Any, said: str
) -> None:
    store = Store(tmp_path / "store")
    folder = tmp_path / "e"
    shutil.copytree(locate_embedder("minilm", store).path, folder)
    locate_embedder(str(folder), store)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        locate_embedder(str(folder), store)
    assert str(caught.value).startswith(f"embedding model {folder}: ")
    assert said in str(caught.value)


def test_of_a_hub_model_no_weights_are_downloaded_before_it_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(tiny_model, tmp_path / "m", {"config.json": {"model_type": "tiny_own", "auto_map": CLASSES}})
    patterns: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        patterns.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"^model me/own: config\.json asks to run"):
        locate_model("me/own", Store(tmp_path / "store"))
    assert len(patterns) == 1
    assert not any("safetensors" in pattern for pattern in patterns[0])


def test_a_scratch_model_takes_no_kernel_and_no_code(tmp_path: Path, tiny_model: Path) -> None:
    for settings in ({"attn_implementation": "me/kernel"}, {"text_config": {"_attn_implementation": "me/kernel"}}):
        with pytest.raises(ValueError, match=r"sets _?attn_implementation to 'me/kernel', a kernel that would be"):
            ScratchModel(architecture="llama", config=settings)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = locate_tokenizer(str(tiny_model), Store(tmp_path / "store"))
    with pytest.raises(InputError, match=r"init\.config\.auto_map: not a key of the architecture llama"):
        scratch_model(ScratchModel(architecture="llama", config={**sizes, "auto_map": CLASSES}), tokenizer)


def test_every_library_is_told_to_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    told: dict[str, Any] = {}
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda _, **settings: told.update(settings))
    locate_embedder("minilm", Store(tmp_path / "store"))._model()
    assert told["trust_remote_code"] is False


def test_a_data_sets_loading_script_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_pipe.data.sources.locate import locate_source

    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(InputError, match=r"^data\.source "):
        list(locate_source(str(folder)).read({}))
    assert not (tmp_path / "ran").exists()
