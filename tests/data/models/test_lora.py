"""LoRA adapters as peft saves them: a model like others, and what does not fit is said."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Store

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 6, 7, 8, 9, 200]])


def make_adapter(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter with random weights, far from no change."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(IDS).logits
    return out


def active(adapter: Path, base: Path) -> torch.Tensor:
    """Of the base with peft's adapter beside it."""
    return logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def loaded(model: Model) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(model.path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"lora_alpha": 2, "target_modules": "all-linear"}, {"use_dora": True}]
)
def test_it_computes_what_the_base_does_with_the_adapter_active(
    tmp_path: Path, store: Store, tiny_model: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model, **settings)
    model = locate_model(str(adapter), store)
    wanted = active(adapter, tiny_model)
    assert not torch.allclose(wanted, logits(AutoModelForCausalLM.from_pretrained(tiny_model)), atol=0.1)
    torch.testing.assert_close(loaded(model), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    assert (model.path / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert model.fingerprint == locate_model(str(model.path), store).fingerprint


def test_it_names_its_end_tokens_and_nothing_that_the_bases_authors_sample_with(
    tmp_path: Path, store: Store, tiny_model: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": [9, 4]}')
    adapter = make_adapter(tmp_path / "adapter", base)
    model = locate_model(str(adapter), store)
    written = json.loads((model.path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 4, 9]
    assert "temperature" not in written
    assert json.loads((model.path / "config.json").read_text())["eos_token_id"] == [0, 4, 9]
    (base / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert locate_model(str(adapter), store).path != model.path


def test_it_is_made_once_and_goes_by_content(
    tmp_path: Path, store: Store, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (make_adapter(tmp_path / str(seed), tiny_model, seed=seed) for seed in (1, 2))
    first = locate_model(str(one), store)
    assert locate_model(str(other), store).fingerprint != first.fingerprint
    moved = shutil.copytree(one, tmp_path / "moved")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    rewrite(moved, base_model_name_or_path=str(base), inference_mode=False)
    monkeypatch.setitem(sys.modules, "peft", None)  # what is there needs no peft
    assert locate_model(str(moved), store) == Model(str(moved), first.path, first.fingerprint)


def test_it_is_only_looked_for(tmp_path: Path, store: Store, tiny_model: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    with pytest.raises(MissingInput, match="the adapter is not merged with "):
        locate_model(str(adapter), store, make=False)
    assert not [path for path in Path(store.root).rglob("*") if path.name != "file-hashes.json"]
    made = locate_model(str(adapter), store)
    assert locate_model(str(adapter), store, make=False) == made
    rewrite(adapter, base_model_name_or_path="no-such-owner/no-such-model")
    with pytest.raises(MissingInput, match="not downloaded from the hub"):
        locate_model(str(adapter), store, make=False)
    rewrite(adapter, base_model_name_or_path="../no/where")
    with pytest.raises(InputError, match="no such folder, and not a hub name") as refused:
        locate_model(str(adapter), store, make=False)
    assert not isinstance(refused.value, MissingInput)


def rewrite(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path, store: Store) -> str:
    with pytest.raises(InputError) as caught:
        locate_model(str(folder), store)
    assert "\n" not in str(caught.value)
    assert not [*Path(store.root).glob("checkpoints/*/manifest.json")]
    return str(caught.value)


def test_without_peft_it_says_what_to_install(
    tmp_path: Path, store: Store, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refusal(adapter, store) == (f'model {adapter}: a LoRA adapter needs peft; run pip install "cpo-pipe[lora]"')


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_model_name_or_path": None}, "adapter_config.json names no base_model_name_or_path; put the base"),
        ({"base_model_name_or_path": "../no/where"}, "the base of this adapter: model ../no/where: no such folder"),
        ({"peft_type": "IA3"}, "an adapter of the type IA3; only LORA can be merged"),
    ],
)
def test_configs_that_lead_nowhere(
    tmp_path: Path, store: Store, tiny_model: Path, fields: dict[str, object], said: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    rewrite(adapter, **fields)
    assert said in refusal(adapter, store)


def test_a_base_of_another_shape_or_with_other_layers(
    tmp_path: Path, store: Store, tiny_model: Path, new_model: Callable[..., Path]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    for base in (new_model(intermediate_size=80), new_model(num_hidden_layers=3), new_model(num_hidden_layers=1)):
        rewrite(adapter, base_model_name_or_path=str(base))
        assert f"model {adapter}: the adapter does not fit its base {base} (" in refusal(adapter, store).replace(
            ": only", " ("
        )


def test_files_that_are_not_there_or_too_many(tmp_path: Path, store: Store, tiny_model: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    beside = shutil.copytree(adapter, tmp_path / "beside")
    shutil.copyfile(tiny_model / "model.safetensors", beside / "model.safetensors")
    assert "adapter_model.safetensors and model.safetensors are in one folder" in refusal(beside, store)
    cut = shutil.copytree(adapter, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-4])
    assert "adapter_model.safetensors is damaged" in refusal(cut, store)
    (adapter / "adapter_model.safetensors").unlink()
    assert "an adapter without adapter_model.safetensors" in refusal(adapter, store)


def test_an_adapter_on_one_of_two_embeddings_that_are_one_is_refused(
    tmp_path: Path, store: Store, new_model: Callable[..., Path]
) -> None:
    tied = new_model(tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", tied, target_modules=["lm_head"])
    if "lora_A" not in " ".join(load_file(adapter / "adapter_model.safetensors")):
        pytest.skip("this peft makes no such adapter")
    message = refusal(adapter, store)
    assert f"its adapter cannot be merged into {tied}, whose logits are then off by" in message


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, store: Store, tiny_model: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    state = load_file(adapter / "adapter_model.safetensors")
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, adapter / "adapter_model.safetensors")
    assert "cannot be merged" in refusal(adapter, store)


def test_another_tokenizer_makes_another_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(tmp_path / "store")
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, adapter / file)
    before = locate_model(str(adapter), store)
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    after = locate_model(str(adapter), store)
    assert (before.path != after.path, before.fingerprint) == (True, after.fingerprint)
    assert "chat_template" in (after.path / "tokenizer_config.json").read_text() or list(after.path.glob("*.jinja"))


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is an adapter itself; merge that one first"):
        locate_model(str(adapter), Store(tmp_path / "store"))
