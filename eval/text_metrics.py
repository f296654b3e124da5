"""Figures of texts by themselves and against their target. Pure functions; one value per text wherever there is one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rep_n(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one: 1 − distinct / all; 0 for a text shorter than n.

    The seq-rep-n of Welleck et al. 2020, "Neural text generation with unlikelihood training", eq. 10.
    """
    grams = _n_grams(token_ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether a text ends in a phrase of two tokens or more that stands there at least three times in a row.

    The repetition of Holtzman et al. 2020, "The curious case of neural text degeneration", table 1. A single token six
    times in a row is a phrase of two three times; the phrase may be cut, as its last tokens then begin another.
    """
    ids = list(token_ids)
    return any(ids[-3 * size : -size] == ids[-2 * size :] for size in range(2, len(ids) // 3 + 1))


def distinct_n(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams of all texts together by their n-grams (Li et al. 2016): low where the texts are all alike.

    Falls with the number of texts, so only systems measured on the same prompts can be compared. 0 without n-grams.
    """
    grams = [gram for text in texts for gram in _n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def chrf(outputs: Sequence[str], targets: Sequence[str]) -> NDArray[np.float64]:
    """Sentence chrF2 (Popović 2015, by sacrebleu, 0 to 100) of each output against its target.

    What evaluation reports is the mean of these, not sacrebleu's corpus score, which pools the n-gram counts: the mean
    is a mean over examples, so its bootstrap interval is an interval of the figure shown.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    scores = [metric.sentence_score(output, [target]).score for output, target in zip(outputs, targets, strict=True)]
    return np.array(scores, np.float64)


def self_bleu(samples: Sequence[str]) -> float:
    """How alike several samples for one prompt are: mean sentence BLEU-4 of each against all others, 0 to 100.

    Zhu et al. 2018, "Texygen", by sacrebleu, with n-grams as long as the sample has them. High: the model says the same
    again and again; 100 where all are one text. Words are those between spaces. Needs two samples; `distinct_n` of the
    samples' token ids is the other figure of their diversity.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(set(samples)) == 1:
        return 100.0
    metric = BLEU(effective_order=True)
    others = [[*samples[:number], *samples[number + 1 :]] for number in range(len(samples))]
    scores = [metric.sentence_score(sample, rest).score for sample, rest in zip(samples, others, strict=True)]
    return float(np.mean(scores))


def _n_grams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
