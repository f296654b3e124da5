"""Weight-space ensembles: equal to the sum of whole state dicts, made a tensor at a time, and what is refused."""

import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import model_fingerprint, sha256_file
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.data.store import Store
from cpo_pipe.trainer import merge as module
from cpo_pipe.trainer.merge import _computed, merge, write_merged
from tests.support.damage import rot
from tests.support.training import Bench, weights

NewModel = Callable[..., Path]
ALPHA = 0.3


def model(folder: Path) -> Model:
    return Model(folder.name, folder, "")


def merged(folder: Path, *parts: Path, weights: Sequence[float] = (ALPHA, 1 - ALPHA), **settings: Any) -> Path:
    folder.mkdir()
    write_merged("mix", list(zip(map(model, parts), weights, strict=True)), folder, (0,), **settings)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def naive(folder: Path, *parts: Path, weights: Sequence[float] = (ALPHA, 1 - ALPHA)) -> Path:
    """All parts whole in memory, and written by transformers."""
    networks = [AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32) for part in parts]
    states = [network.state_dict() for network in networks]
    total = {name: tensor * weights[0] for name, tensor in states[0].items()}
    for state, weight in zip(states[1:], weights[1:], strict=True):
        for name, tensor in state.items():
            total[name] = total[name] + tensor * weight
    networks[0].load_state_dict(total)
    networks[0].save_pretrained(folder)
    return folder


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model whose file's tensors are changed in place."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def reconfigured(source: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def saved(source: Path, target: Path, **settings: Any) -> Path:
    dtype = settings.pop("dtype", torch.float32)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(target, **settings)
    return target


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_the_naive_sum_bit_for_bit_and_the_same_model(
    tmp_path: Path, new_model: NewModel, architecture: str
) -> None:
    parts = [new_model(architecture=architecture, seed=seed) for seed in (1, 2, 3)]
    weights = (0.5, 0.3, 0.2)
    ours, theirs = merged(tmp_path / "a", *parts, weights=weights), naive(tmp_path / "b", *parts, weights=weights)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert model_fingerprint(ours, sha256_file) == model_fingerprint(theirs, sha256_file)


def test_parts_in_other_shards_and_dtypes_give_float32(tmp_path: Path, new_model: NewModel) -> None:
    one, two = new_model(seed=1), new_model(seed=2)
    half = saved(two, tmp_path / "half", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(half.glob("*.safetensors"))) > 2
    ours, theirs = merged(tmp_path / "a", one, half), naive(tmp_path / "b", one, half)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert json.loads((ours / "config.json").read_text())["dtype"] == "float32"
    lossless = merged(tmp_path / "c", half, half, weights=(0.5, 0.5))
    assert {tensor.dtype for tensor in tensors(lossless).values()} == {torch.float32}
    assert all(torch.equal(tensor, tensors(half)[name].float()) for name, tensor in tensors(lossless).items())


def test_shards_have_an_index_that_transformers_reads(tmp_path: Path, new_model: NewModel) -> None:
    one, two = new_model(seed=1), new_model(seed=2)
    ours, theirs = merged(tmp_path / "a", one, two, shard_size="100KB"), naive(tmp_path / "b", one, two)
    files = list(ours.glob("*.safetensors"))
    assert len(files) > 2
    # A tensor larger than a shard has one for itself.
    assert all(file.stat().st_size < 110_000 or len(load_file(file)) == 1 for file in files)
    network, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(ours).values())
    again = merged(tmp_path / "c", ours, two, weights=(1.0, 0.0))
    assert all(torch.equal(tensors(again)[name], tensor) for name, tensor in tensors(ours).items())


def test_in_memory_are_a_shard_and_a_tensor(
    tmp_path: Path, new_model: NewModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [new_model(seed=seed, num_hidden_layers=8) for seed in (1, 2)]
    sizes = [tensor.nbytes for tensor in tensors(parts[0]).values()]
    opened, made = safetensors.safe_open, module._merged
    alive = peak = 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, peak
        alive += tensor.nbytes
        peak = max(peak, alive)
        weakref.finalize(tensor, gone, tensor.nbytes)
        return tensor

    class Reader:
        """A file as `safe_open` gives it, of which what is read is counted while it lives."""

        def __init__(self, *arguments: Any, **settings: Any):
            self.file = opened(*arguments, **settings)

        def __enter__(self) -> "Reader":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            return counted(self.file.get_tensor(name))

    monkeypatch.setattr(safetensors, "safe_open", Reader)
    monkeypatch.setattr(module, "_merged", lambda *arguments: counted(made(*arguments)))
    merged(tmp_path / "a", *parts, shard_size=100_000)
    assert alive == 0
    assert max(sizes) < peak <= max(100_000, max(sizes)) + 2 * max(sizes) < sum(sizes) / 2


def test_damaged_weights_are_not_merged(tmp_path: Path, new_model: NewModel) -> None:
    root = tmp_path / "store"
    one, two = (new_model(seed=seed) for seed in (1, 2))
    rot(two / "model.safetensors", root)
    store = Store(root)
    parts = [(locate_model(str(folder), store), 0.5) for folder in (one, two)]
    with pytest.raises(RunError, match=re.escape(f"{two}/model.safetensors: damaged")):
        merge("mix", store, parts, locate_tokenizer(str(one), store))
    assert not list(root.glob("checkpoints/*/model*"))


def test_the_tokenizer_comes_along_and_all_end_tokens_are_named(tmp_path: Path, new_model: NewModel) -> None:
    store = Store(tmp_path / "store")
    one, two = (shutil.copytree(new_model(seed=seed), tmp_path / str(seed)) for seed in (1, 2))
    (one / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.9, "min_length": 3}')
    (two / "generation_config.json").write_text('{"eos_token_id": [4]}')
    parts = [(locate_model(str(one), store), 0.5), (locate_model(str(two), store), 0.5)]
    artifact = merge("mix", store, parts, locate_tokenizer(str(one), store))
    written = json.loads((artifact.path / "generation_config.json").read_text())
    assert {**written, "transformers_version": ""} == {
        "eos_token_id": [0, 4, 5], "pad_token_id": 0, "transformers_version": "",
    }  # fmt: skip
    assert json.loads((artifact.path / "config.json").read_text())["eos_token_id"] == [0, 4, 5]
    (two / "generation_config.json").write_text('{"eos_token_id": [3]}')
    assert merge("mix", store, parts, locate_tokenizer(str(one), store)).path != artifact.path
    assert (artifact.path / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    assert artifact.manifest["fingerprint"] == locate_model(str(artifact.path), store).fingerprint


# ── one embedding or two ─────────────────────────────────────────────────────────────────────────────────────────


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[5, 6, 7, 8]])).logits
    return out


@pytest.mark.parametrize("tied_first", [True, False])
def test_of_a_tied_and_an_untied_model_comes_an_untied_one(
    tmp_path: Path, new_model: NewModel, tied_first: bool
) -> None:
    tied, untied = new_model(seed=1, tie_word_embeddings=True), new_model(seed=2, tie_word_embeddings=False)
    assert "lm_head.weight" not in tensors(tied)
    assert "lm_head.weight" in tensors(untied)
    parts = (tied, untied) if tied_first else (untied, tied)
    ours = merged(tmp_path / "a", *parts)
    weights = dict(zip(parts, (ALPHA, 1 - ALPHA), strict=True))
    embedding, head = tensors(tied)["model.embed_tokens.weight"], tensors(untied)["lm_head.weight"]
    expected = embedding * weights[tied] + head * weights[untied]
    assert torch.allclose(tensors(ours)["lm_head.weight"], expected)
    assert json.loads((ours / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert torch.equal(loaded.lm_head.weight, tensors(ours)["lm_head.weight"])
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_tied_head_that_stands_in_one_file_changes_nothing(tmp_path: Path, new_model: NewModel) -> None:
    tied, other = new_model(seed=1, tie_word_embeddings=True), new_model(seed=2, tie_word_embeddings=True)
    twice = changed(
        tied, tmp_path / "twice", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    )
    assert torch.equal(logits(merged(tmp_path / "a", twice, other)), logits(naive(tmp_path / "b", tied, other)))
    assert torch.equal(logits(merged(tmp_path / "c", other, twice)), logits(naive(tmp_path / "d", other, tied)))


def test_names_of_a_body_without_its_head_and_old_buffers_are_known(tmp_path: Path, new_model: NewModel) -> None:
    """As gpt2 on the hub has them."""

    def bare(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)
        state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)

    one, two = new_model(architecture="gpt2", seed=1), new_model(architecture="gpt2", seed=2)
    old = changed(one, tmp_path / "old", bare)
    assert "transformer.wte.weight" not in tensors(old)
    ours, theirs = merged(tmp_path / "a", old, two), naive(tmp_path / "b", one, two)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_tensors_that_transformers_renames_when_it_loads_them_are_merged(tmp_path: Path, new_model: NewModel) -> None:
    """Files have each expert of a mixture on its own, the architecture has them stacked."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_local_experts": 2}  # fmt: skip
    one, two = (new_model(architecture="mixtral", seed=seed, **sizes) for seed in (1, 2))
    names = AutoModelForCausalLM.from_pretrained(one).state_dict().keys()
    assert tensors(one).keys() - names, "else this tests nothing"
    ours, theirs = merged(tmp_path / "a", one, two), naive(tmp_path / "b", one, two)
    expected = tensors(theirs)
    assert tensors(ours).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(ours).items())
    assert torch.equal(logits(ours), logits(theirs))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


def refusal(folder: Path, *parts: Path) -> str:
    with pytest.raises(InputError) as caught:
        merged(folder, *parts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_tensor_that_differs_is_named_with_both_models(tmp_path: Path, new_model: NewModel) -> None:
    one, narrow = new_model(), new_model(intermediate_size=80)
    assert refusal(tmp_path / "a", one, narrow) == (
        f"system mix: {one.name} and {narrow.name} are not of one architecture: the tensor "
        "model.layers.0.mlp.down_proj.weight is float [64, 96] in the one and float [64, 80] in the other; merge "
        "models that began as the same one"
    )
    deep = new_model(num_hidden_layers=3)
    said = "the tensor model.layers.2.input_layernorm.weight is float [64] in the one and absent in the other"
    assert said in refusal(tmp_path / "b", deep, one)
    assert not list((tmp_path / "a").iterdir())


def test_integers_must_be_equal(tmp_path: Path, tiny_model: Path) -> None:
    def counts(values: Sequence[int]) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda state: state.update({"model.counts": torch.tensor(values)})

    one, same = (changed(tiny_model, tmp_path / name, counts([1, 2])) for name in ("one", "same"))
    ours = merged(tmp_path / "a", one, same)
    assert torch.equal(tensors(ours)["model.counts"], torch.tensor([1, 2]))
    message = refusal(tmp_path / "b", one, changed(tiny_model, tmp_path / "other", counts([1, 3])))
    assert "the tensor model.counts, which is not a float, differs between one and other" in message


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    broken = changed(tiny_model, tmp_path / "broken", lambda state: state["model.norm.weight"].fill_(float("nan")))
    message = refusal(tmp_path / "a", tiny_model, broken)
    assert message.startswith("system mix: the tensor model.norm.weight of broken is not finite")


def test_quantized_parts_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    packed = reconfigured(tiny_model, tmp_path / "packed", quantization_config={"quant_method": "fp8"})
    assert "packed is quantized" in refusal(tmp_path / "a", tiny_model, packed)


@pytest.mark.parametrize(("field", "value"), [("rms_norm_eps", 0.5), ("max_position_embeddings", 99)])
def test_models_that_compute_otherwise_are_refused(
    tmp_path: Path, new_model: NewModel, field: str, value: float
) -> None:
    one = new_model(seed=1)
    other = reconfigured(new_model(seed=2), tmp_path / "other", **{field: value})
    with pytest.raises(InputError, match=rf"not of one architecture: {field} is .* in that of the other"):
        merged(tmp_path / "out", one, other)


def test_end_tokens_in_a_nested_config_are_no_other_architecture() -> None:
    one = {"eos_token_id": 1, "hidden_size": 8, "text_config": {"eos_token_id": 1, "layers": 2}}
    other = {"eos_token_id": [1, 2], "hidden_size": 8, "text_config": {"eos_token_id": [1, 2], "layers": 2}}
    assert _computed(one) == _computed(other) == {"hidden_size": 8, "text_config": {"layers": 2}}


def test_a_merged_model_is_the_weighted_mean_of_weights(
    bench: Bench, new_model: Callable[..., Path], tiny_model: Path
) -> None:
    other = locate_model(str(new_model(seed=5)), bench.store)
    artifact = merge("e", bench.store, [(bench.model, 0.25), (other, 0.75)], bench.tokenizer)
    mine, theirs = load_file(tiny_model / "model.safetensors"), load_file(other.path / "model.safetensors")
    for name, tensor in weights(artifact).items():
        torch.testing.assert_close(tensor, 0.25 * mine[name] + 0.75 * theirs[name])
    assert merge("e", bench.store, [(other, 0.75), (bench.model, 0.25)], bench.tokenizer).path == artifact.path
    stranger = locate_model(str(new_model(hidden_size=32)), bench.store)
    with pytest.raises(InputError, match="not of one architecture"):
        merge("e", bench.store, [(bench.model, 0.5), (stranger, 0.5)], bench.tokenizer)
