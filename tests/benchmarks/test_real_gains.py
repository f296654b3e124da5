"""What `just results-real` says of seeds: what is decided, in which direction, and what is not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cpo_pipe.eval.statistics.significance import holm
from tests.support.real_experiment import Task, tasks
from tests.support.real_gains import Gain, Seed, answer, gains

PROMPTS = [f"p{number:03}" for number in range(200)]
METHODS = ["mle", "an", "mixnr"]


@pytest.fixture
def task() -> Task:
    return tasks(Path("m"), Path("t"), Path("u"), Path("q"), Path("q"))["text"]


def seed(number: int, method: Callable[[str], dict[str, float]], spread: float = 5.0) -> Seed:
    """A seed in which systems have given means, and prompts vary around them."""
    noise = np.random.default_rng(number)
    figures, values = {}, {}
    for system in ("ground-truth", *METHODS):
        means = {"rep-4": 0.15, "chrF": 18.0, "distinct-2": 0.7, "MAUVE": 0.9, "target NLL": 3.0} | method(system)
        for (decoding, metric), width in {
            ("greedy", "rep-4"): 0.1, ("greedy", "chrF"): spread, ("top-k", "chrF"): spread,
        }.items():  # fmt: skip
            drawn = noise.normal(0, width, len(PROMPTS))
            drawn += means[metric] - drawn.mean()
            values[system, decoding, metric] = dict(zip(PROMPTS, drawn, strict=True))
            figures[system, decoding, metric] = means[metric]
        for metric in ("distinct-2", "MAUVE"):
            figures[system, "top-k", metric] = means[metric] + noise.normal(0, 0.02)
        figures[system, "-", "target NLL"] = means["target NLL"]
    return Seed(figures, values)


def by_name(found: list[Gain]) -> dict[tuple[str, str, str], Gain]:
    return {(gain.method, gain.measure, gain.decoding): gain for gain in found}


def test_a_gain_over_prompts_and_seeds(task: Task) -> None:
    means = {"ground-truth": {"rep-4": 0.004}, "an": {"rep-4": 0.08, "chrF": 20.0, "target NLL": 3.02}}
    seeds = [seed(number, lambda system: means.get(system, {})) for number in (1, 2, 3)]
    found = gains(task, seeds, METHODS)
    assert len(found) == 2 * 5, "rep-4 and chrF greedy; distinct-2, chrF and MAUVE top-k"
    an = by_name(found)["an", "rep-4", "greedy"]
    assert an.mean == pytest.approx(0.07)
    assert an.low < 0.07 < an.high
    assert an.decided
    chrf = by_name(found)["an", "chrF", "greedy"]
    pairs = np.mean(
        [
            [one.values["an", "greedy", "chrF"][p] - one.values["mle", "greedy", "chrF"][p] for p in PROMPTS]
            for one in seeds
        ],
        0,
    )
    assert chrf.mean == pytest.approx(pairs.mean())
    plain = [gain.p for gain in found]
    assert chrf.p >= stats.ttest_1samp(pairs, 0).pvalue, "adjusted"
    assert max(plain) <= 1
    assert not by_name(found)["mixnr", "rep-4", "greedy"].decided
    text = answer("text", task, seeds, METHODS)
    assert (
        "beats MLE continued at equal steps in: rep-4 of AN under greedy, 0.15 → 0.08, targets 0.004 (+0.07 [" in text
    )
    assert "It is worse in none that is decided." in text
    assert "AN +0.020, MixNR +0.000" in text


def test_farther_from_the_text_is_worse_also_on_the_other_side(task: Task) -> None:
    means = {"ground-truth": {"rep-4": 0.3}, "an": {"rep-4": 0.05}}
    seeds = [seed(number, lambda system: means.get(system, {})) for number in (1, 2, 3)]
    an = by_name(gains(task, seeds, METHODS))["an", "rep-4", "greedy"]
    assert an.mean == pytest.approx(-0.1)
    assert an.low < -0.1 < an.high < 0
    assert "It is worse in: rep-4 of AN under greedy" in answer("text", task, seeds, METHODS)


def test_seeds_that_disagree_decide_nothing(task: Task) -> None:
    seeds = [seed(number, lambda system, chrf=chrf: {"chrF": chrf} if system == "an" else {})
             for number, chrf in ((1, 24.0), (2, 22.0), (3, 17.9))]  # fmt: skip
    an = by_name(gains(task, seeds, METHODS))["an", "chrF", "top-k"]
    assert an.p < 0.05
    assert not an.decided
    text = answer("text", task, seeds, METHODS)
    assert "does not beat MLE continued at equal steps in any measure" in text
    assert "not of the same sign with every seed: chrF of AN under " in text


def test_one_seed_pairs_prompts_and_leaves_corpus_measures_open(task: Task) -> None:
    found = by_name(gains(task, [seed(1, lambda system: {"chrF": 25.0} if system == "an" else {})], METHODS))
    assert found["an", "chrF", "greedy"].decided
    assert found["an", "MAUVE", "top-k"].p == 1.0
    assert np.isnan(found["an", "MAUVE", "top-k"].low)


def test_p_is_adjusted_for_all_comparisons(task: Task) -> None:
    seeds = [seed(number, lambda system: {"chrF": 18.9} if system == "an" else {}) for number in (1, 2, 3)]
    found = gains(task, seeds, METHODS)
    raw = []
    for gain in found:
        key = gain.decoding, gain.measure
        if ("an", *key) in seeds[0].values:
            pairs = np.mean([[one.values[gain.method, *key][p] - one.values["mle", *key][p] for p in PROMPTS]
                             for one in seeds], 0)  # fmt: skip
            raw.append(float(stats.ttest_1samp(pairs, 0).pvalue))
        else:
            raw.append(float(stats.ttest_1samp(gain.each, 0).pvalue))
    assert [gain.p for gain in found] == pytest.approx(holm(raw))
