"""Groups as Arrow tables, against the same in plain Python, and the file that a training maps into memory."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.trainer.groups import Group, Groups
from cpo_pipe.trainer.mapped_groups import FILE, mapped_groups
from cpo_pipe.trainer.scoring.group_table import Extremes, Lengths, TokenGroup, candidate_keys, restricted, targets
from cpo_pipe.trainer.scoring.prefix_tree import pack_trees
from cpo_pipe.trainer.scoring.probes import select_probes
from tests.support.architectures import table


def some(count: int, seed: int = 0) -> list[TokenGroup]:
    """Groups of one to five candidates."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(rng.randint(1, most))]

    return [(ids(12), [ids(9) for _ in range(rng.randint(1, 5))]) for _ in range(count)]


def chunked(groups: pa.Table, *at: int) -> pa.Table:
    """The same in several chunks, each with rows before and behind it in its buffers."""
    around = pa.concat_tables([groups.slice(0, 1), groups, groups.slice(0, 1)]).combine_chunks()
    bounds = [0, *at, groups.num_rows]
    return pa.concat_tables([around.slice(1 + a, b - a) for a, b in pairwise(bounds)])


def row_lengths(groups: list[TokenGroup]) -> list[list[int]]:
    return [[len(prompt) + len(ids) for ids in candidates] for prompt, candidates in groups]


# ── measures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_lengths_and_extremes(count: int) -> None:
    groups = some(count, seed=count)
    arrow = chunked(table(groups), count // 3, count // 2)
    lengths = Lengths.of(arrow)
    assert lengths.prompt_G.tolist() == [len(prompt) for prompt, _ in groups]
    assert lengths.candidate_C.tolist() == [len(ids) for _, candidates in groups for ids in candidates]
    assert np.diff(lengths.bounds()).tolist() == lengths.size_G.tolist() == [len(these) for _, these in groups]
    assert lengths.longest_G().tolist() == [max(rows) for rows in row_lengths(groups)]
    extremes = Extremes.of(arrow)
    assert extremes.longest == max(map(max, row_lengths(groups)))
    assert max(row_lengths(groups)[int(extremes.longest_in)]) == extremes.longest
    largest = [max(map(max, (prompt, *candidates))) for prompt, candidates in groups]
    assert extremes.largest == max(largest) == largest[int(extremes.largest_in)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 40])
def test_the_probes_are_the_longest_the_middle_the_shortest_and_the_largest(count: int) -> None:
    groups = some(count, seed=count)
    by_length = sorted(groups, key=lambda group: len(group[0]) + max(map(len, group[1])))
    found = select_probes(chunked(table(groups), count // 2))
    places = {1: [0], 2: [1, 0], 3: [2, 1, 0], 4: [3, 1, 0], 40: [39, 19, 0]}[count]
    largest = max(groups, key=lambda group: pack_trees([group]).tokens())
    expected = [by_length[place] for place in places]
    assert list(found.groups) == expected + [largest] * (largest not in expected)
    inputs = [length - 1 for rows in row_lengths(groups) for length in rows]
    assert found.rows == (min(inputs), max(inputs))
    assert found.candidates == max(len(candidates) for _, candidates in groups)


def test_what_is_not_wanted_is_neither_measured_nor_kept() -> None:
    groups = some(30)
    arrow, rng = chunked(table(groups), 11, 12), np.random.default_rng(0)
    wanted_C = rng.random(len(candidate_keys(arrow))) < 0.3
    flags = iter(wanted_C)
    left = {str(number): (prompt, [ids for ids in candidates if next(flags)])
            for number, (prompt, candidates) in enumerate(groups)}  # fmt: skip
    assert any(not candidates for _, candidates in left.values()), "one that is not wanted at all"
    expected = table({name: group for name, group in left.items() if group[1]})
    assert restricted(arrow, wanted_C).to_pylist() == expected.to_pylist()
    assert select_probes(arrow, wanted_C) == select_probes(expected)
    keys = [(group["example_id"], candidate["candidate_id"]) for group in arrow.to_pylist()
            for candidate in group["candidates"]]  # fmt: skip
    assert [tuple(row.values()) for row in candidate_keys(arrow).to_pylist()] == keys


# ── groups one by one ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_group_is_made_when_it_is_asked_for() -> None:
    texts = {"a": ([1, 2], [[3], [4, 5]]), "b": ([6], [[7]]), "c": ([8], [[9], [10], [11]])}
    reference = np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    groups = Groups.of(chunked(table(texts, {"a": [0, 1], "b": [0], "c": [0, 2, 1]}), 1), reference)
    made = [
        Group("a", [1, 2], [[3], [4, 5]], [0, 1], [-1.0, -2.0]),
        Group("b", [6], [[7]], [0], [-3.0]),
        Group("c", [8], [[9], [10], [11]], [0, 2, 1], [-4.0, -5.0, -6.0]),
    ]
    assert len(groups) == 3
    assert list(groups) == made
    assert groups[-1] == made[2]
    assert list(groups[1:]) == made[1:]
    chosen = groups[np.array([2, 0])]
    assert list(chosen) == [made[2], made[0]]
    assert list(chosen[:1]) == [made[2]]
    assert not groups[:0]
    assert Groups.of(table(texts))[0] == Group("a", [1, 2], [[3], [4, 5]], None, [])


def test_the_targets_of_examples_are_groups_of_one() -> None:
    texts = {str(number): (prompt, candidates[:1]) for number, (prompt, candidates) in enumerate(some(20))}
    examples = chunked(examples_of(texts), 3, 9)
    assert list(Groups.of(targets(examples))) == list(Groups.of(table(texts)))
    assert candidate_keys(targets(examples, identified=True)).equals(candidate_keys(table(texts)))
    assert targets(examples.slice(0, 0)).num_rows == 0


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def examples_of(groups: dict[str, TokenGroup]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"example_id": name, "split": "train", "prompt": "p", "rendered": "p", "target": "t",
          "prompt_ids": prompt, "target_ids": candidates[0], "ends": True, "category": None}
         for name, (prompt, candidates) in groups.items()], schema=EXAMPLES,
    )  # fmt: skip


def stored(root: Path, groups: dict[str, TokenGroup]) -> Rows:
    rows = Store(root).rows("groups", {"of": "the test"})
    made: list[dict[str, Any]] = table(groups).to_pylist()
    for group in made:
        for candidate in group["candidates"]:
            candidate |= {"text": "long ago", "strategy": "s", "similarity": 0.5, "rank": len(candidate["token_ids"])}
    with rows.writer() as writer:
        writer.add(made)
    return rows


@pytest.mark.parametrize("alone", [True, False])
def test_the_file_has_the_selection_in_its_order_and_goes_with_its_user(tmp_path: Path, alone: bool) -> None:
    groups = {f"e{number}": group for number, group in enumerate(some(2500))}
    rows = stored(tmp_path, groups)
    names = random.Random(1).sample(list(groups), 2100)  # more than one slice
    selected = {name: groups[name] for name in names}
    folder = tmp_path / "in progress"
    folder.mkdir()
    (folder / f".tmp-{FILE}").write_bytes(b"of a process that was killed")
    with mapped_groups(rows, examples_of(selected), folder, alone) as found:
        wanted = {name: group for name, group in selected.items() if alone or len(group[1]) > 1}
        ranks = {name: [len(ids) for ids in candidates] for name, (_, candidates) in wanted.items()}
        assert found.to_pylist() == table(wanted, ranks).to_pylist()
        assert [path.name for path in folder.iterdir()] == [FILE]
    assert not folder.exists()
    (folder / "17").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), mapped_groups(rows, examples_of(selected), folder, alone):
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["17"], "the state of the training stays"


def test_what_is_missing_or_was_made_of_other_token_ids_is_an_error(tmp_path: Path) -> None:
    groups = {f"e{number}": group for number, group in enumerate(some(1100))}
    rows = stored(tmp_path, groups)

    def refused(selected: dict[str, TokenGroup]) -> str:
        with pytest.raises(RunError) as error, mapped_groups(rows, examples_of(selected), tmp_path / "p", alone=True):
            pass
        return str(error.value)

    assert "2 groups of the selection are missing" in refused({**groups, "x": ([1], [[2]]), "y": ([1], [[2]])})
    prompt, candidates = groups["e1050"]
    for other in ((prompt[:-1], candidates), ([*prompt[:-1], 7000], candidates), (prompt, [[*candidates[0], 0]])):
        assert "the group of example e1050 has other token ids" in refused({**groups, "e1050": other})
