import numpy as np
import pytest
from numpy.typing import NDArray

from cpo_pipe.eval.mauve import divergence_area, mauve

SEEDS = (0, 1, 2)
CENTRES = np.random.default_rng(0).normal(size=(20, 16))


def _texts(seed: int, shift: float = 0.0, n: int = 300) -> NDArray[np.float32]:
    """Features in 20 clumps, all moved by `shift`."""
    random = np.random.default_rng(seed)
    return (CENTRES[random.integers(20, size=n)] + random.normal(size=(n, 16)) * 0.7 + shift).astype(np.float32)


def test_the_same_texts_score_1() -> None:
    texts = _texts(1)
    score = mauve(texts, texts, SEEDS)
    assert score.mean == pytest.approx(1, abs=1e-6)


def test_texts_with_nothing_in_common_score_next_to_0() -> None:
    assert mauve(_texts(1), -3 * _texts(2, shift=4), SEEDS).mean < 0.02


def test_the_score_falls_with_the_distance() -> None:
    scores = [mauve(_texts(1), _texts(2, shift), SEEDS).mean for shift in (0, 0.3, 0.6, 1.2)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9


def test_seeds_decide_the_score() -> None:
    one, two = _texts(1), _texts(2, 0.3)
    assert mauve(one, two, SEEDS) == mauve(one, two, SEEDS)
    assert mauve(one, two, SEEDS).sd != 0
    assert mauve(one, two, [0]).sd is None


def test_disjoint_histograms_by_hand() -> None:
    # P and Q in different bins: KL(Q|R) = −ln(1 − w), KL(P|R) = −ln w, so the curve is x = (1 − w)^5, y = w^5 and its
    # area ∫ (1 − x^(1/5))^5 dx = 5·B(5, 6) = 5·4!·5!/10! = 1/252, plus what 25 trapezoids over a convex curve add.
    area = divergence_area(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert area == pytest.approx(1 / 252, rel=0.05)
    assert area > 1 / 252


def test_equal_histograms_enclose_the_whole_square() -> None:
    assert divergence_area(np.array([0.5, 0.25, 0.25]), np.array([0.5, 0.25, 0.25])) == pytest.approx(1)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3, 1.0])
def test_agrees_with_the_authors_own_within_the_noise_of_its_seeds(shift: float) -> None:
    oracle = pytest.importorskip("mauve", reason="mauve-text is GPL: never a dependency, here if you installed it")
    p, q = _texts(1, n=500), _texts(2, shift, n=500)
    theirs = [oracle.compute_mauve(p_features=p, q_features=q, seed=seed, verbose=False).mauve for seed in range(6)]
    ours = mauve(p, q, range(6))
    assert ours.sd is not None
    noise = np.hypot(np.std(theirs, ddof=1), ours.sd)
    assert abs(ours.mean - np.mean(theirs)) <= 2 * noise + 1e-6
