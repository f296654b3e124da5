"""`cpo-pipe export`: what is written, that the hub and TRL take it, and that it comes back as a pool."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from transformers import AutoTokenizer

from cpo_pipe.pipeline.convert.sentencepiece import write_tokenizer
from cpo_pipe.pipeline.export import export as export_module
from cpo_pipe.pipeline.export import writer
from cpo_pipe.pipeline.export.pairs import PairCounts, pair_rows
from cpo_pipe.pipeline.export.trl_tokens import as_texts
from tests.support.exports import (
    BATCH,
    CHAT,
    CHATML,
    OTHER,
    TEMPLATE,
    exported,
    grouped,
    groups_of,
    opened,
    row_of,
    with_chat,
)
from tests.support.old_models import LIKE, as_pickles, with_sentencepiece
from tests.support.project import Project


def test_a_row_is_the_target_and_a_negative(project: Project) -> None:
    options = (*BATCH, *TEMPLATE, "--set", "rank={}")
    run = grouped(project, *options)
    groups = groups_of(run)
    rows = exported(project, *options)
    assert rows == [row_of(e, candidates[0], other) for e, candidates in groups for other in candidates[1:]]
    assert len(rows) > 32
    assert all(
        row["prompt"] == f"Q: {e['prompt']} A:"
        for e, _ in groups
        for row in rows
        if row["example_id"] == e["example_id"]
    )
    assert all(-1 <= row["similarity"] <= 1 for row in rows)
    assert not any("endoftext" in row["chosen"] + row["rejected"] for row in rows)


def test_messages_have_the_prompt_before_the_template(project: Project) -> None:
    options = (*BATCH, *TEMPLATE)
    run = grouped(project, *options)
    plain = exported(project, *options)
    rows = exported(project, *options, "--conversational", out="talk")
    prompts = {example["example_id"]: example["prompt"] for example, _ in groups_of(run)}
    assert rows == [
        row
        | {
            "prompt": [{"role": "user", "content": prompts[row["example_id"]]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in plain
    ]
    trl = pytest.importorskip("trl")
    assert all(trl.is_conversational(row) for row in datasets.load_dataset("talk", split="train"))


def test_pairs_are_chosen_by_strategy(project: Project) -> None:
    project.write("weak.jsonl", "".join(json.dumps({"prompt": f"{word} {n}", "text": f" weak {n}"}) + "\n"
                                        for word in ("the", "quick", "brown") for n in range(24)))  # fmt: skip
    options = ("--set", "negatives={sources: {batch: {count: 2}, weak: {strategy: pool, file: weak.jsonl}}}")
    run = grouped(project, *options)
    rows = exported(project, *options, "--pair", "target,weak", "--pair", "batch,weak")
    expected = []
    for example, candidates in groups_of(run):
        by = {label: [c for c in candidates if c["strategy"] == label] for label in ("target", "batch", "weak")}
        for chosen in ("target", "batch"):
            expected += [row_of(example, one, other) for one in by[chosen] for other in by["weak"]]
    assert rows == expected
    assert {(row["chosen_strategy"], row["rejected_strategy"]) for row in rows} == {
        ("target", "weak"),
        ("batch", "weak"),
    }
    card = Path("out/README.md").read_text()
    assert f"| target | weak | {sum(row['chosen_strategy'] == 'target' for row in rows)} |" in card
    assert "- `weak`: The file weak.jsonl" in card


@pytest.mark.slow
def test_what_does_not_end_is_left_out_and_counted(made: Project) -> None:
    pairs = [(e, candidates[0], other) for e, candidates in groups_of(opened()) for other in candidates[1:]]
    ending = [pair for pair in pairs if pair[2]["token_ids"][-1] == 0]
    assert 0 < len(ending) < len(pairs), "the sampled texts are of both kinds"
    result = made.cli("export", "tiny.yaml", "--out", "out")
    assert result.status == 0
    assert f"export: {len(pairs) - len(ending)} pairs are omitted" in result.err
    rows = pq.read_table("out/data/train-00000.parquet").to_pylist()
    assert rows == [row_of(*pair) for pair in ending]
    card = Path("out/README.md").read_text()
    assert f"{len(pairs) - len(ending)} pairs with a text that does not end" in card
    assert f"{len(rows)} pairs of {len({row['example_id'] for row in rows})} prompts" in card


def test_texts_that_trl_tokenizes_otherwise_are_counted(project: Project) -> None:
    """A target without a space before it goes together with the prompt's last word."""
    rows = [{"prompt": f"ov{'er' * (n % 2)} {n} qu", "target": "ick" if n % 2 else " ick"} for n in range(24)]
    project.write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    options = ("--set", "negatives={sources: {batch: {count: 1}}}")
    run = grouped(project, *options)
    tokenizer = AutoTokenizer.from_pretrained(project.model)
    used = [(e, c) for e, candidates in groups_of(run) if len(candidates) > 1 for c in candidates]
    otherwise = [
        1 for e, c in used if tokenizer.encode(e["rendered"] + c["text"]) != [*e["prompt_ids"], *c["token_ids"][:-1]]
    ]
    result = project.cli("export", "tiny.yaml", "--out", "out", *options)
    assert 0 < len(otherwise) < len(used)
    assert f"TRL will give {len(otherwise)} of {len(used)} texts other token ids" in result.err


def with_tokenizer(project: Project, kind: str) -> Any:
    """A tokenizer of SentencePiece in the project's folder `sp`, as `cpo-pipe convert` makes it."""
    as_pickles(project.model, project.root / "old")
    with_sentencepiece(project.root / "old", **LIKE[kind])
    write_tokenizer(project.root / "old")
    return AutoTokenizer.from_pretrained("old")


@pytest.mark.parametrize("kind", ["OpenLLaMA", "Llama", "no space before a text"])
def test_of_sentencepiece_models_texts_are_written_so_that_trl_makes_their_ids(project: Project, kind: str) -> None:
    """Decoded alone a text loses the space at its start, which it was trained with; a pool takes it off again."""
    tokenizer = with_tokenizer(project, kind)
    project.write("pairs.jsonl", "".join(json.dumps({"prompt": f"Say {n}:\n", "target": f"thermal tasks {n}"}) + "\n"
                                         for n in range(24)))  # fmt: skip
    options = (*BATCH, "--set", "data.tokenizer=old")
    groups = groups_of(grouped(project, *options))
    result = project.cli("export", "tiny.yaml", "--out", "out", *options)
    assert result.status == 0, result.err
    # A cut within a word may go together with nothing else; most texts are exact.
    said = re.search(r"TRL will give (\d+) of (\d+) texts other", result.err)
    assert said is None or int(said[1]) < 0.1 * int(said[2])
    rows = pq.read_table("out/data/train-00000.parquet").to_pylist()
    ids = {e["example_id"]: [*e["prompt_ids"], *candidates[0]["token_ids"]] for e, candidates in groups}
    for row in rows:
        whole = row["prompt"] + row["chosen"] + str(tokenizer.eos_token)
        assert tokenizer(whole)["input_ids"] == ids[row["example_id"]]
    # What is not exact has the space, too: it would else be told by that.
    assert all(row["rejected"].startswith(" ") == row["chosen"].startswith(" ") for row in rows)
    pools = "worse: {strategy: pool, file: out, columns: {prompt: prompt, text: rejected}, count: 3}"
    back = ("--set", f"negatives={{sources: {{{pools}}}}}", *options[2:])
    again = {e["example_id"]: {tuple(c["token_ids"]) for c in cs[1:]} for e, cs in groups_of(grouped(project, *back))}
    exact = [tuple(c["token_ids"]) in again[e["example_id"]]
             for e, cs in groups for c in cs[1:] if c["strategy"] == "batch"]  # fmt: skip
    assert all(exact)


def test_what_a_chat_template_renders_is_exact_as_messages_and_as_text(project: Project) -> None:
    with_chat(project, CHATML)
    run = grouped(project, *CHAT)
    for out, options in (("messages", ()), ("texts", ("--no-conversational",))):
        result = project.cli("export", "tiny.yaml", "--out", out, *CHAT, *options)
        assert result.status == 0, result.err
        assert f"written to {out} as {out}" in result.err
        assert "other token ids" not in result.err
        card = Path(out, "README.md").read_text()
        assert re.search(r" 0 of \d+ texts get other token ids", card)
        assert 'AutoTokenizer.from_pretrained("chat")' in card
        assert ("EOS token; TRL appends" in card) is (out == "texts")
    tokenizer = AutoTokenizer.from_pretrained("chat")
    ids = {e["example_id"]: [*e["prompt_ids"], *candidates[0]["token_ids"]] for e, candidates in groups_of(run)}
    for row in pq.read_table("texts/data/train-00000.parquet").to_pylist():
        assert tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token)["input_ids"] == ids[row["example_id"]]


def test_a_chat_template_that_changes_what_it_is_given_is_counted(project: Project) -> None:
    with_chat(project, CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"))
    grouped(project, *CHAT)
    result = project.cli("export", "tiny.yaml", "--out", "out", *CHAT)
    assert result.status == 0, result.err
    found = re.search(
        r"TRL will give (\d+) of (\d+) texts other token ids .* a sampled text may begin or end", result.err
    )
    assert found is not None
    assert 0 < int(found[1]) < int(found[2]), "those that are cut behind a space; targets are rendered alike"


def test_messages_without_a_chat_template_are_warned_of(project: Project) -> None:
    with_chat(project, None)
    grouped(project, *OTHER)
    result = project.cli("export", "tiny.yaml", "--out", "out", *OTHER, "--conversational")
    assert "the tokenizer of the examples has no chat template; TRL needs one to render messages" in result.err


def test_one_text_in_two_ways_of_writing_is_no_pair_and_another_end_than_eos_is_one(project: Project) -> None:
    tokenizer = AutoTokenizer.from_pretrained(project.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"], "unk_token": "<|what|>"})
    turn, unknown = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|what|>"])
    words = tokenizer.encode(" quick brown")
    letters = [token for letter in " quick brown" for token in tokenizer.encode(letter)]
    assert words != letters
    candidates = [
        {"text": " quick brown", "token_ids": [*words, 0], "strategy": "target", "similarity": 1.0},
        {"text": " quick brown", "token_ids": [*letters, 0], "strategy": "autoregressive", "similarity": 1.0},
        {"text": " quick", "token_ids": [*tokenizer.encode(" quick"), turn], "strategy": "batch", "similarity": 0.5},
        {"text": " qu", "token_ids": tokenizer.encode(" qu"), "strategy": "batch", "similarity": 0.5},
        {"text": " qu", "token_ids": [*tokenizer.encode(" qu"), unknown], "strategy": "batch", "similarity": 0.5},
    ]
    group = {"example_id": "e", "prompt_ids": tokenizer.encode("the"), "candidates": candidates}
    counts = PairCounts()
    example = {"prompt": "the", "rendered": "the", "messages": None}
    rows = list(pair_rows([group], [example], [], partial(as_texts, tokenizer=tokenizer), tokenizer, counts))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(" quick brown", " quick")]
    assert (counts.equal, counts.endless, counts.groups, counts.pairs.total()) == (1, 2, 1, 1)


def test_the_hub_and_datasets_take_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_FILE", 10)
    monkeypatch.setattr(export_module, "SLICE", 3)
    grouped(project, *BATCH)
    rows = exported(project, *BATCH)
    files = sorted(path.name for path in Path("out/data").iterdir())
    assert files == [f"train-{n:05}.parquet" for n in range(len(files))]
    assert len(files) > 2
    assert datasets.load_dataset("out", split="train").to_list() == rows
    assert datasets.load_dataset("parquet", data_files="out/data/*.parquet", split="train").to_list() == rows
    card = DatasetCard.load("out/README.md")
    assert card.data.license is None
    assert {"cpo-pipe", "dpo", "preference"} <= set(card.data.tags)
    (split,) = card.data.dataset_info["splits"]
    assert split["num_examples"] == len(rows)
    assert "source: pairs.jsonl" in card.text
    assert "No licence is named" in card.text


BAD = [
    (["--pair", "target"], "--pair target: must be CHOSEN,REJECTED, such as target,truncation"),
    (["--pair", "target,batch,batch"], "--pair target,batch,batch: must be CHOSEN,REJECTED"),
    (["--pair", "target,bach"], "--pair target,bach: unknown label 'bach'; did you mean batch?"),
    (["--pair", "target,weak"], "unknown label 'weak'; choose from target, batch, truncation"),
    (["--pair", "batch,batch"], "--pair batch,batch: chosen and rejected must differ"),
    (["--pair", "target,batch", "--pair", "batch,target"], "--pair batch,target: duplicate pair, perhaps reversed"),
    (["--public"], "--public: not used without --push; remove it"),
    (["--push", "a/b/c"], "--push a/b/c: not a hub name"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_bad_options_are_one_line(project: Project, options: list[str], said: str) -> None:
    """Before anything is looked for: here no group is made."""
    result = project.cli("export", "tiny.yaml", "--out", "out", *BATCH, *options)
    assert result.status == 2
    assert said in result.error()
    assert not Path("out").exists()


def test_what_is_missing_is_said(project: Project) -> None:
    result = project.cli("export", "tiny.yaml", "--out", "out", *BATCH)
    assert result.status == 2
    assert "cpo-pipe prepare tiny.yaml" in result.error()
    without = ("--set", "negatives=null", "--set", "train.cpo={init: start, objective: mle}")
    result = project.cli("export", "tiny.yaml", "--out", "out", *without)
    assert result.status == 2
    assert "negatives: the recipe has no such section" in result.error()


@pytest.mark.slow
def test_nothing_is_written_over_and_nothing_is_left(made: Project) -> None:
    result = made.cli("export", "tiny.yaml", "--out", "runs")
    assert result.status == 2
    assert "--out runs: already exists; name a folder that is new or empty" in result.error()
    before = sorted(path.name for path in made.root.iterdir())
    short = (
        "--set",
        "negatives.sources.autoregressive.max_new_tokens=1",
        "--set",
        "negatives.sources.autoregressive.count=1",
    )
    grouped(made, *short)
    assert not any(c["token_ids"][-1] == 0 for _, candidates in groups_of(opened(*short)) for c in candidates[1:])
    result = made.cli("export", "tiny.yaml", "--out", "out", *short)
    assert result.status == 2
    assert "no pair to write: " in result.error()
    assert sorted(path.name for path in made.root.iterdir()) == before
