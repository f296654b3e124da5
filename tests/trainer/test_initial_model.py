"""Models that a training makes from scratch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import ScratchModel
from cpo_pipe.trainer.initial_model import scratch_model
from tests.support.architectures import ARCHITECTURES, SIZES
from tests.support.marks import slow_except
from tests.support.training import CANDIDATES, Bench, metrics, naive_logprob, weights


@pytest.mark.parametrize("name", slow_except(ARCHITECTURES, "Llama, untied", "GPT-2 (learned positions, tied)"))
def test_a_scratch_model_computes_the_same_as_its_checkpoint(bench: Bench, tmp_path: Path, name: str) -> None:
    kind, settings = ARCHITECTURES[name]
    taken = {"vocab_size", "eos_token_id", "bos_token_id", "pad_token_id"}
    known = CONFIG_MAPPING[kind]().to_dict().keys() - taken
    config = {key: value for key, value in {**SIZES, **settings}.items() if key in known}
    scratch = scratch_model(ScratchModel(architecture=kind, config=config), bench.tokenizer).eval()
    scratch.save_pretrained(tmp_path / "saved")
    loaded = locate_model(str(tmp_path / "saved"), bench.store).load(torch.float32).eval()
    ids = torch.arange(1, 41)[None] * 7 % scratch.config.get_text_config().vocab_size
    with torch.no_grad():
        found, expected = (model(ids, use_cache=False).logits.log_softmax(-1) for model in (scratch, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "vaultgemma"])
def test_a_scratch_model_trains_with_its_soft_cap(bench: Bench, architecture: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "initializer_range": 0.3,
             "attn_logit_softcapping": 5.0}  # fmt: skip
    scratch = ScratchModel(architecture=architecture, config=sizes)
    artifact = bench.train("mle", scratch, max_steps=1, learning_rate=1e-12)
    assert 'from_pretrained("this-folder", attn_implementation="eager")' in (artifact.path / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(artifact.path, attn_implementation="eager")
    with torch.no_grad():
        logprobs = [naive_logprob(model, prompt, ids[0]) for prompt, ids, _ in CANDIDATES.values()]
    assert metrics(artifact)[0]["target_logprob"] == pytest.approx(float(torch.stack(logprobs).mean()), rel=1e-5)


@pytest.mark.parametrize("architecture", ["opt", "falcon"])
def test_checkpointed_layers_train_without_the_dropout_of_their_config(bench: Bench, architecture: str) -> None:
    known = CONFIG_MAPPING[architecture]().to_dict()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64} if architecture == "opt" else {"ffn_hidden_size": 96}
    dropout = {key: 0.3 for key in ("dropout", "attention_dropout", "hidden_dropout") if key in known}
    scratch = ScratchModel(architecture=architecture, config={**sizes, **dropout})
    plain, layers = (
        bench.train("mle", scratch, max_steps=3, gradient_checkpointing=on, seed=int(on)) for on in (False, True)
    )
    assert [row["loss"] for row in metrics(plain)][:1] == [row["loss"] for row in metrics(layers)][:1]
    config = json.loads((layers.path / "config.json").read_text())
    assert {config[key] for key in dropout.keys() & config.keys()} == {0.3}


def test_scratch_models_are_reproducible(bench: Bench) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    scratch = ScratchModel(architecture="llama", config=tiny, seed=3)
    first = weights(bench.train("mle", scratch))
    shutil.rmtree(bench.store.root / "checkpoints")
    torch.manual_seed(99)
    again = weights(bench.train("mle", scratch))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(InputError, match=r"init.architecture: lama is not known .* did you mean llama\?"):
        bench.train("mle", ScratchModel(architecture="lama"))
    with pytest.raises(InputError, match=r"init.config.hiden_size: not a key of .* did you mean hidden_size\?"):
        bench.train("mle", ScratchModel(architecture="llama", config={"hiden_size": 32}))
