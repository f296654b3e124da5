"""What seeds decide: by how much each method is better than MLE continued, paired by seed and by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.figures import ANY_DECODING
from cpo_pipe.eval.statistics.bootstrap import Values
from cpo_pipe.eval.statistics.paired import BOOTSTRAP, Key
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
BETTER = ("chrF", "MAUVE", "exact match")
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
    each: list[float]
    """By seed."""
    low: float
    """95% interval of the mean."""
    high: float
    p: float
    """Two-sided, adjusted (Holm) for all comparisons."""
    shown: str = ""
    """The baseline's mean, the method's, and of measures that should be near to it the ground truth's."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.each))

    @property
    def decided(self) -> bool:
        """Whether it is significant and has the same sign with every seed."""
        return self.p < SIGNIFICANCE and len({np.sign(one) for one in self.each}) == 1


def gains(task: Task, seeds: Sequence[Seed], methods: Sequence[str]) -> list[Gain]:
    """Compare each method with MLE continued in each measure that has a better side.

    Metrics that are means over prompts are paired by prompt, each prompt's difference averaged over seeds (bootstrap
    interval, Student's t-test); the others are paired by seed (both from Student's t).
    """
    found, ps = [], []
    for decoding, measures in task.measures.items():
        for measure in (name for name, _ in measures if name in NEAR + BETTER):
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
    each = np.abs(mle - truth) - np.abs(own - truth) if measure in NEAR else own - mle
    shown = f"{mle.mean():.3g} → {own.mean():.3g}" + (f", targets {truth.mean():.3g}" if measure in NEAR else "")
    sides = {*np.sign(own - truth), *np.sign(mle - truth)} if measure in NEAR else {-1.0}
    if len(sides) == 1 and (prompts := _by_prompt(seeds, method, measure, decoding)) is not None:
        prompts = prompts * -sides.pop()
        estimate = BOOTSTRAP.mean(prompts)
        low, high, p = estimate.low, estimate.high, stats.ttest_1samp(prompts, 0).pvalue if prompts.any() else 1.0
    elif len(seeds) > 1 and np.ptp(each) > 0:
        test = stats.ttest_1samp(each, 0)
        (low, high), p = test.confidence_interval(0.95), test.pvalue
    else:
        low, high, p = np.nan, np.nan, 1.0
    return Gain(method, measure, decoding, [*map(float, each)], float(low), float(high), 1.0, shown), float(p)


def _by_prompt(seeds: Sequence[Seed], method: str, measure: str, decoding: str) -> Values | None:
    """Return each prompt's difference to MLE continued, averaged over seeds."""
    differences = []
    for seed in seeds:
        own, mle = (seed.values.get((system, decoding, measure), {}) for system in (method, BASELINE))
        if not own or own.keys() != mle.keys():
            return None
        differences.append([own[example] - mle[example] for example in sorted(own)])
    return np.mean(differences, axis=0)


def answer(name: str, task: Task, seeds: Sequence[Seed], methods: Sequence[str]) -> str:
    """Return what the seeds decide, in a paragraph: where a method is better than MLE continued, and where worse."""
    found = gains(task, seeds, methods)
    better = [gain for gain in found if gain.decided and gain.mean > 0]
    worse = [gain for gain in found if gain.decided and gain.mean < 0]
    split = [gain for gain in found if not gain.decided and gain.p < SIGNIFICANCE]
    undecided = [gain for gain in found if gain.p >= SIGNIFICANCE]
    costs = []
    for method in (one for one in methods if one != BASELINE):
        each = [seed.value(method, ANY_DECODING, "target NLL") - seed.value(BASELINE, ANY_DECODING, "target NLL")
                for seed in seeds]  # fmt: skip
        costs.append(f"{LABELS[method]} {np.mean(each):+.3f}")
    number = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {task.test_rows} test prompts"
    return " ".join(filter(None, [
        f"**{name}** ({number}, {STEPS} steps of {BATCH} prompts from the same reference).",
        f"Contrastive training beats MLE continued at equal steps in: {_listed(better)}." if better else
        "Contrastive training does not beat MLE continued at equal steps in any measure.",
        f"It is worse in: {_listed(worse)}." if worse else "It is worse in none that is decided.",
        f"Significant over prompts, but not of the same sign with every seed: {_listed(split)}." if split else "",
        f"Not decided: {len(undecided)} of {len(found)} comparisons ({_grouped(undecided)})." if undecided else "",
        f"Nats per token of the targets, against MLE continued: {', '.join(costs)}.",
    ]))  # fmt: skip


def _listed(found: Sequence[Gain]) -> str:
    parts = []
    for gain in found:
        each = ", ".join(f"{one:+.2g}" for one in gain.each)
        interval = f"{gain.mean:+.2g} [{gain.low:+.2g}, {gain.high:+.2g}], each seed {each}"
        parts.append(f"{gain.measure} of {LABELS[gain.method]} under {gain.decoding}, {gain.shown} ({interval})")
    return "; ".join(parts)


def _grouped(found: Sequence[Gain]) -> str:
    groups: dict[str, list[str]] = {}
    for gain in found:
        groups.setdefault(f"{gain.measure} under {gain.decoding}", []).append(LABELS[gain.method])
    return "; ".join(f"{what}: {', '.join(methods)}" for what, methods in groups.items())
