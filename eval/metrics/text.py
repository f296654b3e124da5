"""Metrics of texts by themselves and against their targets: repetition, diversity, length, overlap, likelihood."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.progress import track
from cpo_pipe.eval.generate import Outputs
from cpo_pipe.eval.metrics.figures import ANY_DECODING, Figures
from cpo_pipe.eval.statistics.bootstrap import CONFIDENCE, Estimate, Values

Texts = Sequence[Sequence[int]]

TEXT_METRICS = {
    "rep-4": "share of a text's 4-grams that repeat an earlier one, 0 to 1; closer to the ground truth's is better",
    "repetition loops": "share of the outputs that end in a phrase of two or more tokens repeated three times; lower "
    "is better",
    **{
        f"distinct-{n}": f"distinct {n}-grams divided by all {n}-grams of all outputs together, 0 to 1; low: the "
        "outputs are alike"
        for n in (1, 2, 3)
    },
    "self-BLEU": "mean BLEU of each of a prompt's samples against its other samples, 0 to 100; high: the samples are "
    "alike",
    "distinct-2 of samples": "distinct bigrams divided by all bigrams of a prompt's samples, 0 to 1; low: they are "
    "alike",
    "length": "tokens of an output, without the end token",
    "chrF": "mean sentence chrF2 against the target, 0 to 100; higher is better",
    "target NLL": "negative log-likelihood of the targets' tokens, nats per token; lower is better",
    "target perplexity": "exponential of target NLL; lower is better",
}


def measure_text(figures: Figures, system: str, decoding: str, outputs: Outputs) -> None:
    """Add repetition, diversity and length."""
    figures.add_mean(system, decoding, "rep-4", [rep_n(ids, 4) for ids in outputs.token_ids])
    figures.add_share(system, decoding, "repetition loops", [ends_in_loop(ids) for ids in outputs.token_ids])
    for n in (1, 2, 3):
        figures.add(system, decoding, f"distinct-{n}", distinct_estimate(outputs.token_ids, n))
    figures.add_mean(system, decoding, "length", [len(ids) for ids in outputs.token_ids])


def measure_diversity(figures: Figures, system: str, decoding: str, samples: Sequence[Outputs]) -> None:
    """Add how alike the samples of a prompt are, over the prompts that have at least two."""
    several = [outputs for outputs in samples if len(outputs.texts) > 1]
    if not several:
        return
    bleu = []
    with track(f"self-BLEU of {system}, {decoding}", len(several), "prompts") as meter:
        for outputs in several:
            bleu.append(self_bleu(outputs.texts))
            meter.advance()
    figures.add(system, decoding, "self-BLEU", figures.bootstrap.mean(bleu))
    distinct = [distinct_n(outputs.token_ids, 2) for outputs in several]
    figures.add(system, decoding, "distinct-2 of samples", figures.bootstrap.mean(distinct))


def measure_overlap(figures: Figures, system: str, decoding: str, outputs: Outputs, targets: Outputs) -> None:
    """Add the overlap of characters with the target."""
    figures.add_mean(system, decoding, "chrF", chrf(outputs.texts, targets.texts).tolist())


def measure_likelihood(figures: Figures, system: str, logprobs: Sequence[tuple[float, int]]) -> None:
    """Add the targets' negative log-likelihood per token and its exponential.

    Args:
        figures: where to add them.
        system: the system.
        logprobs: each target's summed log-probability, in nats, and its number of tokens.
    """
    nats, tokens = np.array([-logprob for logprob, _ in logprobs]), np.array([count for _, count in logprobs])
    nll = figures.bootstrap.ratio(nats, tokens)
    figures.add(system, ANY_DECODING, "target NLL", nll)
    figures.add(system, ANY_DECODING, "target perplexity", nll.exp())
    figures.keep(system, ANY_DECODING, "target NLL", (nats / tokens).tolist())


def rep_n(token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of a text's n-grams that repeat an earlier one: 1 − distinct / all; 0 for fewer than n tokens.

    The seq-rep-n of Welleck et al. 2020, "Neural text generation with unlikelihood training", eq. 10.
    """
    grams = n_grams(token_ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Return whether a text ends in a phrase of at least two tokens that is repeated at least three times in a row.

    The repetition of Holtzman et al. 2020, "The curious case of neural text degeneration", table 1. A single token six
    times in a row is a phrase of two three times; the phrase may be cut, as its last tokens then begin another.
    """
    ids = list(token_ids)
    return any(ids[-3 * size : -size] == ids[-2 * size :] for size in range(2, len(ids) // 3 + 1))


def chrf(outputs: Sequence[str], targets: Sequence[str]) -> NDArray[np.float64]:
    """Return the sentence chrF2 (Popović 2015, by sacrebleu, 0 to 100) of each output against its target.

    Evaluation reports the mean of these, not sacrebleu's corpus score, which pools the n-gram counts: the bootstrap
    over examples gives an interval of the mean.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    scores = [metric.sentence_score(output, [target]).score for output, target in zip(outputs, targets, strict=True)]
    return np.array(scores, np.float64)


def self_bleu(samples: Sequence[str]) -> float:
    """Return the mean sentence BLEU-4 of each sample of a prompt against all others, 0 to 100.

    Zhu et al. 2018, "Texygen", by sacrebleu, with n-grams no longer than the sample. High values mean that the samples
    are alike; 100 if all are one text. Words are separated by spaces. Needs two samples.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(set(samples)) == 1:
        return 100.0
    metric = BLEU(effective_order=True)
    others = [[*samples[:number], *samples[number + 1 :]] for number in range(len(samples))]
    scores = [metric.sentence_score(sample, rest).score for sample, rest in zip(samples, others, strict=True)]
    return float(np.mean(scores))


def n_grams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return the n-grams of a text, repeated ones included."""
    return [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]


def distinct_n(texts: Texts, n: int = 2) -> float:
    """Return distinct n-grams divided by all n-grams of all texts together (Li et al. 2016); 0 without n-grams.

    Low values mean that the texts are alike. The value falls with the number of texts, so that only systems measured on
    the same prompts can be compared.
    """
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_estimate(texts: Texts, n: int) -> Estimate:
    """Return `distinct_n` with its jackknife interval over texts.

    A bootstrap would be wrong here: a text that is drawn twice has no distinct n-gram of its own.
    """
    value, without = distinct_n(texts, n), leave_one_out(texts, n)
    low, high = jackknife(value, without)
    return Estimate(value, low, high, len(texts))


def leave_one_out(texts: Texts, n: int) -> Values:
    """Return `distinct_n` of all texts but one, for each of them."""
    grams = [Counter(n_grams(text, n)) for text in texts]
    holders = Counter(gram for counted in grams for gram in counted)
    own = np.array([sum(holders[gram] == 1 for gram in counted) for counted in grams], np.float64)
    totals = np.array([counted.total() for counted in grams], np.float64)
    rest = totals.sum() - totals
    left: Values = np.divide(len(holders) - own, rest, out=np.zeros_like(rest), where=rest > 0)
    return left


def jackknife(value: float, without: Values) -> tuple[float | None, float | None]:
    """Return the 95% interval of a statistic from its values without each example; None for a single example."""
    from scipy.stats import norm

    count = len(without)
    if count < 2:
        return None, None
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    half = float(norm.ppf((1 + CONFIDENCE) / 2) * error)
    return value - half, value + half
