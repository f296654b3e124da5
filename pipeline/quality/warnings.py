"""Warnings about negatives: what is wrong with them, what it means for a training, and what to change."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from cpo_pipe.pipeline.negatives.config import TARGET
from cpo_pipe.pipeline.quality.schema import ALL

EASY = 0.9
"""A rule that reads no text (the longer one, the likelier one) is right or wrong in more than this share of pairs, so
that at most one pair in ten teaches anything else."""
LOST = 0.5
"""Share of samples that are copies or duplicates above which most of the sampling is wasted."""
ALONE = 0.1
"""Share of groups without a negative. They leave the listwise loss, and not at random: they are the prompts that the
generator answers best."""
RATIO = (0.5, 2.0)
"""Median length of negatives divided by the target's. Outside, rewards differ by length alone: they are sums over
tokens."""
UNENDED = 0.5
"""Share of negatives without an end token above which this token alone separates most negatives from the targets."""
TRUNCATED = 0.01
"""Share of texts longer than the ranking model's window."""
TIED = 0.1
"""Share of negatives without a place of their own in the order."""
POOR = 0.5
"""distinct-2 of the negatives divided by that of the targets, below which half of the variety is lost."""


def quality_warnings(table: pa.Table) -> Iterator[str]:
    """Yield the warnings, one sentence each, that the figures (QUALITY schema) give rise to."""
    rows = {row["strategy"]: row for row in table.to_pylist()}
    target, together = rows.pop(TARGET), rows.pop(ALL)
    for name, row in rows.items():
        for sentences in (_wasted(row), _length(row, target), _likelihood(row), _variety(row), _order(row, target)):
            yield from (f"{name}: {sentence}" for sentence in sentences)
    if (together["alone"] or 0) > ALONE:
        yield (
            f"{together['alone']:.0%} of the groups have no negative left (K = 1) and leave the listwise loss: "
            "training sees only the prompts that the generator finds hard; raise count or temperature of a source, or "
            "add a source that does not copy the target, such as batch."
        )


def _wasted(row: Mapping[str, Any]) -> Iterator[str]:
    if (row["copies"] or 0) > LOST:
        yield (
            f"{row['copies']:.0%} of the negatives are copies of the target: the generator knows these answers, and "
            "groups shrink (or, with rank.drop_duplicates: false, the target is trained against itself); raise its "
            "temperature or top_k, or use another strategy."
        )
    if (row["correct"] or 0) > LOST:
        yield (
            f"{row['correct']:.0%} of the negatives are correct answers and are dropped: groups shrink to the prompts "
            "that the generator finds hard; raise its count, or add a source of wrong answers, such as batch."
        )
    if (row["duplicates"] or 0) > LOST:
        yield (
            f"{row['duplicates']:.0%} of the negatives repeat another one of their group: K stays far below what the "
            "recipe asks for; raise its temperature or top_k, or lower its count."
        )


def _length(row: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    unended, ratio = row["unended"] or 0, 1 if row["length_ratio"] is None else row["length_ratio"]
    stops, limit = "use a generator that was trained on such targets", "raise its max_new_tokens"
    if unended > UNENDED >= target["unended"]:
        yield (
            f"{unended:.0%} of the negatives have no end token, {target['unended']:.0%} of the targets have none: this "
            f"token alone separates them, and training teaches to stop early; {limit if ratio < 1 else stops}."
        )
    if not RATIO[0] <= ratio <= RATIO[1]:
        yield (
            f"the median negative has {ratio:.2f} times the length of its target: rewards are sums over tokens, so "
            "they depend on the longer text; set train.*.length_normalize, or use negatives of the target's length "
            "(meanfield)."
        )
    if _is_easy(row["longer"]):
        rule, change = ("longer", f"{limit} if they reach the limit") if row["longer"] > EASY else ("shorter", stops)
        yield (
            f"the {rule} one is the target in {_share(row['longer'])} of the pairs: training can succeed by length "
            f"alone, and teaches to write {rule} texts; {change}, or keep few of them beside other sources."
        )


def _likelihood(row: Mapping[str, Any]) -> Iterator[str]:
    # A sum over tokens follows the length: where length separates the pairs, only the mean per token says more.
    rules = ["likelier_per_token"] if _is_easy(row["longer"]) else ["likelier", "likelier_per_token"]
    rule = next((rule for rule in rules if _is_easy(row[rule])), None)
    if rule is None:
        return
    share, likelier = row[rule], rule.replace("_", " ")
    if share > EASY:
        yield (
            f"the reference model already finds the target {likelier} in {_share(share)} of the pairs: training can "
            "succeed by raising its confidence in what it prefers already; use harder negatives (autoregressive, with "
            "a lower temperature or top_k), or keep few of them beside other sources."
        )
    else:
        yield (
            f"the reference model finds the negative {likelier} in {_share(share)} of the pairs, as text cut by top_k, "
            "top_p or a low temperature is: training can succeed by making likely text less likely. Under a decoder "
            "that cuts likewise this gives diversity back, at the price of likelihood (set train.*.mle_weight); for "
            "other decoders raise its temperature or top_k (0 is the model's own distribution)."
        )


def _is_easy(share: float | None) -> bool:
    """Return whether a rule, or its opposite, is nearly always right."""
    return share is not None and not 1 - EASY <= share <= EASY


def _share(share: float) -> str:
    return f"{max(share, 1 - share):.0%}"


def _variety(row: Mapping[str, Any]) -> Iterator[str]:
    own, targets = row["distinct_2"], row["target_distinct_2"]
    if own is not None and targets is not None and own < POOR * targets:
        yield (
            f"distinct-2 is {own:.2f}, the targets' is {targets:.2f}: the negatives repeat the same phrases, and "
            "training can succeed by avoiding these; raise its temperature or top_k, or mix strategies."
        )


def _order(row: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    own, targets = row["truncated"] or 0, target["truncated"] or 0
    if max(own, targets) > TRUNCATED:
        yield (
            f"{own:.1%} of the negatives and {targets:.1%} of the targets are longer than the ranking model reads: "
            "score and rank ignore the rest of these texts; set rank.model to a model that reads more, rank.long_texts "
            "(of embedding) to average, or shorten the texts."
        )
    if (row["tied"] or 0) > TIED:
        yield (
            f"{row['tied']:.0%} of the negatives have the score of another one of their group: the order among these "
            "is arbitrary, and cpo-ranked learns it; rank by a scorer that distinguishes them (exact has two scores "
            "only), or train with cpo."
        )
