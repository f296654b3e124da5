"""What the self-check refuses, and why."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.scoring.attention import CASCADE, Unsupported
from cpo_pipe.trainer.scoring.head import Head
from cpo_pipe.trainer.scoring.probes import select_probes
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.scoring.self_check import choose_backend
from tests.support.architectures import VOCABULARY, group, make, table
from tests.support.scoring import GROUPS, PROBES, assert_equal, naive, ours


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="m: attention flex does not run on cpu"):
        choose_backend("m", Scorer(make("Llama, untied")), PROBES, "flex")


def test_a_window_is_minded_in_every_group_not_only_those_probed() -> None:
    scorer = Scorer(make("Mistral, window 16"))
    short = [group(4, 3, 6)]
    assert choose_backend("m", scorer, select_probes(table(short))).attention == "cascade"
    with pytest.raises(Unsupported, match="window of 16 is shorter"):
        scorer(scorer.pack([group(20, 3, 6)]))


@pytest.mark.parametrize(
    "name",
    ["Mamba (state space)", "LFM 2 (attention and convolution)", "GPT-Neo (local layers of 16)", "MPT (ALiBi)"],
)
def test_groups_without_a_fork_do_not_hide_what_is_wrong_with_forks(name: str) -> None:
    # Where the longest, middle and shortest groups are chains (K = 1, or cuts of the target), every way looks exact.
    chains = [([5] * 9, [[6, 7, 8, 9, 10, 11, 0], [6, 7, 0]]), ([4, 3], [[8, 9, 0]]), ([4], [[3]])]
    assert choose_backend("m", Scorer(make(name)), select_probes(table(chains))).attention == "padded"


def phi3(limit: int) -> PreTrainedModel:
    """A model whose rotary embeddings change for rows longer than the limit (longrope)."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "original_max_position_embeddings": limit}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = AutoConfig.for_model(
        "phi3", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, original_max_position_embeddings=limit, rope_parameters=rope, initializer_range=0.3,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_rotary_embeddings_that_change_with_the_longest_row_are_computed_row_by_row() -> None:
    model = phi3(24)
    straddling = group(16, 6, 14)
    scorer, between = Scorer(model), select_probes(table([straddling]))
    assert choose_backend("m", scorer, between).attention == "plain"
    assert_equal(ours(scorer, straddling), naive(model, straddling), 1e-5)
    with pytest.raises(InputError, match="its rotary embeddings change with the length of the longest row"):
        choose_backend("m", scorer, between, "cascade")
    assert choose_backend("m", scorer, select_probes(table([group(6, 6, 9)]))).attention == "cascade", (
        "no row is past the limit"
    )


def test_a_causal_model_is_not_refused_because_half_a_row_has_other_rotary_embeddings() -> None:
    model, long = phi3(40), ([*range(1, 11)], [[*range(11, 51)], [*range(20, 59)]])
    scorer = Scorer(model)
    choose_backend("m", scorer, select_probes(table([long])))
    assert_equal(ours(scorer, long), naive(model, long), 1e-5)


def broken(monkeypatch: pytest.MonkeyPatch, only_under_autocast: bool) -> None:
    """Make `cascade` return NaN."""
    real = AttentionInterface()[CASCADE]

    def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        output, weights = real(*args, **kwargs)
        return output * (torch.nan if torch.is_autocast_enabled("cpu") or not only_under_autocast else 1), weights

    AttentionInterface.register(CASCADE, attend)
    monkeypatch.setattr("cpo_pipe.trainer.scoring.self_check.BACKENDS", {"cpu": ("cascade", "split")})


@pytest.fixture
def keeps_attention() -> Iterator[None]:
    real = AttentionInterface()[CASCADE]
    yield
    AttentionInterface.register(CASCADE, real)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_backend_that_returns_nan_is_refused(
    gradients: bool, keeps_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, only_under_autocast=False)
    choice = choose_backend("m", Scorer(make("Llama, untied")), PROBES, gradients=gradients)
    assert choice.attention == "split"
    assert choice.refused == {"cascade": "log-probs are off by nan"}


def test_log_probs_that_are_finite_only_in_float32_are_an_error(
    keeps_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, only_under_autocast=True)
    scorer = Scorer(make("Llama, untied"), "bfloat16")
    with pytest.raises(RunError, match="m: the model's log-probs are not finite in bfloat16; use dtype float32"):
        choose_backend("m", scorer, PROBES, gradients=False)


def test_a_model_that_counts_the_tokens_of_a_row_gets_none_longer_than_it_counts_to() -> None:
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        attention_chunk_size=512, max_position_embeddings=512, no_rope_layers=[1, 0], attn_temperature_tuning=True,
        floor_scale=40, attn_scale=1.0, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    scorer = Scorer(AutoModelForCausalLM.from_config(config).eval())
    small, large = group(10, 5, 6), group(10, 5, 20)
    assert choose_backend("m", scorer, select_probes(table([small]))).attention == "dense", "one group in a row"
    choice = choose_backend("m", scorer, select_probes(table([small, large])))
    assert choice.attention == "padded"
    assert choice.refused["cascade"] == "its attention changes with every 40 tokens of a row, whatever their positions"
    assert_equal(ours(scorer, large), naive(scorer.model, large), 1e-5)
    alone = choose_backend("m", scorer, select_probes(table([(small[0], small[1][:1])])))
    assert (alone.attention, list(alone.refused)) == ("padded", ["packed"]), "a row of several is as long as they are"


def test_a_model_that_sees_what_follows_is_refused() -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.3,
    )  # fmt: skip
    with pytest.raises(InputError, match="m: the model is not causal"):
        choose_backend("m", Scorer(AutoModelForCausalLM.from_config(config).eval()), PROBES)


def test_weights_that_are_not_finite_are_said_to_be_the_trouble() -> None:
    model = make("Llama, untied")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RunError, match="m: the model's log-probs are not finite"):
        choose_backend("m", Scorer(model), PROBES)


def test_soft_capped_scores_are_not_left_out_of_a_model_that_is_loaded(tmp_path: Path) -> None:
    make("Gemma 2, window 16").save_pretrained(tmp_path)
    loaded = locate_model(str(tmp_path), Store(tmp_path / "store")).load(torch.float32).eval()
    config = AutoConfig.from_pretrained(tmp_path)
    config.attn_logit_softcapping = None
    uncapped = AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
    found, true, wrong = (torch.cat(naive(m, GROUPS[0])) for m in (loaded, make("Gemma 2, window 16"), uncapped))
    torch.testing.assert_close(found, true)
    assert float((found - wrong).abs().max()) > 1e-2, "soft-capping shows in this model"


def test_a_soft_cap_that_small_logits_hide_is_known() -> None:
    config = AutoConfig.for_model(
        "xlstm", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0,
        v_dim_factor=1.0, pad_token_id=0, eos_token_id=0, bos_token_id=0, output_logit_soft_cap=5.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    scorer = Scorer(model)
    choose_backend("m", scorer, PROBES, "padded")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # as training makes them grow
    assert_equal(ours(scorer, GROUPS[0]), naive(model, GROUPS[0]), 1e-5)


def test_an_error_without_words_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(make("Llama, untied"))
    monkeypatch.setattr("cpo_pipe.trainer.scoring.scorer.pack_trees", lambda *_: (_ for _ in ()).throw(IndexError()))
    choice = choose_backend("m", scorer, PROBES)
    assert choice.attention == "padded"
    assert choice.refused["cascade"] == "IndexError: no reason given"


def test_a_head_that_is_not_known_goes_the_models_own_way() -> None:
    model = make("Cohere (scaled logits)")
    scorer = Scorer(model)
    scorer._head = Head(1.0, None)  # as if the config had not told
    choice = choose_backend("m", scorer, PROBES)
    assert choice.attention == "plain"
    assert "off by" in choice.refused["padded"]
    assert_equal(ours(scorer, GROUPS[0]), naive(model, GROUPS[0]), 1e-5)


def test_several_backends_may_be_requested() -> None:
    scorer = Scorer(make("MPT (ALiBi)"))
    choice = choose_backend("m", scorer, PROBES, ("packed", "padded", "plain"))
    assert (choice.attention, list(choice.refused)) == ("padded", ["packed"])
    with pytest.raises(InputError, match="m: attention packed is not numerically equivalent for this model: its atten"):
        choose_backend("m", scorer, PROBES, ("packed",))
