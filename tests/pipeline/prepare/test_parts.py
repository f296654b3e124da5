"""Several sources, and splits with a source of their own; expected counts are those of the rows in each test."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.pipeline.prepare.parts import open_parts
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.recipe.load import load_recipe, parse_recipe
from tests.support.ground_truth import data, jsonl

SPLITS = ("train", "validation", "test")


def rows(prefix: str, count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{prefix} {n}", "target": f"a{n}", **columns} for n in range(count)]


def prompts(examples: Examples, split: str, source: str | None = None) -> list[str]:
    table = examples.read(split)
    pairs = zip(table["prompt"].to_pylist(), table["source"].to_pylist(), strict=True)
    return [prompt for prompt, own in pairs if source in (None, own)]


def counts(examples: Examples) -> Counter[str]:
    return Counter(name for split in SPLITS for name in examples.read(split)["source"].to_pylist())


# ── several sources ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_sources_are_mixed_and_named(tmp_path: Path, store, byte_tokenizer) -> None:
    one = jsonl(tmp_path / "one.jsonl", [*rows("one", 6), *rows("same", 1)])
    (tmp_path / "two.csv").write_text("q,a\n" + "".join(f"two {n},b\n" for n in range(4)) + "same 0,a0\n,b\n")
    sources = {
        "one": {"source": one},
        "two": {"source": str(tmp_path / "two.csv"), "columns": {"prompt": "q", "target": "a"}},
    }
    examples = prepare(data(sources=sources, tokenizer=byte_tokenizer, train=8, max_rejected=0.2), store)
    assert counts(examples) == {"one": 7, "two": 4}
    found = prompts(examples, "train") + prompts(examples, "test")
    assert sorted(found) == sorted([*(f"one {n}" for n in range(6)), *(f"two {n}" for n in range(4)), "same 0"])
    assert len({prompt.split()[0] for prompt in prompts(examples, "train")}) > 1, "mixed, not one after the other"
    rejected = pq.read_table(examples.artifact.path / "rejected.parquet").to_pylist()
    assert [(row["source"], row["reason"]) for row in rejected] == [
        ("two/two.csv:7", "empty prompt"), ("two/two.csv:6", "duplicate"),
    ]  # fmt: skip
    again = prepare(data(sources=sources, tokenizer=byte_tokenizer, train=8, max_rejected=0.2), store)
    assert again.artifact.path == examples.artifact.path


def test_a_count_draws_rows_by_the_seed_and_more_of_them_keep_those(tmp_path: Path, store, byte_tokenizer) -> None:
    one, two = jsonl(tmp_path / "one.jsonl", rows("one", 30)), jsonl(tmp_path / "two.jsonl", rows("two", 5))

    def made(count: int, **settings: Any) -> set[str]:
        sources = {"one": {"source": one, "count": count}, "two": {"source": two}}
        examples = prepare(data(sources=sources, tokenizer=byte_tokenizer, train=4, **settings), store)
        assert counts(examples) == {"one": min(count, 30), "two": 5}
        return {prompt for split in SPLITS for prompt in prompts(examples, split, "one")}

    five = made(5)
    assert five < made(9)
    assert five != {f"one {n}" for n in range(5)}, "drawn, not the first"
    assert made(5) == five != made(5, split_seed=1)


def test_a_count_above_the_rows_is_said(tmp_path: Path, store, byte_tokenizer, caplog) -> None:
    sources = {"one": {"source": jsonl(tmp_path / "one.jsonl", rows("one", 3)), "count": 9}}
    prepare(data(sources=sources, tokenizer=byte_tokenizer, train=2), store)
    assert "data.sources.one.count is 9, but there are only 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [((30, 10), (1, 1), (10, 10)), ((30, 10), (3, 1), (30, 10)), ((30, 10), (1, 3), (3, 10)),
     ((30, 10), (0.7, 0.3), (23, 10)), ((10, 10), (0.1, 0.3), (3, 10)), ((10, 30), (0.01, 1), (0, 30))],
)  # fmt: skip
def test_weights_are_shares(tmp_path: Path, store, byte_tokenizer, sizes, weights, expected) -> None:
    names = ("one", "two")
    sources = {
        name: {"source": jsonl(tmp_path / f"{name}.jsonl", rows(name, size)), "weight": weight}
        for name, size, weight in zip(names, sizes, weights, strict=True)
    }
    examples = prepare(data(sources=sources, tokenizer=byte_tokenizer, train=4), store)
    assert counts(examples) == Counter(dict(zip(names, expected, strict=True)))


def test_the_same_file_draws_other_rows_under_another_name(tmp_path: Path, store, byte_tokenizer) -> None:
    path = jsonl(tmp_path / "one.jsonl", rows("one", 40))
    found = []
    for name in ("one", "two"):
        made = prepare(data(sources={name: {"source": path, "count": 9}}, tokenizer=byte_tokenizer, train=4), store)
        found.append({prompt for split in SPLITS for prompt in prompts(made, split, name)})
    assert found[0] != found[1]


def test_each_source_has_its_own_format(tmp_path: Path, store, chat_tokenizer, caplog) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    sources = {
        "talk": {"source": jsonl(tmp_path / "talk.jsonl", [{"messages": messages}])},
        "plain": {"source": jsonl(tmp_path / "plain.jsonl", rows("plain", 2))},
    }
    with caplog.at_level(logging.INFO):
        examples = prepare(data(sources=sources, tokenizer=chat_tokenizer, train=2), store)
    assert counts(examples) == {"talk": 1, "plain": 2}
    assert examples.rendering["template"] == "chat", "of all, since one has conversations"
    assert all("<|start|>" in text for split in SPLITS for text in examples.read(split)["rendered"].to_pylist())
    assert f"examples: read 2 rows of plain: {tmp_path / 'plain.jsonl'} as pairs" in caplog.text


def test_a_tokenizer_is_trained_on_all_sources(tmp_path: Path, store) -> None:
    files = {name: jsonl(tmp_path / f"{name}.jsonl", rows(name * 9, 5)) for name in ("xy", "zw")}
    sources = {name: {"source": file} for name, file in files.items()}
    examples = prepare(data(sources=sources, tokenizer={"vocab_size": 280}, train=4), store)
    vocabulary = examples.tokenizer.load().get_vocab()
    assert {"xyxy", "zwzw"} <= vocabulary.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "a.jsonl", "sources": {"a": {"source": "a.jsonl"}}}, "data: source is not used with sources;"),
        ({"max_rows": 3, "sources": {"a": {"source": "a.jsonl"}}}, "data: max_rows is not used with sources; set it"),
        ({"sources": {"a": {"count": 3}}}, "data.sources.a.source is missing"),
        ({"sources": {"a": {"source": "a", "count": 3, "weight": 1}}}, "data.sources.a: give either count or weight"),
        ({"sources": {"a": {"source": "a", "weight": 1}, "b": {"source": "b"}}}, "data: sources: give a weight to all"),
        ({"sources": {"a": {"source": "a", "weight": 0}}}, "data.sources.a.weight is 0: input should be greater"),
        ({"sources": {"a": {"source": "a", "wieght": 1}}}, "data.sources.a.wieght is not a known key; did you mean w"),
        ({"sources": {"a": {"source": "a"}}, "test_source": {"source_split": "test"}},
         "data: test_source.source is missing: name one"),
        ({"source": "a.jsonl", "test_source": {"splt": "test"}}, "data.test_source.splt is not a known key"),
        ({"preset": "python-docs", "test_source": "a.txt"}, "data: test_source is not used by the preset python-docs"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(settings: Spec, message: str) -> None:
    content = {"data": {"tokenizer": "t", "train": 1, **settings}, "train": {"mle": {"objective": "mle", "init": "m"}}}
    with pytest.raises(InputError) as error:
        parse_recipe(content, "r.yaml")
    assert str(error.value).startswith(f"recipe r.yaml: {message}")


def test_faults_of_one_source_name_it(tmp_path: Path, store, byte_tokenizer) -> None:
    good = {"source": jsonl(tmp_path / "a.jsonl", rows("a", 3))}
    for bad, message in (
        ({"source": str(tmp_path / "gone.jsonl")}, r"^data\.sources\.b\.source .*gone\.jsonl: no such file"),
        ({**good, "subset": "x"}, r"^data\.sources\.b\.subset: not used by a file"),
        ({**good, "columns": {"prompt": "q"}}, r"^data\.sources\.b\.source .*: no column 'q' \(data\.sources\.b"),
        ({**good, "columns": {"promt": "q"}}, r"^data\.sources\.b\.columns\.promt: not a column of preset pairs"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            prepare(data(sources={"a": good, "b": bad}, tokenizer=byte_tokenizer, train=1), store)


# ── official splits ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_splits_of_their_own_sources(tmp_path: Path, store, byte_tokenizer) -> None:
    train = jsonl(tmp_path / "train.jsonl", rows("train", 9))
    test = jsonl(tmp_path / "test.jsonl", [{"q": row["prompt"], "a": row["target"]} for row in rows("test", 4)])
    validation = jsonl(tmp_path / "validation.jsonl", rows("validation", 3))
    config = data(source=train, test_source={"source": test, "columns": {"prompt": "q", "target": "a"}},
                  validation_source=validation, tokenizer=byte_tokenizer)  # fmt: skip
    examples = prepare(config, store)
    for split, count in (("train", 9), ("validation", 3), ("test", 4)):
        assert sorted(prompts(examples, split)) == [f"{split} {n}" for n in range(count)]
    assert examples.artifact.manifest["examples"] == {"train": 9, "validation": 3, "test": 4}
    assert set(examples.read("test")["source"].to_pylist()) == {None}


def test_sizes_limit_official_splits_and_the_rest_is_drawn(tmp_path: Path, store, byte_tokenizer, caplog) -> None:
    train = jsonl(tmp_path / "train.jsonl", rows("train", 9))
    test = jsonl(tmp_path / "test.jsonl", rows("test", 6))
    shared = {"source": train, "test_source": test, "tokenizer": byte_tokenizer}
    examples = prepare(data(**shared, validation=2, test=4), store)
    assert examples.artifact.manifest["examples"] == {"train": 7, "validation": 2, "test": 4}
    assert all(prompt.startswith("train") for prompt in prompts(examples, "train") + prompts(examples, "validation"))
    assert all(prompt.startswith("test") for prompt in prompts(examples, "test"))
    assert examples.artifact.manifest["left_over"] == 2
    every = prepare(data(**shared, train=5), store)
    assert every.artifact.manifest["examples"] == {"train": 5, "validation": 0, "test": 6}
    assert prompts(every, "test")[:4] == prompts(examples, "test"), "the first of one fixed order"
    prepare(data(**shared, test=60), store)
    assert "examples: data.test is 60, but only 6 are left for it" in caplog.text


def test_a_prompt_of_an_official_split_is_in_no_other(tmp_path: Path, store, byte_tokenizer) -> None:
    test = [{"prompt": "leak", "target": "x"}, {"prompt": "shared", "target": "x"}, *rows("test", 2)]
    validation = [{"prompt": "shared", "target": "y"}, *rows("validation", 2)]
    train = [{"prompt": "leak", "target": "other"}, {"prompt": "validation 0", "target": "other"}, *rows("train", 20)]
    files = {name: jsonl(tmp_path / f"{name}.jsonl", rows_) for name, rows_ in
             (("train", train), ("validation", validation), ("test", test))}  # fmt: skip
    config = data(source=files["train"], validation_source=files["validation"], test_source=files["test"],
                  tokenizer=byte_tokenizer, max_rejected=0.2)  # fmt: skip
    examples = prepare(config, store)
    assert examples.artifact.manifest["examples"] == {"train": 20, "validation": 2, "test": 4}
    rejected = pq.read_table(examples.artifact.path / "rejected.parquet").to_pylist()
    assert {(row["source"], row["reason"]) for row in rejected} == {
        ("validation/validation.jsonl:1", "prompt of the test split"),
        ("train.jsonl:1", "prompt of the test split"), ("train.jsonl:2", "prompt of the validation split"),
    }  # fmt: skip


def test_an_official_split_without_examples_is_an_error(tmp_path: Path, store, byte_tokenizer) -> None:
    train, test = (
        jsonl(tmp_path / "train.jsonl", rows("train", 20)),
        jsonl(tmp_path / "test.jsonl", [{"prompt": "", "target": "a"}]),
    )
    with pytest.raises(InputError, match=r"^data\.test_source: no examples are left"):
        prepare(data(source=train, test_source=test, tokenizer=byte_tokenizer), store)


def test_another_split_of_the_same_source(tmp_path: Path, store, byte_tokenizer) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, name in (("train", "train"), ("test", "test"), ("dev", "dev")):
        jsonl(folder / f"{name}.jsonl", rows(split, 3))
    config = data(source=str(folder), test_source={}, validation_source={"source_split": "validation"},
                  tokenizer=byte_tokenizer)  # fmt: skip
    examples = prepare(config, store)
    assert [sorted(prompts(examples, split))[0] for split in SPLITS] == ["train 0", "dev 0", "test 0"]
    again = prepare(data(source=str(folder), test_source=str(folder), tokenizer=byte_tokenizer), store)
    assert sorted(prompts(again, "test")) == ["test 0", "test 1", "test 2"], "its test split, unless another is named"
    source = jsonl(tmp_path / "a.jsonl", rows("a", 3))
    with pytest.raises(InputError, match=r"^data\.test_source\.source_split: not used by a file"):
        prepare(data(source=source, test_source={"source_split": "test"}, tokenizer=byte_tokenizer), store)


def test_gsm8k_trains_on_the_official_train_split_and_tests_on_the_official_test_split(monkeypatch) -> None:
    asked = []

    def locate(name: str, **options: Any) -> Any:
        asked.append((name, options.get("subset"), options.get("split") or options.get("default_split", "train")))
        raise InputError("asked")

    for module in ("base", "parts"):
        monkeypatch.setattr(f"cpo_pipe.pipeline.prepare.{module}.locate_source", locate)
    config = load_recipe("gsm8k").data
    with pytest.raises(InputError, match="asked"):
        open_parts(config)
    with pytest.raises(InputError, match="asked"):
        config.open_source()
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert config.split_sizes() == (None, 200, 1319)
    own = data(preset="gsm8k", source="a.jsonl", tokenizer="t", test=3)
    assert own.test_source is None, "a file of the user's own has no splits"
    mixed = data(preset="gsm8k", sources={"a": {"source": "a.jsonl"}}, tokenizer="t", test=3)
    assert (mixed.test_source, mixed.subset) == (None, None)


def test_settings_come_back_from_a_written_recipe(tmp_path: Path) -> None:
    from cpo_pipe.recipe.render import recipe_text

    content = {
        "name": "r",
        "data": {"tokenizer": "t", "sources": {"a": {"source": "a.jsonl", "weight": 2, "columns": {"prompt": "q"}}},
                 "test_source": {"source": "b.jsonl", "max_rows": 3}, "validation_source": "c.jsonl"},
        "train": {"mle": {"objective": "mle", "init": "m"}},
    }  # fmt: skip
    recipe = parse_recipe(json.loads(json.dumps(content)), "r.yaml")
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(recipe))
    assert load_recipe(str(path)) == recipe
