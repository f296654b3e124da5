"""Win rates of the systems against the baseline or another system, and the judges' position bias."""

from collections.abc import Iterable, Sequence

from cpo_pipe.eval.generate import Outputs
from cpo_pipe.eval.judges.base import Judgement
from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.statistics.bootstrap import share
from cpo_pipe.eval.statistics.length_control import length_controlled

OUTCOME = {"a": 1.0, "tie": 0.5, "b": 0.0}

JUDGED = {
    "win": "share of the examples on which the judge prefers the system",
    "tie": "share of the examples on which the judge prefers neither",
    "loss": "share of the examples on which the judge prefers the baseline",
    "win rate": "wins and half of the ties, 0 to 1; above 0.5 is better than the baseline",
    "position bias": "share of the verdicts with a winner that prefer the output shown first; 0.5 is no bias",
    "flip rate": "share of the pairs whose verdict changes with the order in which the outputs are shown",
    "unparseable": "share of the answers that are no verdict; each counts as a tie",
    "length-controlled win rate": "the win rate that a logistic model of outcome and length predicts for equal "
    "length, after AlpacaEval 2.0; needs 100 examples, and is missing if one system writes more on 85% of them",
}
"""A judge's metrics; their names follow the judge's."""


def comparison_metrics(judge: str, opponent: str | None = None) -> tuple[str, str, str, str]:
    """Return the names of a judge's shares of wins, ties and losses and of its win rate, in which a tie counts half.

    Args:
        judge: the judge's name.
        opponent: the other system, if it is not the baseline.
    """
    against = f" against {opponent}" if opponent is not None else ""
    return f"{judge} win{against}", f"{judge} tie{against}", f"{judge} loss{against}", f"{judge} win rate{against}"


def length_controlled_metric(judge: str) -> str:
    """Return the name of a judge's win rate at equal length."""
    return f"{judge} length-controlled win rate"


def win_metrics(judges: Iterable[str], opponents: Iterable[str]) -> set[str]:
    """Return the names of the win rates of some judges, against the baseline and other opponents."""
    opponents = [*opponents]
    names = {name for judge in judges for whom in (None, *opponents) for name in comparison_metrics(judge, whom)}
    return names | {length_controlled_metric(judge) for judge in judges}


def measure_wins(
    figures: Figures,
    judge: str,
    judgements: Sequence[Judgement],
    system: str,
    decoding: str,
    outputs: Outputs,
    other: Outputs,
    opponent: str | None = None,
) -> None:
    """Add how often a judge prefers the system's output, a of each judgement, to the other.

    The other outputs are those of `opponent`; None is the baseline, against which the win rate at equal length is added
    where the examples determine it.
    """
    outcomes = [OUTCOME[judgement.winner] for judgement in judgements]
    shares = figures.bootstrap.compare(outcomes)
    names = comparison_metrics(judge, opponent)
    for name, estimate in zip(names, (shares.win, shares.tie, shares.loss, shares.rate), strict=True):
        figures.add(system, decoding, name, estimate)
    figures.keep(system, decoding, names[-1], outcomes)
    if opponent is None:
        longer = [len(a) - len(b) for a, b in zip(outputs.texts, other.texts, strict=True)]
        if (rate := length_controlled(outcomes, longer, figures.bootstrap)) is not None:
            figures.add(system, decoding, length_controlled_metric(judge), rate)


def measure_order(figures: Figures, judge: str, system: str, decoding: str, judgements: Sequence[Judgement]) -> None:
    """Add how far a judge depends on the order in which it is shown outputs, over the examples that tell."""
    named = [judgement.for_first for judgement in judgements if judgement.for_first[1]]
    if named:
        first, winners = zip(*named, strict=True)
        figures.add(system, decoding, f"{judge} position bias", figures.bootstrap.ratio(first, winners))
    if flipped := [judgement.flipped for judgement in judgements if judgement.flipped is not None]:
        figures.add(system, decoding, f"{judge} flip rate", share(flipped))
    if unread := [judgement.unparseable for judgement in judgements if judgement.unparseable is not None]:
        figures.add(system, decoding, f"{judge} unparseable", figures.bootstrap.mean(unread))
