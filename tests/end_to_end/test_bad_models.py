"""Bad models and tokenizers get one line that names the fault, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("offline")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def in_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "model.gguf")


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def unknown_dtype(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F99"'))


def no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")


def a_shard_is_absent(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_tensor_is_absent(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "of-tomorrow"}))


def own_code(folder: Path) -> None:
    """Add code as a hub repository with its own architecture does; the code leaves a file behind when it runs."""
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def short_context(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 6}))


def small_vocabulary(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


MODELS: dict[Callable[[Path], None], str] = {
    without_weights: "model mine: no *.safetensors there; weights are read from safetensors only",
    pickled_weights: "model mine: no *.safetensors there; weights are read from safetensors only",
    in_gguf: "model mine: is in GGUF; run `cpo-pipe convert mine --out FOLDER` and give that folder",
    cut_weights: "model mine: model.safetensors is damaged",
    unknown_dtype: "model mine: model.safetensors is damaged",
    no_weights_at_all: "model mine: model.safetensors is damaged",
    a_shard_is_absent: "model mine: model-00002-of-00002.safetensors is missing, but model.safetensors.index.json",
    a_tensor_is_absent: "model mine: its weights lack 1 tensors of its architecture, such as model.norm.weight",
    no_config: "model mine: no config.json there",
    bad_config: "mine/config.json: not valid JSON",
    unknown_architecture: "model mine: cannot be loaded",
    own_code: "model mine: config.json asks to run Python code that comes with the model, and cpo-pipe runs no such",
    short_context: "tokens and the context of mine is 6: lower data.max_prompt_tokens and data.max_target_tokens",
    small_vocabulary: "model mine: its vocabulary has 100 entries",
    other_tokenizer: "data.tokenizer is not that of the model mine: the token id",
}


@pytest.mark.parametrize("spoil", MODELS, ids=lambda spoil: spoil.__name__)
def test_a_bad_model_folder(made, spoil: Callable[[Path], None]) -> None:
    spoil(Path(shutil.copytree(made.model, made.root / "mine")))
    before = made.made()
    result = made.cli("train", "tiny.yaml", "start", "--set", "train.start.init=mine")
    assert result.status == 2, result.err
    assert MODELS[spoil] in result.error()
    assert made.made() == before


PLACES = {
    "train.start.init=mine": ["train", "start"],
    "train.cpo.reference=mine": ["train", "cpo"],
    "negatives.sources.autoregressive.model=mine": ["generate-negatives"],
    "negatives.sources.p={strategy: pool, model: mine}": ["generate-negatives"],
    "rank={model: mine}": ["rank"],
    "evaluate.systems.cpo.model=mine": ["evaluate"],
    "evaluate.systems.cpo={merge: {mine: 0.5, start: 0.5}}": ["evaluate"],
    "evaluate.judges={j: {kind: local, model: mine}}": ["evaluate"],
    "evaluate.judges={j: {kind: likelihood, model: mine}}": ["evaluate"],
    "evaluate.judges=[similarity]": ["evaluate", "--set", "evaluate.embedder=mine"],
    "evaluate.mauve_seeds=1": ["evaluate", "--set", "evaluate.mauve_model=mine"],
}
"""Each setting that names a model, and the command that reads it."""


@pytest.mark.parametrize("place", PLACES)
def test_a_models_own_code_is_refused_before_any_work(made, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(question: str = "") -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)
    mine = Path(shutil.copytree(made.model, made.root / "mine"))
    own_code(mine)
    before = made.made()
    command, *options = PLACES[place]
    result = made.cli(command, "tiny.yaml", *options, "--set", place)
    assert result.status == 2, result.err
    assert "model mine: config.json asks to run Python code that comes with the model" in result.error()
    assert made.made() == before
    assert not (mine / "ran").exists()


def no_eos(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def bad_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*tokenizer*"):
        file.unlink()


TOKENIZERS: dict[Callable[[Path], None], str] = {
    no_eos: "data.tokenizer mine: it has no EOS token, so no text can end; set eos_token in its tokenizer_config.json",
    bad_json: "tokenizer mine: cannot be loaded",
    no_tokenizer: "tokenizer mine: no tokenizer files there",
}


@pytest.mark.parametrize("spoil", TOKENIZERS, ids=lambda spoil: spoil.__name__)
def test_a_bad_tokenizer(made, spoil: Callable[[Path], None]) -> None:
    spoil(Path(shutil.copytree(made.model, made.root / "mine")))
    before = made.made()
    result = made.cli("prepare", "tiny.yaml", "--set", "data.tokenizer=mine")
    assert result.status == 2, result.err
    assert TOKENIZERS[spoil] in result.error()
    assert made.made() == before


def test_an_ensemble_of_two_architectures(made, new_model: Callable[..., Path]) -> None:
    other = new_model(architecture="gpt2")
    before = made.made()
    merge = f"evaluate.systems.both={{merge: {{start: 0.5, '{other}': 0.5}}}}"
    result = made.cli("evaluate", "tiny.yaml", "--set", merge)
    assert result.status == 2
    said = f"system both: start and {other} are not of one architecture: the tensor model.embed_tokens.weight is float"
    assert said in result.error()
    assert made.made() == before


def test_a_typo_in_a_models_name_is_answered_with_the_nearest_training(made) -> None:
    result = made.cli("train", "tiny.yaml", "cpo", "--set", "train.cpo.init=stat")
    assert "did you mean the training start?" in result.error()
