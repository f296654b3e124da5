"""Low-rank adapters: what is trained, what is exported, and what is refused."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store import Artifact
from cpo_pipe.trainer.objectives import OBJECTIVES
from tests.support.marks import slow_except
from tests.support.training import CANDIDATES, Bench, measured, metrics, naive_logprob, weights

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _states_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the last step is kept: it holds the adapters before they are merged."""
    monkeypatch.setattr("cpo_pipe.trainer.resume.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("cpo_pipe.trainer.resume.SAVE_SHARE", math.inf)
    keeps = SimpleNamespace(copyfile=shutil.copyfile, rmtree=lambda *_, **__: None)
    monkeypatch.setattr("cpo_pipe.trainer.train.shutil", keeps)


def adapters(bench: Bench, artifact: Artifact) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by the name of the layer's weight, as trained."""
    (file,) = (bench.store.root / "checkpoints" / ".in-progress" / artifact.path.name).glob("*/state.safetensors")
    state = load_file(file)
    prefix, first, second = "weights.model.", ".lora_A.default.weight", ".lora_B.default.weight"
    trained = {name for name in state if name.startswith("weights.")}
    layers = {name.removeprefix(prefix).removesuffix(first) for name in trained if name.endswith(first)}
    assert trained == {f"{prefix}{layer}{half}" for layer in layers for half in (first, second)}, "nothing else"
    return {layer: (state[f"{prefix}{layer}{first}"], state[f"{prefix}{layer}{second}"]) for layer in layers}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_export_is_the_base_model_with_the_scaled_products_added(
    tmp_path: Path, new_model: Callable[..., Path], architecture: str
) -> None:
    bench = Bench(tmp_path, new_model(architecture=architecture))
    artifact = bench.train(
        "cpo-ranked", max_steps=4, learning_rate=1e-2, weight_decay=0.1, lora={"r": 3, "lora_alpha": 12}
    )
    base, trained = load_file(bench.model.path / "model.safetensors"), adapters(bench, artifact)
    assert base.keys() == weights(artifact).keys()
    assert trained.keys() <= {name.removesuffix(".weight") for name in base}
    for name, tensor in weights(artifact).items():
        layer = name.removesuffix(".weight")
        if layer not in trained:
            assert torch.equal(tensor, base[name]), name
            continue
        down, up = trained[layer]
        assert down.shape[0] == up.shape[1] == 3
        assert up.abs().max() > 1e-3, "it was trained"
        change = 12 / 3 * up @ down
        # GPT-2 keeps its weights the other way round.
        expected = base[name] + (change.T if architecture == "gpt2" else change)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    linear = {name for name in trained if not name.endswith("lm_head")}
    assert len(linear) == len(trained) == (14 if architecture == "llama" else 8), "all linear layers but the last"


def test_the_exported_model_is_as_good_as_the_adapted_one_was(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    settings: dict[str, Any] = {
        "batch_size": 3,
        "validation": 1,
        "eval_steps": 1,
        "learning_rate": 1e-2,
        "beta": 0.2,
        "lora": {},
    }
    artifact = bench.train("mle", **{key: value for key, value in settings.items() if key != "beta"}, max_steps=3)
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert not hasattr(model, "peft_config")
    assert type(model).__name__ == "LlamaForCausalLM"
    # The validation loss of the last step was measured with the adapters beside the weights.
    with torch.no_grad():
        losses = [-float(naive_logprob(model, prompt, ids[0])) / len(ids[0]) for prompt, ids, _ in CANDIDATES.values()]
    found = measured(artifact, "validation_loss")
    assert any(loss == pytest.approx(found[3], rel=1e-4) for loss in losses)
    assert found[0] != pytest.approx(found[3], rel=1e-2), "it moved"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("objective", "loss"),
    [("cpo", lambda k: math.log(k)), ("cpo-ranked", lambda k: math.lgamma(k + 1))],
)
def test_adapters_start_as_no_change(
    tmp_path: Path, new_model: Callable[..., Path], architecture: str, objective: str, loss: Callable[[int], float]
) -> None:
    bench = Bench(tmp_path, new_model(architecture=architecture))
    first = metrics(bench.train(objective, beta=5.0, max_steps=1, lora={"r": 2}))[0]
    assert first["loss"] == pytest.approx(np.mean([loss(k) for k in (4, 2, 3, 3)]), abs=1e-3)
    assert first["target_drop_per_token"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_adapters_depend_on_the_seed_and_on_no_other_randomness(tmp_path: Path, tiny_model: Path) -> None:
    def trained(number: int, **settings: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        found = weights(Bench(tmp_path / str(number), tiny_model).train("mle", lora={"r": 2}, **settings))
        assert torch.equal(torch.random.get_rng_state(), before), "nor do they leave a trace in it"
        return found

    one, same, other = trained(1), trained(2), trained(3, seed=1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    # The batch is all there is, in whatever order: what differs are the adapters.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(one[name], other[name])


def test_only_the_named_layers_change(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    artifact = bench.train("cpo", learning_rate=1e-2, lora={"target_modules": ["q_proj", "layers.1.mlp.down_proj"]})
    base = load_file(bench.model.path / "model.safetensors")
    changed = {name for name, tensor in weights(artifact).items() if not torch.equal(tensor, base[name])}
    assert changed == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["nope"], "nope"),
        (["q_proj", "v_prj"], "v_prj"),  # a typing error must not leave half of the adapters out
        (["input_layernorm"], "input_layernorm|LlamaRMSNorm"),
        (["*"], r"\*"),
    ],
)
def test_targets_that_the_model_does_not_have_are_refused(
    tmp_path: Path, tiny_model: Path, targets: list[str], named: str
) -> None:
    bench = Bench(tmp_path, tiny_model)
    with pytest.raises(InputError, match=rf"^train\.t\.lora\.target_modules: .*({named})[^\n]*$"):
        bench.train("cpo", lora={"target_modules": targets})


def test_weights_that_two_layers_share_get_no_adapter(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    # Merged into one, the change would be in the other as well, which was not trained so.
    bench = Bench(tmp_path, new_model(tie_word_embeddings=True))
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(InputError, match=rf"^train\.t\.lora\.target_modules: .*{target}"):
            bench.train("cpo", lora={"target_modules": [target]})


@pytest.mark.slow
def test_an_adapter_on_the_output_embedding_is_exported_too(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    settings: dict[str, Any] = {
        "learning_rate": 1e-2,
        "beta": 0.5,
        "batch_size": 4,
        "lora": {"target_modules": ["lm_head"]},
    }
    artifact = bench.train("cpo", max_steps=2, **settings)
    after = metrics(bench.train("cpo", max_steps=3, **settings))[2]["loss"]
    model, frozen = (AutoModelForCausalLM.from_pretrained(path) for path in (artifact.path, bench.model.path))
    losses = []
    with torch.no_grad():
        for prompt, candidates, _ in CANDIDATES.values():
            rewards = [
                0.5 * (naive_logprob(model, prompt, ids) - naive_logprob(frozen, prompt, ids)) for ids in candidates
            ]
            losses.append(float(torch.stack(rewards).logsumexp(0) - rewards[0]))
    assert after == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize("attention", slow_except(["cascade", "padded"], "cascade"))
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_model: Path, attention: str) -> None:
    def trained(on: bool) -> Artifact:
        bench = Bench(tmp_path / str(on), tiny_model)
        how: dict[str, Any] = {"attention": attention, "gradient_checkpointing": on, "eval_steps": 1}
        return bench.train("cpo", max_steps=3, lora={"r": 4}, **how)

    on, off = trained(True), trained(False)
    assert [row["loss"] for row in metrics(on)] == pytest.approx([row["loss"] for row in metrics(off)], rel=1e-5)
    assert [row["grad_norm"] for row in metrics(on)] == pytest.approx(
        [row["grad_norm"] for row in metrics(off)], rel=1e-4
    )
    for name, tensor in weights(off).items():
        torch.testing.assert_close(weights(on)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_adapters_of_another_rank_or_scale_are_another_training(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    kinds: list[dict[str, Any]] = [{}, {"r": 2}, {"lora_alpha": 4}, {"target_modules": ["q_proj"]}]
    paths = {bench.train("mle", max_steps=1, lora=kind).path for kind in kinds} | {bench.train("mle", max_steps=1).path}
    assert len(paths) == 5
    assert bench.train("mle", max_steps=1, lora={"r": 16}).path in paths, "a default, spelled out"
    assert len(list(bench.store.root.glob("checkpoints/*/manifest.json"))) == 5


@pytest.mark.parametrize("targets", [[], ["q_proj", ""], "q_proj"])
def test_targets_that_name_nothing_are_refused_by_the_recipe(targets: object) -> None:
    with pytest.raises(ValueError, match=r"lora.target_modules"):
        OBJECTIVES.parse({"init": "m", "objective": "mle", "lora": {"target_modules": targets}})
