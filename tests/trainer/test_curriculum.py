"""From easy to hard: how difficult groups are, in which order they are taken, and pairs of several models."""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.schemas import CANDIDATE
from cpo_pipe.data.store import Rows
from cpo_pipe.trainer.curriculum import Curriculum, curriculum_batches, order_of, shuffled_batches
from cpo_pipe.trainer.difficulty import margins, similarities, strength_gaps
from cpo_pipe.trainer.loop import Loop
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.train import Inputs, train
from tests.support.marks import slow_except
from tests.support.training import Bench, metrics, naive_logprob

STRENGTHS = {"target": 3.0, "medium": 2.0, "weak": 1.0}
SOURCES = ("target", "medium", "weak")
PAIRS = [("target", "weak"), ("target", "medium"), ("medium", "weak")]


def lists(groups: list[list[tuple[str, float]]]) -> pa.ListArray:
    """Candidates of groups, by strategy and similarity."""
    rows = [
        [{"candidate_id": f"{n}", "text": "t", "token_ids": [1], "strategy": strategy, "similarity": cosine, "rank": n}
         for n, (strategy, cosine) in enumerate(group)]
        for group in groups
    ]  # fmt: skip
    return pa.array(rows, pa.list_(CANDIDATE))


def test_difficulty_by_hand() -> None:
    groups = lists([
        [("target", 1.0), ("weak", 0.2), ("medium", 0.4)],
        [("medium", 0.9), ("weak", 0.7)],
        [("target", 1.0)],
    ])  # fmt: skip
    assert strength_gaps("t", groups, STRENGTHS).tolist() == pytest.approx([-1.5, -1.0, math.nan], nan_ok=True)
    assert similarities(groups).tolist() == pytest.approx([0.3, 0.7, math.nan], nan_ok=True)
    # Per token: −1 against −2 and −4; −3 against −1.5; alone.
    reference, tokens = np.array([-2.0, -2.0, -12.0, -9.0, -3.0, -5.0]), np.array([2, 1, 3, 3, 2, 5])
    assert margins(reference, tokens, np.array([3, 2, 1])).tolist() == pytest.approx([-2.0, 1.5, math.nan], nan_ok=True)
    with pytest.raises(InputError, match=r"train\.t\.curriculum\.by is strength, but weak has none"):
        strength_gaps("t", groups, {"target": 3.0, "medium": 2.0})


@pytest.mark.parametrize(
    "strengths", [(0.9, 0.8, 0.7), (0.6, 0.5, 0.4), (8.96, 7.94, 6.92), (3e9, 2e9, 1e9), (0, 0, 0)]
)
def test_equal_gaps_are_equal_whatever_floats_make_of_them(strengths: tuple[float, ...]) -> None:
    groups = lists([[(SOURCES[0], 1.0), (SOURCES[1], 0.2)], [(SOURCES[1], 1.0), (SOURCES[2], 0.4)]])
    one, other = strength_gaps("t", groups, dict(zip(SOURCES, strengths, strict=True)))
    assert one == other == pytest.approx(strengths[1] - strengths[0])


def test_groups_of_one_are_spread_over_the_others() -> None:
    difficulty = np.array([*np.arange(8.0), *[math.nan] * 4])
    order = order_of(difficulty, seed=0).tolist()
    assert [group for group in order if group < 8] == list(range(8))
    assert sorted(order) == list(range(12))
    stages = [order[start : start + 4] for start in (0, 4, 8)]
    assert [sum(group >= 8 for group in stage) for stage in stages] in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    assert sorted(order_of(np.full(3, math.nan), seed=0).tolist()) == [0, 1, 2]


def test_the_order_of_a_known_example() -> None:
    difficulty = np.array([0.5, 0.1, 0.9, 0.3, 0.7])
    assert order_of(difficulty, seed=0).tolist() == [1, 3, 0, 4, 2]
    alike = [tuple(order_of(np.zeros(6), seed)) for seed in range(5)]
    assert len(set(alike)) == 5, "what is equally difficult is shuffled"


def test_stages_take_the_easy_ones_first() -> None:
    difficulty = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])
    config = Curriculum(by="similarity", stages=3)
    steps = list(curriculum_batches(config, difficulty, size=2, steps=6, seed=4))
    easy, middle, hard = {1, 5}, {3, 0}, {4, 2}
    assert [set(batch) for batch in steps] == [easy, easy, middle, middle, hard, hard]
    assert list(curriculum_batches(config, difficulty, size=2, steps=6, seed=4)) == steps
    assert list(curriculum_batches(config, difficulty, size=2, steps=6, seed=5)) != steps


def test_the_continuous_share_grows_to_all() -> None:
    difficulty = np.arange(100.0)
    config = Curriculum(by="similarity", order="continuous", start=0.1)
    steps = list(curriculum_batches(config, difficulty, size=10, steps=91, seed=0))
    for step, batch in enumerate(steps):
        assert len(set(batch)) == 10
        assert max(batch) < 10 + step
    assert set(steps[0]) == set(range(10))
    assert max(max(batch) for batch in steps[-10:]) > 80
    (last,) = list(curriculum_batches(config, difficulty, size=100, steps=2, seed=0))[1:]
    assert sorted(last) == list(range(100)), "at the last step all"
    small = list(curriculum_batches(config, difficulty[:3], size=4, steps=2, seed=0))
    assert small[0] == [0] * 4
    assert set(small[1]) <= {0, 1, 2}


# ── pairs of several models ──────────────────────────────────────────────────────────────────────────────────────────


class Models(Bench):
    """Groups whose candidates are of a strong model (the target), a medium and a weak one."""

    def groups(self) -> Rows:
        rows = self.store.rows("groups", {"of": "several models"})
        if not rows.num_rows():
            with rows.writer() as writer:
                for name in self.candidates:
                    group = self._group(name)
                    for candidate, source in zip(group["candidates"], SOURCES, strict=False):
                        candidate["strategy"] = source
                        candidate["similarity"] = {"target": 1.0, "medium": 0.6, "weak": 0.1}[source]
                    group["candidates"] = group["candidates"][:3]
                    writer.add([group])
        return rows

    def inputs(self, objective: str, init: Any = None) -> Inputs:
        found = super().inputs(objective, init)
        return Inputs(found.tokenizer, found.init, found.selection, found.groups, found.reference, STRENGTHS)


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Models:
    return Models(tmp_path, tiny_model)


def seen_by(bench: Models, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[list[tuple[str, str]]]:
    """The pairs of each step's batch, by their texts' places among the example's candidates."""
    batches: list[list[tuple[str, str]]] = []
    step = Loop._step

    def noted(self: Loop, number: int, batch: Any, *rest: Any) -> Any:
        found = []
        for group in batch:
            ids = bench.candidates[group.example_id][1]
            found.append(tuple(SOURCES[ids.index(candidate)] for candidate in group.candidates))
        batches.append(found)
        return step(self, number, batch, *rest)

    monkeypatch.setattr(Loop, "_step", noted)
    bench.train(**settings)
    return batches


@pytest.mark.parametrize("objective", ["dpo", "slic", "cpo", "cpo-ranked", "apo-zero"])
def test_pairs_are_those_that_were_named(bench: Models, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    # Example b has two candidates only, so no pair with the weak model.
    (batch,) = seen_by(bench, monkeypatch, objective=objective, pairs=PAIRS, max_steps=1, batch_size=10)
    assert sorted(batch) == sorted([*PAIRS * 3, ("target", "medium")])


def test_easy_pairs_come_first(bench: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.candidates = {name: found for name, found in bench.candidates.items() if name != "b"}
    pairs = {"objective": "dpo", "pairs": PAIRS, "batch_size": 3, "max_steps": 3}
    by_strength = {"by": "strength", "stages": 3}
    easy, *hard = seen_by(bench, monkeypatch, curriculum=by_strength, **pairs)
    assert set(easy) == {("target", "weak")}, "the gap is 2; of the others 1"
    assert ("target", "weak") not in {pair for batch in hard for pair in batch}


def test_each_pair_has_the_log_probs_of_its_own_candidates(bench: Models) -> None:
    from transformers import AutoModelForCausalLM

    row = metrics(bench.train("slic", pairs=PAIRS[2:], margin=200.0, max_steps=1, batch_size=3))[0]
    model = AutoModelForCausalLM.from_pretrained(bench.model.path)
    expected = []
    for name in ("a", "c", "d"):
        prompt, (_, medium, weak, *_), _ = bench.candidates[name]
        lead = naive_logprob(model, prompt, medium) - naive_logprob(model, prompt, weak)
        expected.append(max(0.0, 200.0 - lead.item()))
    assert row["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    start = metrics(bench.train("dpo", pairs=PAIRS, max_steps=1))[0]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_no_prompt_is_in_training_and_validation(bench: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    start = Loop.__init__

    def noted(self: Loop, name: str, config: Any, model: Any, data: Any, *rest: Any, **more: Any) -> None:
        groups.append(data)
        start(self, name, config, model, data, *rest, **more)

    monkeypatch.setattr(Loop, "__init__", noted)
    bench.train("dpo", pairs=PAIRS, validation=2, max_steps=1)
    held, trained = ({group.example_id for group in of} for of in (groups[0].validation, groups[0].groups))
    assert held
    assert trained
    assert not held & trained
    assert len(groups[0].validation) >= 2


BY = [("dpo", "similarity"), ("cpo", "margin"), ("slic", "strength"), ("mle", "likelihood"), ("mle", "length"),
      ("pss", "length")]  # fmt: skip


@pytest.mark.parametrize(("objective", "by"), slow_except(BY, BY[0], BY[1]))
def test_every_difficulty_trains_and_has_a_hash_of_its_own(bench: Models, objective: str, by: str) -> None:
    # Pairs of two kinds: all groups have the medium model's text in one place, and its cosine, otherwise.
    pairs = {"pairs": PAIRS} if objective in ("dpo", "slic") else {}
    shuffled = bench.train(objective, **pairs)
    for order in ("staged", "continuous"):
        artifact = bench.train(objective, curriculum={"by": by, "order": order}, **pairs)
        assert artifact.name != shuffled.name
        assert bench.train(objective, curriculum={"by": by, "order": order}, **pairs).name == artifact.name
        spec = json.loads((artifact.path / "spec.json").read_text())
        assert ("strengths" in spec) == (by == "strength")


def order_seen(
    bench: Models, monkeypatch: pytest.MonkeyPatch, objective: str, by: str, count: int = 4, **settings: Any
) -> list[str]:
    """The examples that a training takes, one at a time, in as many stages."""
    names: list[str] = []
    step = Loop._step

    def noted(self: Loop, number: int, batch: Any, *rest: Any) -> Any:
        names.extend(group.example_id for group in batch)
        return step(self, number, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", noted)
        bench.train(objective, curriculum={"by": by, "stages": count}, max_steps=count, batch_size=1, **settings)
    return names


def validation_first(bench: Models) -> str:
    """The example that is held out where one is: the first by hash."""
    return min(bench.candidates, key=lambda name: hashlib.sha256(f"held out {name}".encode()).digest())


@pytest.mark.parametrize("validation", [0, 1])
@pytest.mark.parametrize("objective", ["mle", "pss"])
def test_short_targets_come_first(
    bench: Models, monkeypatch: pytest.MonkeyPatch, objective: str, validation: int
) -> None:
    targets = {"a": [9, 9, 9, 0], "b": [9, 0], "c": [9, 9, 9, 9, 0], "d": [0]}
    bench.candidates = {name: (bench.candidates[name][0], [ids], [0]) for name, ids in targets.items()}
    left = [name for name in "dbac" if not validation or name != validation_first(bench)]
    assert order_seen(bench, monkeypatch, objective, "length", len(left), validation=validation) == left


@pytest.mark.parametrize("validation", [0, 1])
def test_negatives_unlike_the_target_come_first(
    bench: Models, monkeypatch: pytest.MonkeyPatch, validation: int
) -> None:
    cosines = {"a": 0.9, "b": 0.2, "c": 0.4, "d": 0.1}
    rows = bench.store.rows("groups", {"of": "cosines"})
    groups = [bench._group(name) for name in bench.candidates]
    for group in groups:
        for candidate in group["candidates"][1:]:
            candidate["similarity"] = cosines[group["example_id"]]
    with rows.writer() as writer:
        writer.add(groups)
    monkeypatch.setattr(bench, "groups", lambda: rows)
    left = [name for name in "dbca" if not validation or name != validation_first(bench)]
    assert order_seen(bench, monkeypatch, "cpo", "similarity", len(left), validation=validation) == left


@pytest.mark.parametrize("validation", [0, 1])
def test_negatives_unlikely_to_the_reference_come_first(
    bench: Models, monkeypatch: pytest.MonkeyPatch, validation: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bench.model.path)
    margin = {}
    for name, (prompt, candidates, _) in bench.candidates.items():
        target, *others = [naive_logprob(model, prompt, ids).item() / len(ids) for ids in candidates[:3]]
        margin[name] = np.mean(others) - target
    left = [name for name in sorted(margin, key=lambda name: margin[name])
            if not validation or name != validation_first(bench)]  # fmt: skip
    assert order_seen(bench, monkeypatch, "cpo", "margin", len(left), validation=validation) == left


def test_a_pair_is_preferred_the_way_it_is_named_also_by_rank(bench: Models) -> None:
    """One step by eq. 2 on [medium, weak]: the medium text gains on the weak one, whatever their ranks were."""
    from transformers import AutoModelForCausalLM

    for pair, sign in (([SOURCES[1], SOURCES[2]], 1), ([SOURCES[2], SOURCES[1]], -1)):
        before = AutoModelForCausalLM.from_pretrained(bench.model.path)
        artifact = bench.train("cpo-ranked", pairs=[pair], max_steps=1, beta=0.1)
        after = AutoModelForCausalLM.from_pretrained(artifact.path)
        prompt, (_, medium, weak, *_), _ = bench.candidates["a"]
        lead = [(naive_logprob(m, prompt, medium) - naive_logprob(m, prompt, weak)).item() for m in (before, after)]
        assert sign * (lead[1] - lead[0]) > 0


def test_what_would_order_nothing_is_refused(bench: Models) -> None:
    alike = r"train\.t\.curriculum\.by is {}, but by this measure all groups are equally difficult; remove"
    with pytest.raises(InputError, match=alike.format("strength")):
        bench.train("dpo", pairs=PAIRS[:1], curriculum={"by": "strength"})
    bench.candidates = {name: (prompt, [[9, 9]], [0]) for name, (prompt, *_) in bench.candidates.items()}
    with pytest.raises(InputError, match=alike.format("length")):
        bench.train("mle", curriculum={"by": "length"})


def test_strength_orders_whole_groups_of_unlike_sources(bench: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Example b lacks the weak model's text: its gap of 1 is smaller than the others' mean of 1.5."""
    names = order_seen(bench, monkeypatch, "slic", "strength", 4)
    assert (len(names), names[-1]) == (4, "b")


def test_a_kind_of_pair_that_there_is_none_of_is_refused(bench: Models) -> None:
    """The medium model's texts equal the targets everywhere, and were dropped."""
    monkey = {name: (prompt, [ids[0], ids[-1]], [0, 1]) for name, (prompt, ids, _) in bench.candidates.items()}
    bench.candidates = monkey
    rows = bench.store.rows("groups", {"of": "several models"})
    groups = [bench._group(name) for name in bench.candidates]
    for group in groups:
        for candidate, source in zip(group["candidates"], ("target", "weak"), strict=True):
            candidate["strategy"] = source
    with rows.writer() as writer:
        writer.add(groups)
    with pytest.raises(InputError, match=r"train\.t\.pairs: no pair \[target, medium\] exists: no prompt has both"):
        bench.train("dpo", pairs=PAIRS)


def test_what_is_likely_to_the_model_comes_first(bench: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bench.model.path)
    likely = {}
    for name, (prompt, (target, *_), _) in bench.candidates.items():
        likely[name] = naive_logprob(model, prompt, target).item() / len(target)
    names = order_seen(bench, monkeypatch, "mle", "likelihood")
    assert names == sorted(likely, key=lambda name: -likely[name])


def test_fewer_groups_than_stages_are_refused(bench: Models) -> None:
    with pytest.raises(InputError, match=r"curriculum\.stages is 5, but there are only 4 groups to train on"):
        bench.train("mle", curriculum={"by": "length", "stages": 5}, max_steps=5)


def test_prompts_without_a_pair_are_counted(bench: Models, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.train("dpo", pairs=PAIRS[2:], max_steps=1)
    assert "train t: 3 pairs of 3 of 4 prompts: 3 of medium over weak" in caplog.text
    assert "25% of the prompts have none of the pairs" in caplog.text


def test_what_nobody_wrote_is_nothing_to_train_on(bench: Models, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = OBJECTIVES.parse({"init": "m", "objective": "dpo", "reference": "m", "pairs": [["weak", "other"]]})
    with pytest.raises(InputError, match=r"train\.t: nothing to train on"):
        train("t", config, bench.store, bench.inputs("dpo"), None, LocalExecutor())


def test_every_pass_covers_all_rows_once() -> None:
    stream = [index for batch in shuffled_batches(10, 4, 5, seed=0) for index in batch]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert stream == [index for batch in shuffled_batches(10, 4, 5, seed=0) for index in batch]
    assert stream != [index for batch in shuffled_batches(10, 4, 5, seed=1) for index in batch]
    assert len(next(shuffled_batches(3, 8, 1, seed=0))) == 8, "a batch may pass over a small set more than once"
