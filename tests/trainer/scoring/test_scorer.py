"""Every attention backend is equivalent for a model, or refused for it: against a loop over single sequences."""

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models.model import new_network
from cpo_pipe.trainer.scoring.attention import AttentionBackend
from cpo_pipe.trainer.scoring.dropout import remove_dropout
from cpo_pipe.trainer.scoring.head import Head
from cpo_pipe.trainer.scoring.prefix_tree import pack_trees
from cpo_pipe.trainer.scoring.probes import select_probes
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.scoring.self_check import BACKENDS, choose_backend
from tests.support.architectures import SIZES, VOCABULARY, each, group, make, table
from tests.support.scoring import GROUPS, PROBES, assert_equal, gradients, naive, ours

TAKEN = {
    "Mistral, window 16": "split",
    "Gemma 2 (soft-caps, windows of 64)": "dense",
    "Gemma 2, window 16": "dense",
    "Gemma 3, window 16 in some layers": "split",
    "VaultGemma (soft-caps)": "dense",
    "DeepSeek-V3 (latent attention, experts)": "split",
    "GPT-OSS (sinks, window 16, experts)": "dense",
    "StableLM": "dense",
    "Falcon (rotary)": "dense",
    "Falcon (ALiBi)": "padded",
    "BLOOM (ALiBi)": "padded",
    "MPT (ALiBi)": "padded",
    "GPT-J": "dense",
    "GPT-Neo (local layers of 16)": "padded",
    "XGLM": "dense",
    "BART (decoder)": "padded",
    "Llama 4 (experts, chunks longer than all)": "dense",
    "Doge": "dense",
    "Mamba (state space)": "padded",
    "Mamba 2 (state space)": "padded",
    "Jamba (attention and state space)": "padded",
    "LFM 2 (attention and convolution)": "padded",
}
"""What `auto` takes; cascade where nothing is said."""


@pytest.mark.parametrize("name", each())
def test_exact_or_refused(name: str) -> None:
    model = make(name)
    scorer = Scorer(model)
    texts = GROUPS[0]
    expected = naive(model, texts)
    wanted = gradients(model, expected)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    choice = choose_backend("m", scorer, PROBES)
    assert choice.attention == TAKEN.get(name, "cascade"), choice.refused
    refused = {}
    for attention in BACKENDS["cpu"]:
        try:
            choose_backend("m", scorer, PROBES, attention)
        except InputError as refusal:
            refused[attention] = str(refusal)
            continue
        found = ours(scorer, texts)
        assert_equal(found, expected, 1e-5)
        for parameter, gradient in gradients(model, found).items():
            wrong = (gradient - wanted[parameter]).norm()
            assert wrong < 1e-4 * wanted[parameter].norm() + 1e-6 * norm, (attention, parameter)
    assert refused.keys() >= choice.refused.keys()
    assert all("is not numerically equivalent for this model: " in reason for reason in refused.values())


@pytest.mark.parametrize("name", each())
def test_targets_alone_are_packed_without_a_trace_of_each_other_or_not_at_all(name: str) -> None:
    groups = [(prompt, candidates[:1]) for prompt, candidates in GROUPS]
    model = make(name)
    expected = [values for texts in groups for values in naive(model, texts)]
    wanted = gradients(model, expected)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    scorer = Scorer(model)
    choice = choose_backend("m", scorer, select_probes(table(groups)))
    hooked = TAKEN.get(name, "cascade") in ("cascade", "split")
    assert choice.attention == ("packed" if hooked else "padded"), choice.refused
    row = scorer.pack(groups)
    tokens = sum(len(prompt) + len(candidate) - 1 for prompt, (candidate,) in groups)
    assert (row.ids.numel() == tokens) == hooked
    values = row.per_token(scorer(row))
    found = [one[: len(candidate)] for one, (_, (candidate,)) in zip(values, groups, strict=True)]
    assert_equal(found, expected, 1e-5)
    for parameter, gradient in gradients(model, found).items():
        wrong = (gradient - wanted[parameter]).norm()
        assert wrong < 1e-4 * wanted[parameter].norm() + 1e-6 * norm, (choice.attention, parameter)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("Llama, untied", "cascade"),
        ("Llama, untied", "split"),
        ("Mistral, window 16", "split"),
        ("GPT-2 (learned positions, tied)", "cascade"),
    ],
)
def test_several_groups_in_a_pass_do_not_see_each_other(name: str, attention: AttentionBackend) -> None:
    model = make(name)
    expected = [values for texts in GROUPS for values in naive(model, texts)]
    wanted = flat(gradients(model, expected))
    scorer = Scorer(model)
    scorer.set_attention(attention)
    packed = scorer.pack(GROUPS)
    rows = packed.per_token(scorer(packed))
    found = [row[: len(values)] for row, values in zip(rows, expected, strict=True)]
    assert_equal(found, expected, 1e-5)
    assert (flat(gradients(model, found)) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", ["Llama, untied", "GPT-2 (learned positions, tied)", "Gemma 2, window 16"])
def test_bfloat16_differs_by_rounding_only(name: str) -> None:
    model = make(name)
    expected = naive(model, GROUPS[0])
    wanted = flat(gradients(model, expected))
    with torch.autocast("cpu", torch.bfloat16):
        rough = naive(model, GROUPS[0])
    usual = float((torch.cat(rough).float() - torch.cat(expected)).detach().abs().mean())
    usual_gradient = (flat(gradients(model, rough)) - wanted).norm()
    scorer = Scorer(model, "bfloat16")
    choice = choose_backend("m", scorer, PROBES)
    assert choice.logprob_error < 1e-5, "the self-check is in float32"
    for attention in (choice.attention, "padded"):
        scorer.set_attention(attention)  # type: ignore[arg-type]
        values = ours(scorer, GROUPS[0])
        found = torch.cat(values)
        assert found.dtype == torch.float32
        mean = float((found - torch.cat(expected)).detach().abs().mean())
        assert 0 < mean < 1.5 * usual, "no worse than transformers' own arithmetic in bfloat16"
        wrong = (flat(gradients(model, values)) - wanted).norm()
        assert 0 < wrong < 1.5 * usual_gradient, attention


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector, float32."""
    return torch.cat([gradient.float().flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("attention", ["cascade", "split", "dense", "padded"])
@pytest.mark.parametrize("candidates", [[[0]], [[5], [6]], [[0], [7, 0]], [[5, 6, 7]], [[5, 6], [5, 6], [5, 6, 0]]])
def test_small_groups(attention: AttentionBackend, candidates: list[list[int]]) -> None:
    model = make("Llama, untied")
    scorer = Scorer(model)
    scorer.set_attention("padded")
    for prompt in ([9], [9, 8, 7]):
        expected = naive(model, (prompt, candidates))
        scorer.set_attention(attention)
        found = ours(scorer, (prompt, candidates))
        assert_equal(found, expected, 1e-5)
        one = gradients(model, found)
        scorer.set_attention("padded")
        other = gradients(model, expected)
        assert all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-4) for key in other)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "name", ["Llama, untied", "GPT-2 (learned positions, tied)", "Gemma 2, window 16", "Qwen3-MoE (experts)"]
)
def test_several_groups_in_one_row_of_flex_attention(name: str) -> None:
    # On a CPU it has no backward pass; the forward pass is the same code as on CUDA, but for the compiler.
    model = make(name)
    expected = [values for texts in GROUPS for values in naive(model, texts)]
    scorer = Scorer(model)
    scorer.set_attention("flex")
    with torch.no_grad():
        packed = scorer.pack(GROUPS)
        rows = packed.per_token(scorer(packed))
    candidates = [candidate for _, those in GROUPS for candidate in those]
    assert_equal([row[: len(c)] for row, c in zip(rows, candidates, strict=True)], expected, 1e-5)
    assert packed.sizes == tuple(len(those) for _, those in GROUPS)


def test_checkpointing_changes_nothing_and_happens() -> None:
    model = make("GPT-2 (learned positions, tied)")
    scorer = Scorer(model)
    choose_backend("m", scorer, PROBES)
    plain = gradients(model, ours(scorer, GROUPS[0]))
    calls = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    scorer.set_checkpointing(True)
    again = gradients(model, ours(scorer, GROUPS[0]))
    assert len(calls) == 2, "the layer was computed once more in the backward pass"
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert not model.transformer.h[0].attn.training, "dropout stays off"
    with scorer.own_attention() as own:
        ids = torch.tensor([[5, 6, 7]])
        out = own.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert out.shape[1] <= 7
    assert all(torch.equal(plain[key], value) for key, value in gradients(model, ours(scorer, GROUPS[0])).items())


@pytest.mark.parametrize("name", each())
def test_no_dropout_is_left_whatever_the_flags_of_its_modules(name: str) -> None:
    model = make(name)
    expected = float(torch.cat(naive(model, GROUPS[0])).sum())

    def switch_on(owner: nn.Module | PreTrainedConfig) -> None:
        for key, value in vars(owner).items():
            if isinstance(value, PreTrainedConfig):
                switch_on(value)
            elif ("drop" in key or (key == "p" and isinstance(owner, nn.Dropout))) and isinstance(value, float):
                setattr(owner, key, 0.5)

    for module in model.modules():
        switch_on(module)
    switch_on(model.config)
    before = model.config.to_dict()
    kept = remove_dropout(model)
    assert kept.to_dict() == before
    scorer = Scorer(model)
    scorer.set_attention("plain")
    with contextlib.suppress(ValueError):  # has no such layers
        scorer.set_checkpointing(True)
    for whole in (False, True):
        model.train(whole or model.training)
        sums = {float(torch.cat(ours(scorer, GROUPS[0])).sum()) for _ in range(5)}
        assert len(sums) == 1
        assert sums.pop() == pytest.approx(expected, rel=1e-5)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    model = make("Llama, untied")
    model.model.layers[0].register_forward_hook(lambda module, given, out: nn.functional.dropout(out, 0.1))
    with pytest.raises(RunError, match="m: the model's log-probs differ from one forward pass to the next"):
        choose_backend("m", Scorer(model), PROBES)


@pytest.mark.parametrize("name", each(slowest=False))
def test_the_self_check_makes_no_more_logits_than_the_memory_allows(name: str) -> None:
    """Nor does the plain way, which gives the same gradients with its logits in parts."""
    model = make(name, vocab_size=131)  # as wide as nothing else
    texts = (list(range(1, 25)), [[*range(3, 18), 0], [5, 6, 0], [9] * 4])
    most = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal most
            result = function(*args, **(kwargs or {}))
            weight = (64, 131)  # transposed
            if isinstance(result, Tensor) and result.shape[-1:] == (131,) and result.shape != weight:
                most = max(most, result.numel() // 131)
            return result

    scorer = Scorer(model)
    scorer.logits_bytes = 4 * 131 * 20
    with Count():
        choose_backend("m", scorer, select_probes(table([texts])))
    assert 0 < most <= 20, "of the prompt's 24 positions and the candidates' 23"
    scorer.set_attention("plain")
    expected = naive(model, texts)
    wanted = gradients(model, expected)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    most = 0
    with Count():
        found = ours(scorer, texts)
        gradient_of = gradients(model, found)
    assert 0 < most <= 20
    assert_equal(found, expected, 1e-6)
    assert gradient_of.keys() == wanted.keys()
    for parameter, gradient in gradient_of.items():
        assert (gradient - wanted[parameter]).norm() < 1e-5 * wanted[parameter].norm() + 1e-6 * norm, parameter


def test_logits_of_other_positions_than_asked_for_are_noticed() -> None:
    model = make("Llama, untied")
    expected, forward = naive(model, GROUPS[0]), model.forward
    shifted = lambda *inputs, logits_to_keep=0, **others: forward(  # noqa: E731
        *inputs, logits_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else logits_to_keep - 1, **others
    )
    model.forward = functools.wraps(forward)(shifted)  # type: ignore[method-assign]
    scorer = Scorer(model)
    assert scorer.keeps
    choose_backend("m", scorer, PROBES, "plain")
    assert not scorer.keeps
    assert_equal(ours(scorer, GROUPS[0]), expected, 1e-6)


@pytest.mark.parametrize("name", each(slowest=False))
def test_the_largest_tree_is_probed(name: str) -> None:
    """In none of its rows, but with more tokens than the model has positions."""
    model = make(name, **({"window_size": 128} if "GPT-Neo" in name else {}))
    largest = group(20, 14, 30)
    groups = [(list(range(1, 60)), [[7] * 20 + [0]]), largest, group(4, 3, 6), group(3, 2, 5)]
    assert pack_trees([largest]).tokens() > 128 > 20 + 30
    assert largest in select_probes(table(groups)).groups
    expected = naive(model, largest)
    scorer = Scorer(model)
    choose_backend("m", scorer, select_probes(table(groups)))
    assert_equal(ours(scorer, largest), expected, 1e-5)


def test_the_largest_tree_is_not_the_one_with_most_tokens() -> None:
    cuts = [7, 8] * 10, [[9] * n + [0] for n in range(1, 30)]  # all on one path
    largest = group(20, 8, 29)
    found = select_probes(table([cuts, largest, group(3, 2, 5), group(2, 2, 5), group(2, 2, 4)])).groups
    assert largest in found
    tokens = [pack_trees([texts]).tokens() for texts in found]
    assert tokens[found.index(largest)] == max(tokens)


@pytest.mark.parametrize(
    ("kind", "settings", "scale"),
    [
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "logit_scale": "inv_sqrt_d_model"}, 1.0),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "logit_scale": 0.5}, 1.0),
        ("hyperclovax", {**SIZES, "logits_scaling": 0.25}, 0.25),
        ("granite", {**SIZES, "logits_scaling": 4.0}, 0.25),
        ("cohere", {**SIZES, "logit_scale": 0.5}, 0.5),
    ],
)
def test_the_head_is_the_models_whatever_its_config_says(kind: str, settings: dict[str, Any], scale: float) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"vocab_size": VOCABULARY, **settings})
    model = new_network(config).eval()
    assert Head.of(model) == Head(scale, None)
    expected = naive(model, GROUPS[0])
    scorer = Scorer(model)
    assert choose_backend("m", scorer, PROBES).attention != "plain"
    assert_equal(ours(scorer, GROUPS[0]), expected, 1e-5)


@pytest.mark.parametrize("attention", ["padded", "plain"])
@pytest.mark.parametrize("name", ["Llama, untied", "Phi (head bias)", "Gemma 2, window 16", "Granite (scaled logits)"])
def test_logits_are_those_of_the_model(name: str, attention: AttentionBackend) -> None:
    model = make(name)
    scorer = Scorer(model)
    scorer.logits_bytes = 1  # `plain` computes them one by one
    scorer.set_attention(attention)
    found = list(scorer.logits(scorer.pack(GROUPS)))
    rows = [(prompt, ids) for prompt, candidates in GROUPS for ids in candidates]
    for logits, (prompt, ids) in zip(found, rows, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama, untied", "Gemma 2, window 16"])
def test_padded_logits_are_bit_for_bit_those_of_the_models_own_batch(name: str) -> None:
    model = make(name)
    scorer = Scorer(model)
    (prompt, (target, *_)), (other, (short, *_)) = GROUPS[0], ([5, 6], [[7, 8]])
    rows = [prompt + target[:-1], [*other, *short[:-1]]]
    with torch.no_grad():
        batch = model(torch.tensor([row + [0] * (len(rows[0]) - len(row)) for row in rows]), use_cache=False).logits
    found = list(scorer.logits(scorer.pack([(prompt, [target]), (other, [short])])))
    assert torch.equal(found[0], batch[0, len(prompt) - 1 :])
    assert torch.equal(found[1], batch[1, 1:3])
