"""Conversations as examples."""

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.pipeline.prepare.prepare import prepare
from tests.support.ground_truth import by_split, data, jsonl


def one(tmp_path, store, tokenizer, row, **config):
    source = jsonl(tmp_path / "one.jsonl", [row])
    (example,) = prepare(data(source=source, tokenizer=tokenizer, train=1, **config), store).read("train").to_pylist()
    return example


def conversation(n: int, turns: int = 3) -> dict[str, list[dict[str, str]]]:
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(turns):
        messages += [{"role": "user", "content": f"Ask {n}.{turn}"}, {"role": "assistant", "content": f"It is {turn}."}]
    return {"messages": messages}


def test_turns_of_one_conversation_are_in_one_split_and_others_are_not(tmp_path, store, chat_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [conversation(n) for n in range(20)])
    config = data(source=source, tokenizer=chat_tokenizer, turns="every", train=30)
    examples = prepare(config, store)
    splits = {name: {prompt.split("Ask ")[1].split(".")[0] for prompt in prompts}
              for name, prompts in by_split(examples).items() if prompts}  # fmt: skip
    assert splits.keys() == {"train", "test"}
    assert not splits["train"] & splits["test"]
    assert len(splits["train"]) == len(splits["test"]) == 10
    assert examples.count("train") == examples.count("test") == 30


def test_the_last_answer_is_the_target_and_a_row_without_one_is_rejected(tmp_path, store, chat_tokenizer, caplog):
    caplog.set_level("INFO")
    rows = [conversation(0), conversation(1), {"messages": [{"role": "user", "content": "Hi"}]}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    examples = prepare(data(source=source, tokenizer=chat_tokenizer, train=1, max_rejected=0.5), store)
    assert examples.rendering["template"] == "chat"
    assert {target for targets in by_split(examples, "target").values() for target in targets} == {"It is 2."}
    assert "examples: read 3 rows as messages" in caplog.text
    assert examples.artifact.manifest["rejected"] == {"no answer": 1}


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({"turns": "every"}, {"prompt": "a", "target": "b"}, r"data\.turns is every, but data\.format is pairs"),
        ({"template": "plain"}, conversation(0), r"\(1 conversation\).*need data\.template: chat"),
        ({"system": "Be brief."}, {"prompt": "a", "target": "b"}, None),
        ({"columns": {"system": "s"}, "template": "chat"}, {"prompt": "a", "target": "b", "s": "Be brief."}, None),
        ({"columns": {"system": "s"}}, {"prompt": "a", "target": "b", "s": "Be brief."}, "1 conversation"),
    ],
)  # fmt: skip
def test_system_messages_and_turns(tmp_path, store, chat_tokenizer, settings, row, message):
    config = data(source=jsonl(tmp_path / "a.jsonl", [row]), tokenizer=chat_tokenizer, train=1, **settings)
    if message is not None:
        with pytest.raises(InputError, match=message):
            prepare(config, store)
        return
    (example,) = prepare(config, store).read("train").to_pylist()
    assert example["rendered"] == "<s><|start|>Be brief.<|end|><|start|>a<|end|><|start|>"
    assert example["prompt"] == "a"


@pytest.mark.parametrize("target", ['{"a": 1}', "[1, 2]", '[{"role": "user", "content": "x"}]'])
def test_a_target_that_is_json_is_a_text_as_are_rejected_ones(tmp_path, store, chat_tokenizer, target):
    row = {"prompt": "[3]", "target": target, "bad": [target + " ", "[]"]}
    example = one(tmp_path, store, chat_tokenizer, row, columns={"rejected": "bad"})
    assert (example["prompt"], example["target"], example["messages"]) == ("[3]", target, None)
    assert [answer["text"] for answer in example["rejected"]] == [target + " ", "[]"]


def test_settings_of_chat_templates_are_refused_with_other_templates():
    for key, value in (("system", "Be brief."), ("chat_template_kwargs", {"enable_thinking": False})):
        with pytest.raises(ValueError, match=f"{key} is not used with the template plain; set template: chat"):
            data(source="a.jsonl", tokenizer="t", train=1, template="plain", **{key: value})


def test_targets_and_rejected_answers_may_be_messages_in_columns_of_any_name(tmp_path, store, chat_tokenizer):
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    row = {"question": "Why?", "good": [user, answer], "bad": [user, {**answer, "content": "No."}]}
    columns = {"prompt": "question", "target": "good", "rejected": "bad"}
    example = one(tmp_path, store, chat_tokenizer, row, template="chat", columns=columns)
    assert (example["prompt"], example["target"]) == ("Why?", "So.")
    (rejected,) = example["rejected"]
    assert (rejected["text"], rejected["ends"]) == ("No.", True)
    assert rejected["token_ids"][-1] == example["target_ids"][-1]
