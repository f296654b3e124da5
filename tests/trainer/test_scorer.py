"""Every way of computing a group is exact for a model, or refused for it: against a loop over single sequences."""

import contextlib
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models import locate_model, new_network
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.attention import Attention, Unsupported
from cpo_pipe.trainer.dropout import remove_dropout
from cpo_pipe.trainer.head import Head
from cpo_pipe.trainer.scorer import ORDER, Scorer, choose
from cpo_pipe.trainer.tables import probes
from cpo_pipe.trainer.trees import Packed, pack_rows, pack_trees
from tests.trainer.architectures import SIZES, VOCABULARY, each, group, make, table

Texts = tuple[list[int], list[list[int]]]

GROUPS = [group(20, 8, 18), group(28, 4, 9, seed=1), group(1, 3, 5, seed=2)]
PROBES = probes(table(GROUPS))

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
    "Doge": "dense",
    "Mamba (state space)": "padded",
    "Mamba 2 (state space)": "padded",
    "Jamba (attention and state space)": "padded",
    "LFM 2 (attention and convolution)": "padded",
}
"""What `auto` takes; cascade where nothing is said."""


def naive(model: PreTrainedModel, texts: Texts) -> list[Tensor]:
    """Log-probs of each candidate's tokens, one sequence at a time."""
    prompt, candidates = texts
    found = []
    for candidate in candidates:
        logits = model(torch.tensor([prompt + candidate]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1)[torch.arange(len(candidate)), torch.tensor(candidate)])
    return found


def gradients(model: PreTrainedModel, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a sum whose terms have weights of their own."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    total = torch.stack([(values * torch.randn(values.shape, generator=generator)).sum() for values in tokens]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(scorer: Scorer, texts: Texts) -> list[Tensor]:
    packed = scorer.pack([texts])
    rows = packed.per_token(scorer(packed))
    return [row[: len(candidate)] for row, candidate in zip(rows, texts[1], strict=True)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    one, other = torch.cat(list(found)), torch.cat(list(expected))
    assert float((one - other).detach().abs().max() / other.detach().abs().max()) < tolerance


@pytest.mark.parametrize("name", each())
def test_exact_or_refused(name: str) -> None:
    model = make(name)
    scorer = Scorer(model)
    texts = GROUPS[0]
    expected = naive(model, texts)
    wanted = gradients(model, expected)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    choice = choose("m", scorer, PROBES)
    assert choice.attention == TAKEN.get(name, "cascade"), choice.refused
    refused = {}
    for attention in ORDER["cpu"]:
        try:
            choose("m", scorer, PROBES, attention)
        except InputError as refusal:
            refused[attention] = str(refusal)
            continue
        found = ours(scorer, texts)
        assert_equal(found, expected, 1e-5)
        for parameter, gradient in gradients(model, found).items():
            wrong = (gradient - wanted[parameter]).norm()
            assert wrong < 1e-4 * wanted[parameter].norm() + 1e-6 * norm, (attention, parameter)
    assert refused.keys() >= choice.refused.keys()
    assert all("is not exact for this model: " in reason for reason in refused.values())


@pytest.mark.parametrize("name", each())
def test_targets_alone_are_packed_without_a_trace_of_each_other_or_not_at_all(name: str) -> None:
    groups = [(prompt, candidates[:1]) for prompt, candidates in GROUPS]
    model = make(name)
    expected = [values for texts in groups for values in naive(model, texts)]
    wanted = gradients(model, expected)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    scorer = Scorer(model)
    choice = choose("m", scorer, probes(table(groups)))
    hooked = TAKEN.get(name, "cascade") in ("cascade", "split") and "Llama 4" not in name  # which counts a row's tokens
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


@pytest.mark.parametrize("name", ["Llama, untied", "GPT-2 (learned positions, tied)", "Gemma 2, window 16"])
def test_bfloat16_differs_by_rounding_only(name: str) -> None:
    model = make(name)
    expected = naive(model, GROUPS[0])
    with torch.autocast("cpu", torch.bfloat16):
        rough = naive(model, GROUPS[0])
    usual = float((torch.cat(rough).float() - torch.cat(expected)).detach().abs().mean())
    scorer = Scorer(model, "bfloat16")
    choice = choose("m", scorer, PROBES)
    assert choice.logprob_error < 1e-5, "the self-check is in float32"
    for attention in (choice.attention, "padded"):
        scorer.set_attention(attention)  # type: ignore[arg-type]
        found = torch.cat(ours(scorer, GROUPS[0]))
        assert found.dtype == torch.float32
        mean = float((found - torch.cat(expected)).detach().abs().mean())
        assert 0 < mean < 1.5 * usual, "no worse than transformers' own arithmetic in bfloat16"


@pytest.mark.parametrize("attention", ["cascade", "split", "dense", "padded"])
@pytest.mark.parametrize("candidates", [[[0]], [[5], [6]], [[0], [7, 0]], [[5, 6, 7]], [[5, 6], [5, 6], [5, 6, 0]]])
def test_small_groups(attention: Attention, candidates: list[list[int]]) -> None:
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
    choose("m", scorer, PROBES)
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
    with pytest.raises(RunError, match="m: the model gives other log-probs each time"):
        choose("m", Scorer(model), PROBES)


@pytest.mark.parametrize("name", each(slow=False))
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
        choose("m", scorer, probes(table([texts])))
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
    choose("m", scorer, PROBES, "plain")
    assert not scorer.keeps
    assert_equal(ours(scorer, GROUPS[0]), expected, 1e-6)


@pytest.mark.parametrize("name", each(slow=False))
def test_the_largest_tree_is_probed(name: str) -> None:
    """In none of its rows, but with more tokens than the model has positions."""
    model = make(name, **({"window_size": 128} if "GPT-Neo" in name else {}))
    largest = group(20, 14, 30)
    groups = [(list(range(1, 60)), [[7] * 20 + [0]]), largest, group(4, 3, 6), group(3, 2, 5)]
    assert pack_trees([largest]).tokens() > 128 > 20 + 30
    assert largest in probes(table(groups)).groups
    expected = naive(model, largest)
    scorer = Scorer(model)
    choose("m", scorer, probes(table(groups)))
    assert_equal(ours(scorer, largest), expected, 1e-5)


def test_the_largest_tree_is_not_the_one_with_most_tokens() -> None:
    cuts = [7, 8] * 10, [[9] * n + [0] for n in range(1, 30)]  # all on one path
    largest = group(20, 8, 29)
    found = probes(table([cuts, largest, group(3, 2, 5), group(2, 2, 5), group(2, 2, 4)])).groups
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
    assert choose("m", scorer, PROBES).attention != "plain"
    assert_equal(ours(scorer, GROUPS[0]), expected, 1e-5)


def test_a_named_way_for_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="m: attention flex does not run on cpu"):
        choose("m", Scorer(make("Llama, untied")), PROBES, "flex")


def test_a_window_is_minded_in_every_group_not_only_those_probed() -> None:
    scorer = Scorer(make("Mistral, window 16"))
    short = [group(4, 3, 6)]
    assert choose("m", scorer, probes(table(short))).attention == "cascade"
    with pytest.raises(Unsupported, match="window of 16 is shorter"):
        scorer(scorer.pack([group(20, 3, 6)]))


@pytest.mark.parametrize(
    "name",
    ["Mamba (state space)", "LFM 2 (attention and convolution)", "GPT-Neo (local layers of 16)", "MPT (ALiBi)"],
)
def test_groups_without_a_fork_do_not_hide_what_is_wrong_with_forks(name: str) -> None:
    # Where the longest, middle and shortest groups are chains (K = 1, or cuts of the target), every way looks exact.
    chains = [([5] * 9, [[6, 7, 8, 9, 10, 11, 0], [6, 7, 0]]), ([4, 3], [[8, 9, 0]]), ([4], [[3]])]
    assert choose("m", Scorer(make(name)), probes(table(chains))).attention == "padded"


def test_rotary_embeddings_that_change_with_the_longest_row_are_computed_row_by_row() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = AutoConfig.for_model(
        "phi3", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, original_max_position_embeddings=24, rope_parameters=rope, initializer_range=0.3,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    straddling = group(16, 6, 14)
    scorer, between = Scorer(model), probes(table([straddling]))
    assert choose("m", scorer, between).attention == "plain"
    assert_equal(ours(scorer, straddling), naive(model, straddling), 1e-5)
    with pytest.raises(InputError, match="its rotary embeddings change with the length of the longest row"):
        choose("m", scorer, between, "cascade")
    assert choose("m", scorer, probes(table([group(6, 6, 9)]))).attention == "cascade", "no row is past the limit"


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
    assert choose("m", scorer, probes(table([small]))).attention == "cascade"
    choice = choose("m", scorer, probes(table([small, large])))
    assert choice.attention == "padded"
    assert choice.refused["cascade"] == "its attention changes with every 40 tokens of a row, whatever their positions"
    assert_equal(ours(scorer, large), naive(scorer.model, large), 1e-5)
    alone = choose("m", scorer, probes(table([(small[0], small[1][:1])])))
    assert (alone.attention, list(alone.refused)) == ("padded", ["packed"]), "a row of several is as long as they are"


def test_a_model_that_sees_what_follows_is_refused() -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.3,
    )  # fmt: skip
    with pytest.raises(InputError, match="m: the model is not causal"):
        choose("m", Scorer(AutoModelForCausalLM.from_config(config).eval()), PROBES)


def test_weights_that_are_not_finite_are_said_to_be_the_trouble() -> None:
    model = make("Llama, untied")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RunError, match="m: the model gives log-probs that are not finite"):
        choose("m", Scorer(model), PROBES)


def test_soft_capped_scores_are_not_left_out_of_a_model_that_is_loaded(tmp_path: Path) -> None:
    make("Gemma 2, window 16").save_pretrained(tmp_path)
    loaded = locate_model(str(tmp_path), Store(tmp_path / "store")).load(torch.float32).eval()
    config = AutoConfig.from_pretrained(tmp_path)
    config.attn_logit_softcapping = None
    uncapped = AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
    found, true, wrong = (torch.cat(naive(m, GROUPS[0])) for m in (loaded, make("Gemma 2, window 16"), uncapped))
    torch.testing.assert_close(found, true)
    assert float((found - wrong).abs().max()) > 1e-2, "soft-capping shows in this model"


def test_an_error_without_words_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(make("Llama, untied"))
    monkeypatch.setattr("cpo_pipe.trainer.scorer.pack_trees", lambda *_: (_ for _ in ()).throw(IndexError()))
    choice = choose("m", scorer, PROBES)
    assert choice.attention == "padded"
    assert choice.refused["cascade"] == "IndexError: no reason given"


def test_a_head_that_is_not_known_goes_the_models_own_way() -> None:
    model = make("Cohere (scaled logits)")
    scorer = Scorer(model)
    scorer._head = Head(1.0, None)  # as if the config had not told
    choice = choose("m", scorer, PROBES)
    assert choice.attention == "plain"
    assert "off by" in choice.refused["padded"]
    assert_equal(ours(scorer, GROUPS[0]), naive(model, GROUPS[0]), 1e-5)


# ── the tree ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def prefixes(texts: Texts) -> set[tuple[int, ...]]:
    return {tuple(candidate[:end]) for candidate in texts[1] for end in range(1, len(candidate))}


def ancestors(texts: Texts, packed: Packed) -> Tensor:
    """Which input tokens precede which, by the definition: its prefix is the beginning of the other's."""
    prompt = texts[0]
    paths = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
    paths += sorted(tuple(prompt) + prefix for prefix in prefixes(texts))
    assert sorted(path[-1] for path in paths) == sorted(packed.ids[0].tolist())
    return torch.tensor([[other == path[: len(other)] for other in paths] for path in paths])


@pytest.mark.parametrize("seed", range(20))
def test_each_distinct_prefix_is_there_once_and_sees_what_it_follows(seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
    texts = prompt, [[rng.randrange(2) for _ in range(rng.randrange(1, 6))] for _ in range(rng.randrange(1, 9))]
    packed = pack_trees([texts])
    tree = packed.tree
    assert tree is not None
    assert packed.tokens() == len(prompt) + len(prefixes(texts))
    # Depth-first order with the smallest token first is the order of sorted prefixes.
    assert torch.equal(tree.mask(None), ancestors(texts, packed))
    assert torch.equal(tree.mask(None).sum(-1) - 1, tree.position_N)
    pairs = {(*candidate[: end + 1],) for candidate in texts[1] for end in range(len(candidate))}
    assert len(packed.label_E) == len(pairs), "each distinct (prefix, next token) is scored once"
    assert len(packed.source_S) == len({pair[:-1] for pair in pairs})
    owned = tree.path_RD.flatten()[tree.own_B]
    assert owned.tolist() == list(range(packed.tokens() - len(prompt)))


def test_a_cut_of_the_target_costs_no_input_token() -> None:
    target = [5, 6, 7, 8, 9, 0]
    alone = pack_trees([([1, 2], [target])])
    cut = pack_trees([([1, 2], [target, [5, 6, 0], [5, 6, 7, 8, 0], [0]])])
    assert torch.equal(alone.ids, cut.ids)
    assert len(cut.source_S) == len(alone.source_S), "nor another row of logits"


def test_padded_rows_share_nothing() -> None:
    packed = pack_rows([([1, 2], [[5, 6, 0], [5, 0]]), ([3], [[4]])])
    assert packed.ids.tolist() == [[1, 2, 5, 6], [1, 2, 5, 0], [3, 0, 0, 0]]
    assert packed.sizes == (2, 1)


# ── the head ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("memory", [1 << 30, 4 * 50 * 7, 1])
@pytest.mark.parametrize(("scale", "cap", "bias"), [(1.0, None, False), (0.5, None, True), (2.0, 3.0, True)])
def test_the_head_against_log_softmax(
    memory: int, scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpo_pipe.trainer.head.CHUNK_BYTES", 4 * 50 * 3)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 8), (50, 8), (50,))]
    row = torch.tensor([0, 0, 0, 1, 2, 4, 4, 19])
    label = torch.tensor([3, 4, 49, 0, 7, 7, 8, 1])
    first = [sum(1 for r in row if r < s) for s in range(21)]
    upstream = torch.randn(8, generator=generator, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.float32):
        hidden, weight, offset = (tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors)
        if dtype == torch.float64:
            logits = scale * (hidden @ weight.t() + (offset if bias else 0))
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            values = logits.log_softmax(-1)[row, label]
        else:
            values = Head(scale, cap).logprobs(hidden, weight, offset if bias else None, row, label, first, memory)
        (values * upstream.to(dtype)).sum().backward()
        results.append([values, hidden.grad, weight.grad, *([offset.grad] if bias else [])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [32_000, 256_000])
def test_memory_of_large_vocabularies_stays_within_the_cap(vocabulary: int) -> None:
    # 300 positions times 256,000 floats are 307 MB; the cap allows 8 MB of them.
    peak = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal peak
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (vocabulary,):
                peak = max(peak, result.numel() * result.itemsize)
            return result

    hidden = torch.randn(300, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    row = torch.arange(300)
    with Count():
        Head(1.0, None).logprobs(hidden, weight, None, row, row, list(range(301)), 8 << 20).sum().backward()
    assert 0 < peak <= 8 << 20


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    values = Head(1.0, None).logprobs(hidden, weight, None, torch.arange(3), torch.arange(3), [0, 1, 2, 3], 1 << 20)
    values.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="there is no second"):
        values.sum().backward()
