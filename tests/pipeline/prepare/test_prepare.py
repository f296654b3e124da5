import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import example_id, tokenizer_fingerprint
from cpo_pipe.data.schemas import EXAMPLES, REJECTED
from cpo_pipe.pipeline.prepare.prepare import find_examples, prepare
from tests.support.ground_truth import data, jsonl, pairs

EOS = 0
"""The only special token of the byte tokenizer comes first."""


# ── control tokens and ends ────────────────────────────────────────────────────────────────────────────────────────


def one(tmp_path, store, tokenizer, row, **config):
    source = jsonl(tmp_path / "one.jsonl", [row])
    (example,) = prepare(data(source=source, tokenizer=tokenizer, train=1, **config), store).read("train").to_pylist()
    return example


@pytest.mark.parametrize("template", ["chat", "<s><|start|>{prompt}<|end|><|start|>"])
def test_a_prompt_has_one_bos_and_a_target_one_eos(tmp_path, store, chat_tokenizer, template):
    example = one(tmp_path, store, chat_tokenizer, {"prompt": "hi", "target": "yo</s>\n</s>"}, template=template)
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    h, i, y, o = tokenizer.convert_tokens_to_ids(list("hiyo"))
    assert example["prompt_ids"] == [0, 2, h, i, 3, 2]
    end = 3 if template == "chat" else 1
    assert (example["target"], example["target_ids"]) == ("yo", [y, o, end])


@pytest.mark.parametrize("template", ["chat", "<s><|start|>{prompt}<|end|><|start|>", "plain"])
def test_control_tokens_in_the_data_are_text(tmp_path, store, chat_tokenizer, caplog, template):
    row = {"prompt": "<s>what is <|end|>?", "context": "</s> and <|start|>", "target": "<s>it </s> ends<|end|>"}
    example = one(tmp_path, store, chat_tokenizer, row, template=template, columns={"context": "context"})
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    meant = {"plain": [0]}.get(template, [0, 2, 3, 2])
    assert [token for token in example["prompt_ids"] if token < 4] == meant, "those of the template alone"
    assert "< s>what is < |end|>?\n\n< /s> and < |start|>" in example["rendered"]
    assert example["prompt"] == "<s>what is <|end|>?\n\n</s> and <|start|>", "as the source has it"
    # Within a rendered conversation a control token is broken by a space; a target that is encoded apart is as written.
    target = {"chat": "< s>it < /s> ends"}.get(template, row["target"])
    assert [place for place, token in enumerate(example["target_ids"]) if token < 4] == [len(target)]
    assert tokenizer.decode(example["target_ids"][:-1]) == target
    assert example["target"] == ("<s>it </s> ends" if template == "chat" else row["target"])
    assert "examples: 1 have control tokens in their texts; they are encoded as plain text" in caplog.text


def test_texts_without_control_tokens_have_the_ids_they_had(tmp_path, store, chat_tokenizer, caplog):
    row = {"prompt": "a <b> s|end| é\U0001f98a", "target": "<think>so</think> x < y"}
    example = one(tmp_path, store, chat_tokenizer, row, template="chat")
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    messages = [{"role": "user", "content": row["prompt"]}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert example["prompt_ids"] == theirs
    assert example["target_ids"] == [*tokenizer.encode(row["target"], add_special_tokens=False), 3]
    assert example["target_ids"][0] == tokenizer.convert_tokens_to_ids("<think>"), "a part of the answer"
    assert "control tokens" not in caplog.text


def test_what_was_taken_otherwise_is_said_each_time(tmp_path, store, chat_tokenizer, caplog):
    rows = [{"prompt": "a</s>", "target": "b"}, {"prompt": "c", "target": "d</s>"}, {"prompt": "e", "target": "f"},
            {"prompt": "g", "target": "</s>"}]  # fmt: skip
    config = data(source=jsonl(tmp_path / "a.jsonl", rows), tokenizer=chat_tokenizer, train=3, max_rejected=0.5)
    for _ in range(2):
        caplog.clear()
        facts = prepare(config, store).artifact.manifest
        assert (facts["control_tokens"], facts["written_ends"]) == (1, 1)
        assert facts["rejected"] == {"empty target": 1}
        assert "examples: 1 have control tokens in their texts" in caplog.text
        assert "examples: 1 targets end in a written EOS token; it is encoded as the end of the target" in caplog.text


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_rows_with_the_same_prompt_and_target_are_one_example_with_all_their_rejected_answers(
    tmp_path, store, chat_tokenizer, caplog, template
):
    rows = [{"prompt": "hi", "chosen": "yo", "rejected": "no"}, {"prompt": "ha", "chosen": "yo", "rejected": "o"},
            {"prompt": "hi", "chosen": "yo", "rejected": "nay"}, {"prompt": "hi", "chosen": "yo", "rejected": "no"},
            {"prompt": "hi", "chosen": "ya", "rejected": "no"}]  # fmt: skip
    config = data(source=jsonl(tmp_path / "a.jsonl", rows), tokenizer=chat_tokenizer, train=3, template=template,
                  max_rejected=0.5)  # fmt: skip
    caplog.set_level("INFO")
    examples = prepare(config, store)
    found = {(row["prompt"], row["target"]): row["rejected"] for row in examples.read("train").to_pylist()}
    texts = {key: [answer["text"] for answer in answers] for key, answers in found.items()}
    assert texts == {("hi", "yo"): ["no", "nay"], ("ha", "yo"): ["o"], ("hi", "ya"): ["no"]}
    assert examples.most_rejected == 2
    assert examples.artifact.manifest["rejected"] == {"duplicate": 1}, "the row that has nothing new"
    assert "1 rows with further rejected answers" in caplog.text
    message = found["hi", "yo"][1]["message"]
    assert message == (None if template == "plain" else '{"role": "assistant", "content": "nay"}')


def test_a_pair_as_stored(tmp_path, store, byte_tokenizer):
    row = {"q": "hi", "c": "ctx", "a": "yo", "k": "kind"}
    source = jsonl(tmp_path / "a.jsonl", [row, {"q": "hi", "a": "no"}])
    columns = {"prompt": "q", "target": "a", "context": "c", "category": "k"}
    config = data(source=source, columns=columns, tokenizer=byte_tokenizer, template="<{prompt}|{context}>", train=2)
    examples = prepare(config, store)
    assert pq.read_schema(examples.artifact.path / "examples.parquet").equals(EXAMPLES)
    first, second = sorted(examples.read("train").to_pylist(), key=lambda example: -len(example["prompt"]))
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    assert first == {
        "example_id": example_id("hi", "yo", context="ctx"), "split": "train", "prompt": "hi\n\nctx",
        "rendered": "<hi|ctx>", "target": "yo", "prompt_ids": tokenizer.convert_tokens_to_ids(list("<hi|ctx>")),
        "target_ids": [*tokenizer.convert_tokens_to_ids(["y", "o"]), EOS], "ends": True, "category": "kind",
        "message": None, "messages": None, "source": None, "rejected": None,
    }  # fmt: skip
    assert (second["rendered"], second["category"]) == ("<hi|>", None)
    assert examples.tokenizer.path == Path(byte_tokenizer)
    assert examples.rendering == {
        "template": config.template, "tokenizer": examples.tokenizer.fingerprint, "special_tokens": "as text",
    }  # fmt: skip
    assert (
        tokenizer_fingerprint(examples.artifact.path / "tokenizer", store.hash_file) == examples.tokenizer.fingerprint
    )


def test_refused_rows_carry_their_reason_and_are_counted(tmp_path, store, byte_tokenizer, caplog):
    lines = [json.dumps(row) for row in pairs(8)]
    lines += [
        '{"prompt": "  ", "target": "a"}', '{"prompt": "p", "target": ""}',
        '{"prompt": "p"}', '{"prompt": "p", "target": null}',
        '{"prompt": "p", "target": 7}', '{"prompt": "p", "target": "\\ud800"}', "nonsense",
        json.dumps({"prompt": "x" * 21, "target": "a"}), json.dumps({"prompt": "p", "target": "y" * 20}),
        json.dumps({"prompt": "x" * 20, "target": "y" * 19}), lines[0],
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    limits = {"max_prompt_tokens": 20, "max_target_tokens": 20, "max_rejected": 0.6}
    config = data(source=str(tmp_path / "a.jsonl"), tokenizer=byte_tokenizer, train=5, **limits)
    with caplog.at_level(logging.INFO):
        examples = prepare(config, store)
    rejected = pq.read_table(examples.artifact.path / "rejected.parquet")
    assert rejected.schema.equals(REJECTED)
    rows = sorted(rejected.to_pylist(), key=lambda row: int(row["source"].split(":")[1]))
    assert [(row["source"], row["reason"], row["detail"]) for row in rows] == [
        ("a.jsonl:9", "empty prompt", "column prompt (data.columns.prompt) is '  '"),
        ("a.jsonl:10", "empty target", "column target (data.columns.target) is ''"),
        ("a.jsonl:11", "missing field", "column target (data.columns.target)"),
        ("a.jsonl:12", "missing field", "column target (data.columns.target)"),
        ("a.jsonl:13", "not text", "column target (data.columns.target) has type int: 7"),
        ("a.jsonl:14", "not UTF-8", "column target (data.columns.target) is \\ud800"),
        ("a.jsonl:15", "not JSON", "nonsense\n"),
        ("a.jsonl:16", "prompt too long", "21 tokens, more than data.max_prompt_tokens 20"),
        # 20 bytes and the EOS token
        ("a.jsonl:17", "target too long", "21 tokens, more than data.max_target_tokens 20"),
        ("a.jsonl:19", "duplicate", "question 0"),
    ]
    assert rows[-1]["example_id"] == example_id("question 0", "answer 0")
    summary = (
        "examples: 5 train, 0 validation, 4 test; 10 rejected (2 missing field, 1 empty prompt, 1 empty target, "
        "1 not text, 1 not UTF-8, 1 not JSON, 1 prompt too long, 1 target too long, 1 duplicate)"
    )
    facts = examples.artifact.manifest
    assert (facts["rows_read"], facts["examples"]) == (19, {"train": 5, "validation": 0, "test": 4})
    assert sorted(caplog.messages[-1]) == sorted(summary)
    assert caplog.messages[-1].startswith("examples: 5 train, 0 validation, 4 test; 10 rejected (2 missing field, 1 ")


def test_too_many_refused_rows_are_an_error_and_leave_nothing(tmp_path, store, byte_tokenizer):
    rows = [*pairs(8), {"prompt": "", "target": "a"}, {"prompt": "p", "target": ""}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as error:
        prepare(data(source=source, tokenizer=byte_tokenizer, train=5, max_rejected=0.19), store)
    assert str(error.value) == (
        f"data.source {source}: 2 of 10 rows were rejected (1 empty prompt, 1 empty target), more than "
        "data.max_rejected 0.19 allows; see a.jsonl:9 (empty prompt: column prompt (data.columns.prompt) is ''), "
        "a.jsonl:10 (empty target: column target (data.columns.target) is ''); correct them or raise the limit"
    )
    assert [path.name for path in (store.root / "examples").iterdir()] == [".locks"]
    assert prepare(data(source=source, tokenizer=byte_tokenizer, train=5, max_rejected=0.2), store).count("test") == 3


def test_context_column_named_by_the_user_must_be_there_but_a_presets_need_not(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [{"instruction": f"i{n}", "response": "r"} for n in range(3)])
    shared = {"preset": "dolly", "source": source, "tokenizer": byte_tokenizer, "train": 2}
    assert prepare(data(**shared), store).read("train")["rendered"][0].as_py().startswith("Below is an instruction")
    with pytest.raises(InputError, match=r"no column 'ctx' \(data\.columns\.context\); the columns there are"):
        prepare(data(**shared, columns={"context": "ctx"}), store)


def test_errors_of_the_source_pass_through_the_training_of_a_tokenizer(tmp_path, store):
    shared = {
        "source": jsonl(tmp_path / "a.jsonl", [{"q": "1", "a": "x"}]),
        "tokenizer": {"vocab_size": 300},
        "train": 1,
    }
    with pytest.raises(InputError, match=r"columns \(q, a\) are those of no known format; set data\.columns\.prompt"):
        prepare(data(**shared), store)
    with pytest.raises(InputError, match=r"data\.template is chat"):
        prepare(data(**shared, columns={"prompt": "q", "target": "a"}, template="chat"), store)
    assert not list(store.root.glob("tokenizers/[!.]*"))


def test_max_rows_reads_the_first(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", pairs(9))
    examples = prepare(data(source=source, tokenizer=byte_tokenizer, train=1, max_rows=4), store)
    assert sorted(examples.read("train")["prompt"].to_pylist() + examples.read("test")["prompt"].to_pylist()) == [
        f"question {n}" for n in range(4)
    ]


def test_a_context_is_no_part_of_the_prompt(tmp_path, store, byte_tokenizer):
    """The template puts a context elsewhere: other token ids, hence another id; but the same side of the split."""
    rows = [{"prompt": "A", "context": "B", "target": "t"}, {"prompt": "A\n\nB", "context": "", "target": "t"}]
    columns = {"context": "context"}
    source = jsonl(tmp_path / "a.jsonl", rows)
    examples = prepare(data(source=source, columns=columns, tokenizer=byte_tokenizer, template="dolly", train=1), store)
    one, other = examples.read("train").to_pylist()
    assert one["prompt"] == other["prompt"] == "A\n\nB"
    assert one["rendered"] != other["rendered"]
    assert {one["example_id"], other["example_id"]} == {example_id("A", "t", context="B"), example_id("A\n\nB", "t")}


# ── reuse ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hash_depends_on_what_decides_the_values_only(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", pairs(20))
    shared = {"source": source, "tokenizer": byte_tokenizer, "train": 10}
    path = prepare(data(**shared), store).artifact.path
    for same in ({"max_rejected": 0.5}, {"source": jsonl(tmp_path / "copy.jsonl", pairs(20))}):
        assert prepare(data(**(shared | same)), store).artifact.path == path
    for other in (
        {"train": 9},
        {"split_seed": 1},
        {"max_target_tokens": 99},
        {"template": "{prompt}"},
        {"max_rows": 19},
    ):
        assert prepare(data(**(shared | other)), store).artifact.path != path


def test_a_category_may_be_a_number(tmp_path, store, byte_tokenizer):
    categories = [0, 2.5, "c", None, "", ["x"]]
    rows = [{**pair, "kind": kind} for pair, kind in zip(pairs(6), categories, strict=True)]
    columns = {"category": "kind"}
    source = jsonl(tmp_path / "a.jsonl", rows)
    made = prepare(data(source=source, columns=columns, tokenizer=byte_tokenizer, train=5, max_rejected=0.2), store)
    table = made.read("train")
    found = dict(zip(table["prompt"].to_pylist(), table["category"].to_pylist(), strict=True))
    assert found == {f"question {n}": kind for n, kind in enumerate(["0", "2.5", "c", None, None])}
    (rejected,) = pq.read_table(made.artifact.path / "rejected.parquet").to_pylist()
    assert rejected["detail"] == "column kind (data.columns.category) has type list: ['x']"


def test_rejected_rows_are_left_to_look_at(tmp_path, store, byte_tokenizer):
    rows = [*({**pair, "prompt": [pair["prompt"]]} for pair in pairs(3)), {"prompt": "p"}, *pairs(2)]
    source, run_dir = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(InputError) as error:
        prepare(data(source=source, tokenizer=byte_tokenizer, train=2), store, run_dir)
    assert str(error.value) == (
        f"data.source {source}: 4 of 6 rows were rejected (3 not text, 1 missing field), more than data.max_rejected "
        "0.1 allows; see a.jsonl:1 (not text: column prompt (data.columns.prompt) has type list: ['question 0']), "
        "a.jsonl:4 (missing field: column target (data.columns.target)); all of them are in "
        f"{run_dir / 'rejected.parquet'}; correct them or raise the limit"
    )
    left = pq.read_table(run_dir / "rejected.parquet")
    assert left.schema.equals(REJECTED)
    assert left["source"].to_pylist() == [f"a.jsonl:{n}" for n in range(1, 5)]
    prepare(data(source=source, tokenizer=byte_tokenizer, train=2, max_rejected=0.7), store, run_dir)
    assert not (run_dir / "rejected.parquet").exists(), "it is beside the examples now"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages[1].content }}", "list object has no element 1"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_chat_template_that_fails(tmp_path, store, byte_tokenizer, template, said):
    folder = tmp_path / "tokenizer"
    shutil.copytree(byte_tokenizer, folder)
    (folder / "chat_template.jinja").write_text(template)
    source = jsonl(tmp_path / "a.jsonl", pairs(3))
    with pytest.raises(InputError) as error:
        prepare(data(source=source, tokenizer=str(folder), template="chat", train=2), store)
    assert str(error.value) == (
        f"tokenizer {folder}: its chat template fails on a user's message ({said}); correct the chat template, "
        "or set data.template to plain, dolly or a text with {prompt}"
    )


def test_examples_found_again_are_held_to_the_limit_on_rejected_rows(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [*pairs(4), {"prompt": "", "target": "a"}])
    shared = {"source": source, "tokenizer": byte_tokenizer, "train": 2, "test": 1}
    made = prepare(data(**shared, max_rejected=1), store)
    for again in (prepare, find_examples):
        with pytest.raises(InputError) as error:
            again(data(**shared), store)
        assert str(error.value) == (
            f"data.source {source}: 1 of 5 rows were rejected (1 empty prompt), more than data.max_rejected 0.1 "
            "allows; see a.jsonl:5 (empty prompt: column prompt (data.columns.prompt) is ''); all of them are in "
            f"{made.artifact.path / 'rejected.parquet'}; correct them or raise the limit"
        )
    found = find_examples(data(**shared, max_rejected=0.2), store)
    assert found is not None
    assert found.artifact.path == made.artifact.path


def test_complete_examples_are_found_without_loading_anything_heavy(tmp_path, store, caplog):
    source = jsonl(tmp_path / "a.jsonl", pairs(20))
    config = data(source=source, tokenizer={"vocab_size": 260}, train=10)
    made = prepare(config, store)
    with caplog.at_level(logging.INFO):
        assert prepare(config, store).rendering == made.rendering
    assert caplog.messages == [f"examples: 10 train, 0 validation, 10 test; 0 rejected (found in {made.artifact.name})"]
    program = f"""
import sys
from pathlib import Path
from cpo_pipe.pipeline.prepare.presets import PRESETS
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.prepare.prepare import prepare
config = PRESETS.parse({config.model_dump(exclude_unset=True)!r})
print(prepare(config, Store(Path({str(store.root)!r}))).artifact.path)
print([name for name in ("torch", "transformers", "datasets", "tokenizers") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [str(made.artifact.path), "[]"]
