import logging

import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.pipeline.prepare.prepare import find_examples, prepare
from tests.support.ground_truth import by_split, data, jsonl
from tests.support.texts import changed, excerpt, text


def rows(prompts, start=0):
    return [{"prompt": prompt, "target": f"answer {start + n}"} for n, prompt in enumerate(prompts)]


@pytest.fixture
def settings(tmp_path, byte_tokenizer):
    """Settings of 30 prompts and 30 near-duplicates of them, by the name of the file."""
    prompts = [text(seed) for seed in range(30)]
    source = jsonl(tmp_path / "a.jsonl", rows([*prompts, *(changed(prompt, 3, 30) for prompt in prompts)]))
    return {"source": source, "tokenizer": byte_tokenizer, "train": 20, "validation": 10, "test": 10,
            "max_prompt_tokens": 1000}  # fmt: skip


def sides(examples):
    """The split of each number of an answer."""
    return {int(target.split()[1]): split for split, found in by_split(examples, "target").items() for target in found}


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_stay_on_one_side(settings, store, seed):
    found = sides(prepare(data(**settings, split_seed=seed), store))
    assert all(found.get(n) == found.get(n + 30) for n in range(30))
    assert set(found.values()) == {"train", "validation", "test"}
    apart = sides(prepare(data(**settings, split_seed=seed, near_duplicates="keep"), store))
    assert any(apart.get(n) != apart.get(n + 30) for n in range(30))


def test_others_stay_where_they_were(settings, store, tmp_path):
    """A group is where the one of its examples with the smallest id is without it, whatever the order of the rows."""
    grouped = prepare(data(**settings), store)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1]))
    reverse = prepare(data(**{**settings, "source": str(tmp_path / "b.jsonl")}), store)
    assert by_split(grouped, "example_id") == by_split(reverse, "example_id")
    for file, keep in (("c.jsonl", "keep"), ("d.jsonl", "group")):
        (tmp_path / file).write_text("\n".join(lines[:30]))
        shared = {**settings, "source": str(tmp_path / file), "train": 10, "validation": 5, "test": 5}
        parts = by_split(prepare(data(**shared, near_duplicates=keep), store))
        assert parts == by_split(prepare(data(**shared, near_duplicates="group"), store))


def test_later_near_duplicates_are_dropped(settings, store, caplog):
    config = data(**{**settings, "train": 10}, near_duplicates="drop", max_rejected=0)
    with caplog.at_level(logging.INFO):
        examples = prepare(config, store)
    assert set(sides(examples)) <= set(range(30))
    facts = examples.artifact.manifest
    assert (facts["removed"], facts["rejected"], facts["left_over"]) == ({"near-duplicate": 30}, {}, 0)
    removed = pq.read_table(examples.artifact.path / "rejected.parquet").to_pylist()
    assert [(row["source"], row["reason"], row["detail"]) for row in removed] == [
        (f"a.jsonl:{n + 30}", "near-duplicate", f"its prompt is a near-duplicate of that of a.jsonl:{n}")
        for n in range(1, 31)
    ]
    assert "examples: 10 train, 10 validation, 10 test; 0 rejected; 30 removed (30 near-duplicate)" in caplog.messages
    assert find_examples(config, store) is not None, "what the recipe wants removed is not rejected"


def test_rows_with_the_same_prompt_are_no_near_duplicates(tmp_path, settings, store):
    """Several answers to one prompt are kept."""
    jsonl(tmp_path / "a.jsonl", rows([*(text(seed) for seed in range(5)), text(0), text(1)]))
    shared = {**settings, "train": 2, "validation": 0, "test": None, "near_duplicates": "drop"}
    assert prepare(data(**shared), store).artifact.manifest["removed"] == {}


@pytest.mark.parametrize("kept", ["group", "drop"])
def test_turns_of_a_conversation_are_no_near_duplicates(tmp_path, settings, store, chat_tokenizer, kept):
    """Each repeats the turns before it; a conversation that begins in the same way is one."""

    def conversation(*texts):
        roles = ["user", "assistant"] * 3
        return {"messages": [{"role": role, "content": one} for role, one in zip(roles, texts, strict=True)]}

    conversations = [[text(6 * n + turn) for turn in range(6)] for n in range(12)]
    conversations.append([changed(text(0), 3), *conversations[0][1:]])
    jsonl(tmp_path / "a.jsonl", [conversation(*texts) for texts in conversations])
    shared = {**settings, "tokenizer": chat_tokenizer, "turns": "every", "train": 15, "validation": 0, "test": None,
              "max_prompt_tokens": 2000, "max_target_tokens": 2000, "near_duplicates": kept}  # fmt: skip
    examples = prepare(data(**shared), store)
    assert examples.artifact.manifest["removed"] == ({} if kept == "group" else {"near-duplicate": 3})
    first = [split for split in ("train", "test") for prompt in by_split(examples)[split] if text(2) in prompt]
    assert len(first) == (4 if kept == "group" else 2)
    assert len(set(first)) == 1


@pytest.fixture
def official(tmp_path, settings):
    """Settings with an official test split that 4 training examples overlap with, one of them twice."""
    train = [text(seed) for seed in range(40)]
    test = [*(text(seed) for seed in range(100, 110)), changed(train[0], 3), excerpt(train[1], 200, 5, 13)]
    targets = [{"prompt": prompt, "target": text(300 + n)} for n, prompt in enumerate(train)]
    leaked = [{"prompt": prompt, "target": text(400 + n)} for n, prompt in enumerate(test)]
    leaked[4]["target"], leaked[5]["target"] = changed(text(302), 9), excerpt(text(301), 500, 0, 20)
    jsonl(tmp_path / "a.jsonl", targets)
    shared = {**settings, "test_source": jsonl(tmp_path / "test.jsonl", leaked), "train": None, "validation": 0,
              "max_target_tokens": 1000}  # fmt: skip
    return {**shared, "test": None}


def figures(examples):
    return [(row["split"], row["part"], row["equal"], row["near_duplicates"], row["ngrams"])
            for row in examples.leakage]  # fmt: skip


def test_leaks_of_official_splits_are_counted(official, store, caplog):
    config = data(**official)
    for _ in range(2):
        caplog.clear()
        examples = prepare(config, store)
        assert figures(examples) == [("test", "prompt", 0, 1, 1), ("test", "target", 0, 1, 1)]
        assert examples.artifact.manifest["examples"] == {"train": 40, "validation": 0, "test": 12}
        assert "examples: 2 of 12 prompts of the test split overlap with training examples (1 near-duplicates, 1 others"
        said = [message for message in caplog.messages if "overlap with training examples" in message]
        assert len(said) == 2
        assert "for example test/test.jsonl:11 (near-duplicate: a.jsonl:1)" in said[0]


def test_leaks_are_dropped_from_training(official, store, caplog):
    examples = prepare(data(**official, drop_leaks=True), store)
    assert figures(examples) == [("test", "prompt", 0, 0, 0), ("test", "target", 0, 0, 0)]
    facts = examples.artifact.manifest
    assert facts["removed"] == {"leaked prompt": 2, "leaked target": 1}
    assert facts["examples"] == {"train": 37, "validation": 0, "test": 12}
    assert not [message for message in caplog.messages if "overlap" in message]
    removed = pq.read_table(examples.artifact.path / "rejected.parquet").to_pylist()
    assert [(row["source"], row["reason"], row["detail"]) for row in removed] == [
        ("a.jsonl:1", "leaked prompt", "near-duplicate: its prompt and that of test/test.jsonl:11"),
        ("a.jsonl:2", "leaked prompt", "n-gram: its prompt and that of test/test.jsonl:12"),
        ("a.jsonl:3", "leaked target", "near-duplicate: its target and that of test/test.jsonl:5"),
    ]
    ids = set(by_split(examples, "example_id")["train"])
    assert not ids & {row["example_id"] for row in removed}


def test_near_duplicates_of_an_official_split_are_dropped_from_training_and_never_from_it(official, store):
    examples = prepare(data(**official, near_duplicates="drop"), store)
    facts = examples.artifact.manifest
    assert (facts["removed"], facts["examples"]["test"]) == ({"near-duplicate": 1}, 12)
    assert figures(examples)[0] == ("test", "prompt", 0, 0, 1)


def test_no_training_example_is_left(tmp_path, settings, store):
    jsonl(tmp_path / "a.jsonl", rows([text(seed) for seed in range(3)]))
    test = jsonl(tmp_path / "test.jsonl", rows([changed(text(seed), 3) for seed in range(3)], 10))
    shared = {**settings, "test_source": test, "train": None, "validation": 0, "test": None}
    with pytest.raises(InputError, match=r"data\.drop_leaks: all training examples overlap with held-out examples"):
        prepare(data(**shared, drop_leaks=True), store)


def test_a_group_that_decides_the_split_is_named(tmp_path, settings, store, caplog):
    """Copies in a small file: too few for their words to be common."""
    copies = [changed(text(0), n % 40, (n + 20) % 40) for n in range(11)]
    jsonl(tmp_path / "a.jsonl", rows([*copies, *(text(seed) for seed in range(1, 30))]))
    shared = {**settings, "train": 15, "test": None, "validation": 0}
    assert prepare(data(**shared), store).artifact.manifest["near_duplicates"]["prompts"] == 11
    (said,) = [message for message in caplog.messages if "near-duplicates" in message]
    assert said == (
        "examples: 11 of 40 prompts are near-duplicates of each other, so they are in one split (data.near_duplicates: "
        "group) or all but one are removed (drop); if they only share instructions, put these into data.template, "
        "raise data.near_duplicate_similarity, or set data.near_duplicates to keep"
    )
    caplog.clear()
    prepare(data(**shared, near_duplicate_similarity=0.95), store)
    assert "near-duplicates" not in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"near_duplicates": "remove"}, "'group', 'drop' or 'keep'"),
     ({"near_duplicate_similarity": 0.2}, "greater than or equal to 0.3"),
     ({"near_duplicate_similarity": 1.1}, "less than or equal to 1")],
)  # fmt: skip
def test_settings_that_are_refused(settings, setting, message):
    with pytest.raises(ValueError, match=message):
        data(**settings, **setting)
