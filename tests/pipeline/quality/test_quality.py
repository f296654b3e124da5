"""Quality of negatives: every figure against its value by hand, and each warning from both sides of its threshold."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.negatives.config import TARGET
from cpo_pipe.pipeline.negatives.strategy import Source
from cpo_pipe.pipeline.quality import measure
from cpo_pipe.pipeline.quality.measure import Quality, measure_quality
from cpo_pipe.pipeline.quality.schema import ALL, QUALITY
from cpo_pipe.pipeline.quality.warnings import quality_warnings
from cpo_pipe.pipeline.samples import SampleRequest


class Made(NamedTuple):
    """A negative by hand; what `rank` keeps of it has a similarity."""

    token_ids: list[int]
    kept: bool = True
    similarity: float | None = None
    reference: float | None = None
    """Log π_ref."""
    finish_reason: str = "stop"
    truncated: bool | None = None


# Targets: a of 3 tokens, b and c of 2. The fourth sample of a is more than a group takes.
TARGETS = {"a": [5, 6, 0], "b": [5, 0], "c": [4, 0]}
REFERENCE = {"a": -6.0, "b": -2.0}
COPY, DUPLICATE = {"kept": False}, {"kept": False}
SAMPLED = {
    "a": [Made([5, 6, 0], **COPY), Made([7, 0], True, 0.21, -3), Made([7, 0], **DUPLICATE), Made([3, 3, 3], False)],
    "b": [Made([9, 9], True, 0.41, -2, "length"), Made([9, 1, 0], True, 0.91, -9),
          Made([9, 9], False, None, None, "length")],
    "c": [Made([4, 0], **COPY), Made([4, 0], **COPY), Made([4, 0], **COPY)],
}  # fmt: skip
BORROWED = {"a": [Made([8, 8, 8, 0], True, 0.1, -12)], "b": [Made([9, 9, 0], **DUPLICATE)], "c": [Made([4, 0], **COPY)]}
MIXTURE = {"autoregressive": (SAMPLED, 3), "x": (BORROWED, 1)}


class Bench:
    """A store with hand-written negatives and the groups that are left of them."""

    def __init__(self, root: Path, targets: dict[str, list[int]], pools: dict[str, tuple[dict[str, list[Made]], int]]):
        self.targets, self.made = targets, pools
        self.store = Store(root)
        self.groups = self.store.rows("groups", {"a": 1})
        self.sources = [
            Source(label, SampleRequest(self._negatives(label, made), count)) for label, (made, count) in pools.items()
        ]
        rows = [self._example(name, ids) for name, ids in targets.items()]
        self.selection = pa.Table.from_pylist(rows, schema=EXAMPLES)
        with self.groups.writer() as writer:
            writer.add([self._group(name) for name in targets])

    def measure(self, reference: dict[str, float] | None = None) -> tuple[Quality, dict[str, dict[str, Any]]]:
        """`reference`: log π_ref of the targets of the groups that have any."""
        rows = None if reference is None else self._reference(reference)
        found = measure_quality(self.selection, self.sources, self.groups, rows)
        return found, {row["strategy"]: row for row in found.table.to_pylist()}

    def _example(self, name: str, target: list[int]) -> dict[str, Any]:
        return {"example_id": name, "split": "train", "prompt": "p", "rendered": "p", "target": "t", "prompt_ids": [1],
                "target_ids": target, "ends": True, "category": None}  # fmt: skip

    def _negatives(self, label: str, made: dict[str, list[Made]]) -> Rows:
        rows = self.store.rows("negatives", {"label": label})
        logprob = -2.0 if label == "autoregressive" else None
        with rows.writer() as writer:
            writer.add(
                [
                    {"example_id": name, "sample_index": k, "strategy": "s", "text": "t", "token_ids": one.token_ids,
                     "finish_reason": one.finish_reason, "logprob": logprob, "seed": 0, "generator": None,
                     "engine": None}
                    for name, samples in made.items() for k, one in enumerate(samples)
                ]
            )  # fmt: skip
        return rows

    def _kept(self, name: str) -> list[tuple[str, Made]]:
        negatives = [(label, one) for label, (made, _) in self.made.items() for one in made[name] if one.kept]
        return [(TARGET, Made(self.targets[name], True, 1.0)), *negatives]

    def _group(self, name: str) -> dict[str, Any]:
        candidates = [
            {"candidate_id": f"{name}{number}", "text": "t", "token_ids": one.token_ids, "strategy": label,
             "similarity": one.similarity, "truncated": one.truncated, "rank": None}
            for number, (label, one) in enumerate(self._kept(name))
        ]  # fmt: skip
        return {"example_id": name, "prompt_ids": [1], "candidates": candidates}

    def _reference(self, targets: dict[str, float]) -> Rows:
        rows = self.store.rows("reference-logprobs", {"of": sorted(targets)})
        with rows.writer() as writer:
            for name, logprob in targets.items():
                values = [logprob, *(one.reference for _, one in self._kept(name)[1:])]
                writer.add(
                    [
                        {"example_id": name, "candidate_id": f"{name}{number}", "logprob": value, "num_tokens": 1}
                        for number, value in enumerate(values)
                        if value is not None
                    ]
                )
        return rows


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, TARGETS, MIXTURE)


def shares(row: dict[str, Any], *names: str) -> list[Any]:
    return [row[name] for name in names]


def test_what_was_made_is_counted_also_where_it_was_dropped(bench: Bench) -> None:
    _, rows = bench.measure()
    names = "made", "copies", "duplicates", "unended", "kept"
    assert shares(rows["autoregressive"], *names) == pytest.approx([9, 4 / 9, 2 / 9, 2 / 9, 3])
    assert shares(rows["x"], *names) == pytest.approx([3, 1 / 3, 1 / 3, 0, 1]), "of b: equal to a sampled one"
    assert shares(rows[ALL], *names) == pytest.approx([12, 5 / 12, 3 / 12, 2 / 12, 4])
    assert shares(rows[TARGET], *names) == [3, None, None, 0, 3]
    # Nine samples of log-prob −2 each, of 7 + 7 + 6 tokens.
    assert rows["autoregressive"]["sampler_logprob"] == pytest.approx(-18 / 20)
    assert rows["x"]["sampler_logprob"] is None


def test_copies_and_duplicates_are_what_they_are_whatever_ends_them(tmp_path: Path) -> None:
    target = [5, 6, 0]
    made = [Made([5, 6, 3]), Made([5, 6], finish_reason="length"), Made([5, 0]), Made([5, 3]), Made([6, 0])]
    _, rows = Bench(tmp_path, {"a": target}, {"s": ({"a": made}, 5)}).measure()
    assert shares(rows["s"], "copies", "duplicates") == pytest.approx([2 / 5, 1 / 5])


def test_truncated_texts_and_ties_are_counted_and_not_passed_over(tmp_path: Path) -> None:
    targets = {name: [5, 6, 0] for name in "abcd"}
    made = [
        [Made([9, k, 0], True, similarity, truncated=similarity == 1) for k, similarity in enumerate([1, 1, 0.2], 1)],
        [Made([9, 4, 0], True, 0.9), Made([9, 5, 0], True, 0.5), Made([9, 6, 0], True, 0.5)],
        [Made([9, 7, 0], True, 0.5), Made([9, 8, 0], True, 0.4), Made([1, 9, 0], True, 0.3)],
        [Made([2, 9, 0], True, 0.5), Made([3, 9, 0], True, 0.4), Made([4, 9, 0], True, 0.3)],
    ]
    found, rows = Bench(tmp_path, targets, {"s": (dict(zip(targets, made, strict=True)), 3)}).measure()
    assert shares(rows["s"], "truncated", "tied") == pytest.approx([2 / 3, 4 / 12])  # of three lengths known
    assert shares(rows[TARGET], "truncated", "tied") == [None, None]
    assert any("66.7% of the negatives and 0.0% of the targets are longer than" in note for note in found.notes)
    assert any("33% of the negatives have the score of another one of their group" in note for note in found.notes)
    assert not any("No problem was found" in note for note in found.notes)


def test_group_sizes_after_dropping(bench: Bench) -> None:
    _, rows = bench.measure()
    assert rows["autoregressive"]["group_sizes"] == [1, 1, 1], "none of c, one of a, two of b"
    assert rows["x"]["group_sizes"] == [2, 1]
    assert rows[ALL]["group_sizes"] == [1, 0, 2], "c is left with K = 1, a and b have K = 3"
    assert [rows[name]["alone"] for name in ("autoregressive", "x", ALL)] == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    assert rows[TARGET]["group_sizes"] is None


def test_lengths(bench: Bench) -> None:
    _, rows = bench.measure()
    names = "tokens", "length_ratio", "longer", "longest", "chance"
    # a: 3 against 2; b: 2 against 2 and 3.
    assert shares(rows["autoregressive"], *names) == pytest.approx(
        [7 / 3, 1, (1 + 0.5 + 0) / 3, 1 / 2, (1 / 2 + 1 / 3) / 2]
    )
    assert shares(rows["x"], *names) == pytest.approx([4, 4 / 3, 0, 0, 1 / 2])
    assert shares(rows[ALL], *names) == pytest.approx([11 / 4, (1 + 4 / 3) / 2, 1.5 / 4, 0, 1 / 3])
    assert shares(rows[TARGET], *names) == [pytest.approx(7 / 3), None, None, None, None]
    bins = {one["low"]: one["count"] for one in rows["autoregressive"]["length_ratio_histogram"]}
    # Two thirds, one and one and a half times the target's: half an octave apart, rounded to quarters.
    assert [low for low, count in bins.items() for _ in range(count)] == pytest.approx(
        [2 ** ((quarters - 0.5) / 4) for quarters in (-2, 0, 2)]
    )


def test_likelihoods(bench: Bench) -> None:
    _, rows = bench.measure(REFERENCE)
    names = "likelier", "likeliest", "likelier_per_token", "likeliest_per_token"
    # a: −6 against −3, of 3 and 2 tokens; b: −2 against −2 and −9, of 2, 2 and 3 tokens.
    assert shares(rows["autoregressive"], *names) == pytest.approx([(0 + 0.5 + 1) / 3, (0 + 1 / 2) / 2] * 2)
    assert shares(rows["x"], *names) == [1, 1, 1, 1]
    assert shares(rows[ALL], *names) == pytest.approx([2.5 / 4, (0 + 1 / 2) / 2] * 2)
    assert rows["autoregressive"]["reference_logprob"] == pytest.approx((-3 - 2 - 9) / 7)
    assert rows[TARGET]["reference_logprob"] == pytest.approx((-6 - 2) / 5), "nothing is known of c, nor needed"


def test_a_sum_and_a_mean_per_token_may_disagree(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"a": [1, 2, 3, 0]}, {"s": ({"a": [Made([9, 0], True, None, -3)]}, 1)})
    _, rows = bench.measure({"a": -4.0})
    assert shares(rows["s"], "likelier", "likelier_per_token") == [0, 1]


def test_what_is_missing_of_the_reference_is_left_out_and_said(bench: Bench) -> None:
    found, rows = bench.measure()
    assert shares(rows[ALL], "likelier", "likeliest", "reference_logprob") == [None] * 3
    assert "exist for none of the groups: run `cpo-pipe train`" in found.notes[-1]
    found, rows = bench.measure({"a": -6.0})
    assert shares(rows["autoregressive"], "likelier", "likeliest") == [0, 0]
    assert "exist for 1 of 2 of the groups" in found.notes[-1]
    found, _ = bench.measure(REFERENCE)
    assert not any("cpo-pipe train" in note for note in found.notes)


def test_a_group_of_which_one_log_prob_is_missing_is_left_out(tmp_path: Path) -> None:
    pools = {"s": ({"a": [Made([9, 0], True, None, -3), Made([8, 0], True, None, None)]}, 2)}
    _, rows = Bench(tmp_path, {"a": [1, 0]}, pools).measure({"a": -4.0})
    assert shares(rows["s"], "likelier", "likeliest", "reference_logprob") == [None] * 3


def test_similarity(bench: Bench) -> None:
    _, rows = bench.measure()
    names = "similarity", "similarity_p10", "similarity_p50", "similarity_p90"
    assert shares(rows["autoregressive"], *names) == pytest.approx([0.51, 0.25, 0.41, 0.81])
    assert shares(rows["x"], *names) == pytest.approx([0.1] * 4)
    assert rows[ALL]["similarity"] == pytest.approx(0.4075)
    assert shares(rows[TARGET], *names) == [None] * 4
    bins = rows["autoregressive"]["similarity_histogram"]
    assert [one["low"] for one in bins for _ in range(one["count"])] == pytest.approx([0.2, 0.4, 0.9])


def test_distinct_n_is_taken_over_as_many_tokens_of_the_same_groups(bench: Bench, monkeypatch) -> None:
    _, rows = bench.measure()
    # One negative a group, by turns: [7, 0] and [9, 1, 0]; the targets of these groups: [5, 6, 0] and [5, 0].
    sampled = rows["autoregressive"]
    assert shares(sampled, "distinct_1", "distinct_2", "distinct_3") == pytest.approx([4 / 5, 1, 1])
    assert shares(sampled, "target_distinct_1", "target_distinct_2", "target_distinct_3") == pytest.approx(
        [3 / 5, 1, 1]
    )
    assert sampled["distinct_tokens"] == 5
    # Of a alone: [8, 8, 8, 0], cut to the three tokens that its target has.
    assert shares(rows["x"], "distinct_1", "distinct_2", "distinct_tokens") == pytest.approx([1 / 3, 1 / 2, 3])
    assert shares(rows[TARGET], "distinct_1", "target_distinct_1", "distinct_tokens") == [pytest.approx(4 / 7), None, 7]
    monkeypatch.setattr(measure, "DISTINCT_TOKENS", 4)
    _, rows = bench.measure()
    assert shares(rows["autoregressive"], "distinct_1", "distinct_tokens") == [1, 4], "7, 0, 9, 1"


def test_slices_give_what_all_at_once_gives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = bench.measure(REFERENCE)
    monkeypatch.setattr(measure, "SLICE", 1)
    _, sliced = bench.measure(REFERENCE)
    for name, row in whole.items():
        lists = {column: value for column, value in row.items() if isinstance(value, list)}
        assert {column: sliced[name][column] for column in lists} == lists
        plain = {column: value for column, value in row.items() if column not in lists}
        assert {column: sliced[name][column] for column in plain} == pytest.approx(plain)


def test_a_strategy_of_which_nothing_is_left(tmp_path: Path) -> None:
    pools = {"s": ({"a": [Made([1, 0], kept=False)]}, 1), "never": ({"a": []}, 1)}
    found, rows = Bench(tmp_path, {"a": [1, 0]}, pools).measure()
    assert shares(rows["s"], "made", "kept", "copies", "alone", "longer", "tokens") == [1, 0, 1, 1, None, None]
    assert shares(rows["s"], "distinct_1", "distinct_tokens", "similarity_histogram") == [None, 0, None]
    assert shares(rows["never"], "made", "kept", "copies", "unended") == [0, 0, None, None]
    assert [note.split(":")[0] for note in found.notes] == ["s", "100% of the groups have no negative left (K = 1) and "
                                                            "leave the listwise loss"]  # fmt: skip


def test_unranked_groups_have_no_similarity(tmp_path: Path) -> None:
    _, rows = Bench(tmp_path, {"a": [1, 0]}, {"s": ({"a": [Made([2, 0])]}, 1)}).measure()
    assert shares(rows["s"], "similarity", "similarity_p50", "similarity_histogram") == [None] * 3


def test_a_tie_in_a_group_is_shared() -> None:
    """Against a blind pick among the best of random groups."""
    rng = np.random.default_rng(0)
    group = np.sort(rng.integers(20, size=90))
    target, score = rng.integers(4, size=20).astype(float), rng.integers(4, size=90).astype(float)
    chosen = measure._chosen(target[group] - score, group, 20)
    for number in np.unique(group):
        everyone = [target[number], *score[group == number]]
        best = [place for place, value in enumerate(everyone) if value == max(everyone)]
        assert chosen[number] == pytest.approx((0 in best) / len(best))


def test_every_column_says_what_it_is(bench: Bench) -> None:
    found, _ = bench.measure()
    assert found.table.schema.equals(QUALITY, check_metadata=True)
    assert all(field.metadata[b"doc"] for field in QUALITY)


# ── warnings ─────────────────────────────────────────────────────────────────────────────────────────────────────

FINE = {"copies": 0.0, "duplicates": 0.0, "unended": 0.0, "length_ratio": 1.0, "longer": 0.5, "likelier": 0.5,
        "likelier_per_token": 0.5, "distinct_2": 0.7, "target_distinct_2": 0.8}  # fmt: skip


def warned(alone: float = 0.0, target_unended: float = 0.0, **figures: float) -> list[str]:
    rows = [
        {"strategy": "x", **FINE, **figures},
        {"strategy": ALL, "alone": alone},
        {"strategy": TARGET, "unended": target_unended},
    ]
    return list(quality_warnings(pa.Table.from_pylist(rows, schema=QUALITY)))


@pytest.mark.parametrize(
    ("inside", "outside", "says"),
    [
        ({"copies": 0.5}, {"copies": 0.51}, "51% of the negatives are copies of the target"),
        ({"duplicates": 0.5}, {"duplicates": 0.51}, "51% of the negatives repeat another one"),
        ({"unended": 0.5}, {"unended": 0.51}, "51% of the negatives have no end token, 0% of the targets"),
        ({"length_ratio": 0.5}, {"length_ratio": 0.49}, "0.49 times the length of its target"),
        ({"length_ratio": 2.0}, {"length_ratio": 2.01}, "2.01 times the length of its target"),
        ({"longer": 0.9}, {"longer": 0.91}, "the longer one is the target in 91% of the pairs"),
        ({"longer": 0.1}, {"longer": 0.09}, "the shorter one is the target in 91% of the pairs"),
        ({"likelier": 0.9}, {"likelier": 0.91}, "already finds the target likelier in 91%"),
        ({"likelier": 0.1}, {"likelier": 0.09}, "finds the negative likelier in 91%"),
        (
            {"likelier_per_token": 0.9},
            {"likelier_per_token": 0.91},
            "already finds the target likelier per token in 91%",
        ),
        ({"likelier_per_token": 0.1}, {"likelier_per_token": 0.09}, "finds the negative likelier per token in 91%"),
        ({"distinct_2": 0.4}, {"distinct_2": 0.39}, "distinct-2 is 0.39, the targets' is 0.80"),
    ],
)
def test_a_warning_comes_past_its_threshold(inside: dict[str, float], outside: dict[str, float], says: str) -> None:
    assert warned(**inside) == []
    (sentence,) = warned(**outside)
    assert sentence.startswith("x: ")
    assert says in sentence
    assert sentence.endswith(".")


def test_groups_that_are_left_alone_are_warned_of_for_all_strategies_together() -> None:
    assert warned(alone=0.1) == []
    assert warned(alone=0.11)[0].startswith("11% of the groups have no negative left (K = 1)")


def test_targets_that_are_cut_too_make_no_difference() -> None:
    assert warned(unended=0.97, target_unended=0.96) == []


def test_what_the_length_explains_is_said_once() -> None:
    (sentence,) = warned(longer=1.0, likelier=0.0)
    assert "the longer one is the target" in sentence
    assert len(warned(longer=1.0, likelier=0.0, likelier_per_token=0.0)) == 2


def test_nothing_to_warn_of_is_said(tmp_path: Path) -> None:
    pools = {"s": ({"a": [Made([3, 0], True, None, -3)], "b": [Made([4, 0], True, None, -1)]}, 1)}
    found, _ = Bench(tmp_path, {"a": [1, 0], "b": [2, 0]}, pools).measure({"a": -2.0, "b": -2.0})
    assert found.notes == ["No problem was found in the negatives."]
