"""What seeds decide: by how much each method is better than MLE continued, paired by seed and by prompt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.figures import ANY_DECODING
from cpo_pipe.eval.statistics.bootstrap import Values
from cpo_pipe.eval.statistics.paired import Key
from cpo_pipe.eval.statistics.significance import SIGNIFICANCE, holm
from tests.support.real_experiment import BATCH, STEPS, Task

BASELINE = "mle"
LABELS = {
    "mle": "MLE continued",
    "an": "AN",
    "anr": "ANR",
    "dpo": "DPO",
    "mixnr": "MixNR",
    "bnr": "BNR",
    "slic": "SLiC",
}
NEAR = ("distinct-2", "rep-4")
"""Measures in which the system is better that is nearer to the ground truth."""
MORE = ("chrF", "MAUVE", "exact match")
"""Measures in which more is better."""


@dataclass(frozen=True)
class Seed:
    """What one seed measured."""

    figures: Mapping[Key, float]
    values: Mapping[Key, Mapping[str, float]]
    """By example, of the metrics that are means over examples."""

    def value(self, system: str, decoding: str, metric: str) -> float:
        """Return a figure, also one that depends on no decoding; NaN where it was not measured."""
        keys = ((system, decoding, metric), (system, ANY_DECODING, metric))
        return next((self.figures[key] for key in keys if key in self.figures), np.nan)


@dataclass(frozen=True)
class Gain:
    """By how much a method is better than MLE continued in a measure."""

    method: str
    measure: str
    decoding: str
    means: Mapping[str, float]
    """Of the measure, over seeds: of the method, of MLE continued and of the ground truth."""
    each: list[float]
    """By seed."""
    low: float
    """95% interval of the mean."""
    high: float
    p: float
    """Two-sided, adjusted (Holm) for all comparisons."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.each))

    @property
    def decided(self) -> bool:
        """Whether it is significant."""
        return self.p < SIGNIFICANCE


def gains(task: Task, seeds: Sequence[Seed], methods: Sequence[str]) -> list[Gain]:
    """Compare each method with MLE continued in each measure that has a better side.

    The variance of a mean adds that over seeds and, of metrics that are means over prompts, that over prompts: the
    conservative form of the two-way clustered variance (Cameron, Gelbach and Miller 2011), which would subtract what
    both contain. Student's t with the degrees of freedom of Welch and Satterthwaite; one seed decides nothing.
    """
    found, ps = [], []
    for decoding, measures in task.measures.items():
        for measure in (name for name, _ in measures if name in NEAR + MORE):
            for method in (one for one in methods if one != BASELINE):
                gain, p = _gain(seeds, method, measure, decoding)
                found.append(gain)
                ps.append(p)
    adjusted = holm(ps)
    return [replace(gain, p=p) for gain, p in zip(found, adjusted, strict=True)]


def _gain(seeds: Sequence[Seed], method: str, measure: str, decoding: str) -> tuple[Gain, float]:
    own, mle, truth = (
        np.array([seed.value(system, decoding, measure) for seed in seeds])
        for system in (method, BASELINE, GROUND_TRUTH)
    )
    means = {method: float(own.mean()), BASELINE: float(mle.mean()), GROUND_TRUTH: float(truth.mean())}
    each = np.abs(mle - truth) - np.abs(own - truth) if measure in NEAR else own - mle
    gain = Gain(method, measure, decoding, means, [*map(float, each)], np.nan, np.nan, 1.0)
    if len(seeds) < 2:
        return gain, 1.0
    samples = [each]
    if (prompts := _by_prompt(seeds, method, measure, decoding)) is not None:
        samples.append(prompts)
    variances = [np.var(sample, ddof=1) / len(sample) for sample in samples]
    if not (total := sum(variances)):
        return gain, 1.0
    freedom = total**2 / sum(of**2 / (len(sample) - 1) for of, sample in zip(variances, samples, strict=True))
    margin = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    p = 2 * stats.t.sf(abs(each.mean()) / np.sqrt(total), freedom)
    return replace(gain, low=float(each.mean() - margin), high=float(each.mean() + margin)), float(p)


def _by_prompt(seeds: Sequence[Seed], method: str, measure: str, decoding: str) -> Values | None:
    """Return each prompt's difference to MLE continued, averaged over seeds."""
    differences = []
    for seed in seeds:
        own, mle = (seed.values.get((system, decoding, measure), {}) for system in (method, BASELINE))
        if not own or own.keys() != mle.keys():
            return None
        differences.append([own[example] - mle[example] for example in sorted(own)])
    return np.mean(differences, axis=0)


def answer(task: Task, seeds: Sequence[Seed], methods: Sequence[str]) -> Iterator[str]:
    """Yield what the seeds decide: where methods beat MLE continued and where not, in a paragraph and in a table."""
    found = gains(task, seeds, methods)
    digits = {(measure, shown): of for shown, measures in task.measures.items() for measure, of in measures}
    columns = [*dict.fromkeys((gain.measure, gain.decoding) for gain in found)]
    trained = [method for method in methods if method != BASELINE]
    costs = {method: np.mean([seed.value(method, ANY_DECODING, "target NLL")
                              - seed.value(BASELINE, ANY_DECODING, "target NLL") for seed in seeds])
             for method in trained}  # fmt: skip
    better, worse = ([gain for gain in found if gain.decided and gain.mean * sign > 0] for sign in (1, -1))
    alone = [gain for gain in found if not gain.decided and gain.low * gain.high > 0]
    number = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {task.test_rows} test prompts"
    yield (
        f"At equal steps ({STEPS} of {BATCH} prompts; {number}) contrastive training is better than MLE continued "
        f"{_told(better, digits, len(found))}, and worse {_told(worse, digits, len(found))}; "
        f"{len(found) - len(better) - len(worse)} are undecided. That is after Holm's adjustment for {len(found)} "
        f"comparisons. Taken alone, the 95% interval of the difference excludes 0 {_told(alone, digits, len(found))}; "
        f"by chance, one in twenty would. The targets' NLL changes by {min(costs.values()):+.3f} to "
        f"{max(costs.values()):+.3f} nats per token.\n"
    )
    yield "Better than MLE continued by how much, with 95% intervals; **decided**:\n"
    yield f"| | {' | '.join(f'{measure}, {decoding}' for measure, decoding in columns)} | change in target NLL |"
    yield f"| --- |{' ---: |' * (len(columns) + 1)}"
    by_key = {(gain.method, gain.measure, gain.decoding): gain for gain in found}
    for method in trained:
        cells = [_cell(by_key[method, *column], digits[column]) for column in columns]
        yield f"| {LABELS[method]} | {' | '.join(cells)} | {costs[method]:+.3f} |"
    yield ""


def _cell(gain: Gain, digits: int) -> str:
    value = f"{gain.mean:+.{digits}f}"
    if np.isnan(gain.low):
        return value
    interval = f"[{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]"
    return f"**{value}** {interval}" if gain.decided else f"{value} {interval}"


def _told(found: Sequence[Gain], digits: Mapping[tuple[str, str], int], of: int) -> str:
    """As in: in 2 of 9 comparisons (chrF under greedy, 17.0 → 18.4 with AN, 17.9 with DPO)."""
    if not found:
        return "in none"
    groups: dict[tuple[str, str], list[Gain]] = {}
    for gain in found:
        groups.setdefault((gain.measure, gain.decoding), []).append(gain)
    parts = []
    for (measure, decoding), group in groups.items():
        shown = f".{digits[measure, decoding]}f"
        means = ", ".join(f"{gain.means[gain.method]:{shown}} with {LABELS[gain.method]}" for gain in group)
        truth = f"; ground truth {group[0].means[GROUND_TRUTH]:{shown}}" if measure in NEAR else ""
        parts.append(f"{measure} under {decoding}, {group[0].means[BASELINE]:{shown}} → {means}{truth}")
    return f"in {len(found)} of {of} comparisons ({'; '.join(parts)})"
