"""What `just results-real` says of seeds: what is decided, in which direction, and what is not."""

from collections.abc import Callable
from dataclasses import replace
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


def told(task: Task, seeds: list[Seed]) -> tuple[str, dict[str, list[str]]]:
    """The paragraph, and the cells of the table by method."""
    text, *lines = answer(task, seeds, METHODS)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return text, {name: cells for name, *cells in rows}


def test_a_gain_over_prompts_and_seeds(task: Task) -> None:
    means = {"ground-truth": {"rep-4": 0.004}, "an": {"rep-4": 0.08, "chrF": 20.0, "target NLL": 3.02}}
    seeds = [seed(number, lambda system: means.get(system, {})) for number in (1, 2, 3)]
    found = gains(task, seeds, METHODS)
    assert len(found) == 2 * 5, "rep-4 and chrF greedy; distinct-2, chrF and MAUVE top-k"
    an = by_name(found)["an", "rep-4", "greedy"]
    assert an.mean == pytest.approx(0.07)
    assert an.low < 0.07 < an.high
    assert an.decided
    assert not by_name(found)["mixnr", "rep-4", "greedy"].decided
    text, table = told(task, seeds)
    assert (
        "is better than MLE continued in 3 of 10 comparisons (rep-4 under greedy, 0.150 → 0.080 with AN; ground truth "
        "0.004; chrF under greedy, 18.0 → 20.0 with AN; chrF under top-k, 18.0 → 20.0 with AN), and worse in none; "
        "7 are undecided." in text
    )
    assert (
        "after Holm's adjustment for 10 comparisons. Taken alone, the 95% interval of the difference excludes 0 in "
        "none; by chance" in text
    )
    assert "NLL changes by +0.000 to +0.020 nats per token." in text
    assert "".join(table["AN"]).count("**") == 6, "three cells in bold"
    assert table["AN"][0].startswith("**+0.070** [+0.0")
    assert table["AN"][-1] == "+0.020"
    assert "**" not in table["MixNR"][0]


def test_farther_from_the_text_is_worse_also_on_the_other_side(task: Task) -> None:
    means = {"ground-truth": {"rep-4": 0.3}, "an": {"rep-4": 0.05}}
    seeds = [seed(number, lambda system: means.get(system, {})) for number in (1, 2, 3)]
    an = by_name(gains(task, seeds, METHODS))["an", "rep-4", "greedy"]
    assert an.mean == pytest.approx(-0.1)
    assert an.low < -0.1 < an.high < 0
    text, table = told(task, seeds)
    assert "worse in 1 of 10 comparisons (rep-4 under greedy, 0.150 → 0.050 with AN; ground truth 0.300)" in text
    assert table["AN"][0].startswith("**-0.100** [-0.1")


def test_seeds_that_disagree_decide_nothing(task: Task) -> None:
    seeds = [seed(number, lambda system, chrf=chrf: {"chrF": chrf} if system == "an" else {})
             for number, chrf in ((1, 24.0), (2, 22.0), (3, 17.9))]  # fmt: skip
    an = by_name(gains(task, seeds, METHODS))["an", "chrF", "top-k"]
    assert an.mean == pytest.approx(3.3)
    assert an.low < 0 < an.high
    text, table = told(task, seeds)
    assert "is better than MLE continued in none, and worse in none; 10 are undecided." in text
    assert "**" not in table["AN"][3]


def test_one_seed_decides_nothing(task: Task) -> None:
    found = gains(task, [seed(1, lambda system: {"chrF": 25.0} if system == "an" else {})], METHODS)
    assert {gain.p for gain in found} == {1.0}
    assert np.isnan([gain.low for gain in found]).all()


def of_differences(differences: np.ndarray) -> list[Seed]:
    """Seeds (rows) and prompts (columns) with given differences of AN's chrF under greedy to MLE continued."""
    seeds = []
    for row in differences:
        values = {("an", "greedy", "chrF"): row, ("mle", "greedy", "chrF"): 0 * row}
        by_prompt = {key: dict(zip(PROMPTS, map(float, of), strict=False)) for key, of in values.items()}
        seeds.append(Seed({key: float(of.mean()) for key, of in values.items()}, by_prompt))
    return seeds


def chrf_of(differences: np.ndarray, task: Task) -> Gain:
    """The only comparison, so nothing is adjusted."""
    one = replace(task, measures={"greedy": [("chrF", 1)]})
    (found,) = gains(one, of_differences(differences), ["mle", "an"])
    return found


def test_without_noise_over_prompts_seeds_decide(task: Task) -> None:
    each = np.array([0.3, 0.5, 1.1, 0.9])
    found = chrf_of(np.tile(each[:, None], 20), task)
    test = stats.ttest_1samp(each, 0)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_without_noise_over_seeds_prompts_decide(task: Task) -> None:
    each = np.random.default_rng(0).normal(0.4, 1, 50)
    found = chrf_of(np.tile(each, (3, 1)), task)
    test = stats.ttest_1samp(each, 0)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


@pytest.mark.parametrize(("over_seeds", "over_prompts"), [(0.3, 0.0), (0.0, 2.0), (0.3, 2.0)])
def test_without_a_difference_at_most_one_in_twenty_is_decided(
    over_seeds: float, over_prompts: float, task: Task
) -> None:
    noise = np.random.default_rng(0)
    ps = []
    for _ in range(400):
        seeds, prompts = noise.normal(0, over_seeds, (3, 1)), noise.normal(0, over_prompts, (1, 40))
        ps.append(chrf_of(seeds + prompts + noise.normal(0, 2, (3, 40)), task).p)
    rejected = int((np.array(ps) < 0.05).sum())
    assert stats.binomtest(rejected, len(ps), 0.05, alternative="greater").pvalue > 0.01


def test_p_is_adjusted_for_all_comparisons(task: Task) -> None:
    seeds = [seed(number, lambda system: {"chrF": 18.9} if system == "an" else {}) for number in (1, 2, 3)]
    found = gains(task, seeds, METHODS)
    alone = {}
    for decoding, measures in task.measures.items():
        for measure in measures:
            for method in ("an", "mixnr"):
                one = replace(task, measures={decoding: [measure]})
                alone |= {key: gain.p for key, gain in by_name(gains(one, seeds, ["mle", method])).items()}
    keys = list(by_name(found))
    assert [gain.p for gain in found] == pytest.approx(holm([alone[key] for key in keys]))
