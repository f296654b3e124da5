from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.eval.generate import Outputs
from cpo_pipe.eval.metrics import mauve as module
from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.metrics.mauve import MIN_TEXTS, causal_features, divergence_area, mauve, measure_mauve
from cpo_pipe.eval.statistics.bootstrap import Bootstrap

SEEDS = (0, 1, 2)
CENTRES = np.random.default_rng(0).normal(size=(20, 16))


def _texts(seed: int, shift: float = 0.0, n: int = 300) -> NDArray[np.float32]:
    """Features in 20 clumps, all moved by `shift`."""
    random = np.random.default_rng(seed)
    return (CENTRES[random.integers(20, size=n)] + random.normal(size=(n, 16)) * 0.7 + shift).astype(np.float32)


def test_the_same_texts_score_1() -> None:
    texts = _texts(1)
    assert mauve(texts, texts, SEEDS) == pytest.approx([1, 1, 1], abs=1e-6)


def test_texts_with_nothing_in_common_score_next_to_0() -> None:
    assert np.mean(mauve(_texts(1), -3 * _texts(2, shift=4), SEEDS)) < 0.02


def test_the_score_falls_with_the_distance() -> None:
    scores = [np.mean(mauve(_texts(1), _texts(2, shift), SEEDS)) for shift in (0, 0.3, 0.6, 1.2)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9


def test_seeds_decide_the_score() -> None:
    one, two = _texts(1), _texts(2, 0.3)
    assert mauve(one, two, SEEDS) == mauve(one, two, SEEDS)
    assert len(set(mauve(one, two, SEEDS))) > 1
    assert mauve(one, two, [0]) == mauve(one, two, SEEDS)[:1]


def test_the_mean_over_seeds_has_a_standard_deviation_from_two_seeds_on() -> None:
    features = {"targets": _texts(1, n=MIN_TEXTS), "outputs": _texts(2, 0.3, n=MIN_TEXTS)}
    targets, outputs = (Outputs([name] * MIN_TEXTS, [[1]] * MIN_TEXTS) for name in features)
    for seeds in (SEEDS, [0]):
        collected = Figures(["e"] * MIN_TEXTS, Bootstrap(resamples=100, seed=0))
        measure_mauve(collected, "cpo", "greedy", outputs, targets, lambda texts: features[texts[0]], seeds)
        scores = mauve(features["targets"], features["outputs"], seeds)
        found = {row["metric"]: row["value"] for row in collected.metrics().to_pylist()}
        assert found.pop("MAUVE") == pytest.approx(np.mean(scores))
        assert found == ({"MAUVE sd": pytest.approx(np.std(scores, ddof=1))} if len(seeds) > 1 else {})


def test_disjoint_histograms_by_hand() -> None:
    # P and Q in different bins: KL(Q|R) = −ln(1 − w), KL(P|R) = −ln w, so the curve is x = (1 − w)^5, y = w^5 and its
    # area ∫ (1 − x^(1/5))^5 dx = 5·B(5, 6) = 5·4!·5!/10! = 1/252, plus what 25 trapezoids over a convex curve add.
    area = divergence_area(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert area == pytest.approx(1 / 252, rel=0.05)
    assert area > 1 / 252


def test_equal_histograms_enclose_the_whole_square() -> None:
    assert divergence_area(np.array([0.5, 0.25, 0.25]), np.array([0.5, 0.25, 0.25])) == pytest.approx(1)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0])
def test_agrees_with_the_authors_own_within_the_noise_of_its_seeds(shift: float) -> None:
    oracle = pytest.importorskip("mauve", reason="mauve-text is GPL: never a dependency, here if you installed it")
    p, q = _texts(1, n=500), _texts(2, shift, n=500)
    theirs = [oracle.compute_mauve(p_features=p, q_features=q, seed=seed, verbose=False).mauve for seed in range(6)]
    ours = mauve(p, q, range(6))
    noise = np.hypot(np.std(theirs, ddof=1), np.std(ours, ddof=1))
    assert abs(np.mean(ours) - np.mean(theirs)) <= 2 * noise + 1e-6


def test_the_area_is_that_of_the_authors_own_curve() -> None:
    oracle = pytest.importorskip("mauve.compute_mauve", reason="mauve-text is GPL: an oracle, where you installed it")
    random = np.random.default_rng(0)
    for concentration in (0.05, 0.5, 5):
        p, q = random.dirichlet([concentration] * 50, size=2)
        curve = oracle.get_divergence_curve_for_multinomials(p, q, np.linspace(1e-6, 1 - 1e-6, 25), 5)
        x, y = curve.T
        order, other = np.argsort(x), np.argsort(y)
        expected = (np.trapezoid(y[order], x[order]) + np.trapezoid(x[other], y[other])) / 2
        assert divergence_area(p, q) == pytest.approx(expected, abs=1e-6)


def token_ids(count: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, 300, size=length).tolist() for length in random.integers(1, 40, size=count)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_causal_features_are_the_last_state_of_each_text_alone(
    architecture: str, new_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    network = locate_model(str(new_model(architecture=architecture)), Store(tmp_path)).load(torch.float32).eval()
    texts = token_ids(20)
    with torch.no_grad():
        alone = [network(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in texts]
    expected = torch.stack(alone).numpy()
    np.testing.assert_allclose(causal_features(network, texts), expected, atol=2e-5)
    monkeypatch.setattr(module, "BATCH_TOKENS", 60)  # other batches, the same features
    np.testing.assert_allclose(causal_features(network, texts), expected, atol=2e-5)


def test_causal_features_are_those_of_mauve_text(new_model: Callable[..., Path], tmp_path: Path) -> None:
    oracle = pytest.importorskip("mauve.utils", reason="mauve-text is GPL: an oracle, where you installed it")
    import torch

    network = locate_model(str(new_model(architecture="gpt2")), Store(tmp_path)).load(torch.float32).eval()
    texts = token_ids(12)
    theirs = oracle.featurize_tokens_from_model(network.base_model, [torch.tensor([ids]) for ids in texts], 5)
    np.testing.assert_allclose(causal_features(network, texts), theirs.numpy(), atol=2e-5)
