"""What a row of each format holds."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.chat import content_of
from cpo_pipe.pipeline.prepare.formats import FORMATS, Turn, Unusable, detect
from tests.support.marks import slow_except

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
WORSE = {"role": "assistant", "content": "No idea."}
HH = "\n\nHuman: Why?\n\nAssistant:"


def last(name: str, row: dict[str, Any]) -> Turn:
    return list(FORMATS[name].read(row))[-1]


ONE_PROMPT: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [USER, ANSWER]}),
    ("messages", {"messages": [USER, ANSWER, {"role": "user", "content": "Thanks."}]}),
    ("messages", {"messages": '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]'}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ANSWER]}),
    ("messages", {"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER], "tools": None}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}),
    ("sharegpt", {"conversations": [USER, ANSWER]}),
    ("alpaca", {"instruction": "Why?", "input": "", "output": "Because."}),
    ("alpaca", {"instruction": "Why?", "output": "Because."}),
    ("prompt-completion", {"prompt": "Why?", "completion": "Because."}),
    ("prompt-completion", {"prompt": [USER], "completion": [ANSWER]}),
    ("preference", {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}),
    ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}),
    ("preference", {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}),
    ("preference", {"chosen": f"{HH} Because.", "rejected": f"{HH} No idea."}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), ONE_PROMPT)
def test_all_formats_write_one_question_alike(name: str, row: dict[str, Any]) -> None:
    assert detect(list(row), "s") == name
    turn = last(name, row)
    assert [dict(message) for message in turn.prompt.messages] == [USER]
    assert turn.answer == ANSWER
    assert list(turn.rejected) == ([WORSE] if name == "preference" else [])


@pytest.mark.parametrize(("chosen", "rejected"), [("[1, 2]", "[3]"), ('{"a": 1}', '{"a": 2}'), ('[{"a": 1}]', "[]")])
def test_an_answer_that_is_json_is_a_text(chosen: str, rejected: str) -> None:
    turn = last("preference", {"prompt": "[0]", "chosen": chosen, "rejected": rejected})
    assert turn.prompt.messages == [{"role": "user", "content": "[0]"}]
    assert (turn.answer["content"], [one["content"] for one in turn.rejected]) == (chosen, [rejected])
    assert last("prompt-completion", {"prompt": "{}", "completion": chosen}).answer["content"] == chosen
    messages = '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]'
    assert last("preference", {"chosen": messages, "rejected": messages}).answer == ANSWER, "as CSV has messages"


def test_a_system_message_before_an_answer_that_has_the_question_is_kept() -> None:
    turn = last("preference", {"prompt": [SYSTEM], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]})
    assert turn.prompt.messages == [SYSTEM, USER]


def test_every_answer_of_a_conversation_has_all_before_it_as_its_prompt() -> None:
    messages = [SYSTEM, USER, ANSWER, {"role": "user", "content": "And?"}, WORSE]
    one, two = FORMATS["messages"].read({"messages": messages})
    assert (one.prompt.messages, one.answer) == (messages[:2], ANSWER)
    assert (two.prompt.messages, two.answer) == (messages[:4], WORSE)


def test_alpaca_with_input_and_history() -> None:
    turn = last("alpaca", {"instruction": "Sum up.", "input": "A text.", "output": "Done.", "history": [["Hi", "Yo"]]})
    assert [(one["role"], one["content"]) for one in turn.prompt.messages] == [
        ("user", "Hi"), ("assistant", "Yo"), ("user", "Sum up.\n\nA text."),
    ]  # fmt: skip


def test_several_rejected_answers_in_both_forms() -> None:
    texts = last("preference", {"prompt": "Why?", "chosen": "a", "rejected": ["b", "c"]})
    messages = last("preference", {"chosen": [USER, ANSWER], "rejected": [[USER, WORSE], [USER, ANSWER]]})
    assert [one["content"] for one in texts.rejected] == ["b", "c"]
    assert [one["content"] for one in messages.rejected] == ["No idea.", "Because."]


def test_the_common_start_of_two_texts_up_to_a_space_is_their_prompt() -> None:
    turn = last("preference", {"chosen": "The sky is blue today", "rejected": "The sky is black"})
    assert turn.prompt.messages == [{"role": "user", "content": "The sky is"}]
    assert (turn.answer["content"], turn.rejected[0]["content"]) == (" blue today", " black")


def test_calls_of_tools_in_all_ways_of_writing_are_one() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    written = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}]},
        {"conversations": [USER, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
    ]  # fmt: skip
    for row in written:
        turn = last("messages" if "messages" in row else "sharegpt", row)
        (found,) = turn.answer["tool_calls"]
        assert found["function"] == call["function"]
    tools = [{"name": "add", "parameters": {}}]
    for written in (tools, '[{"name": "add", "parameters": {}}]', [{"type": "function", "function": tools[0]}]):
        turn = last("messages", {"messages": [USER, ANSWER], "tools": written})
        assert turn.prompt.tools == [{"type": "function", "function": tools[0]}]


def test_reasoning_under_both_names() -> None:
    for key in ("reasoning", "reasoning_content"):
        turn = last("messages", {"messages": [USER, {**ANSWER, key: "Think."}]})
        assert turn.answer == {**ANSWER, "reasoning_content": "Think."}


@pytest.mark.parametrize(
    ("name", "row", "reason", "detail"),
    [
        ("messages", {"messages": "hi"}, "not messages", "column messages is 'hi', not a list of messages"),
        ("messages", {"messages": []}, "not messages", r"column messages is \[\], not a list"),
        ("messages", {"messages": ["hi"]}, "not messages", "column messages, message 0 is 'hi'"),
        ("messages", {"messages": [{**USER, "role": "bird"}]}, "unknown role", "message 0 has the role 'bird'; known"),
        ("messages", {"messages": [USER]}, "no answer", "column messages has no message of the assistant"),
        ("messages", {"messages": [{"role": "user", "content": 3}, ANSWER]}, "not text", "has the content 3"),
        ("messages", {"messages": [USER, ANSWER], "tools": "x"}, "not tools", "column tools is 'x'"),
        ("prompt-completion", {"prompt": [USER], "completion": None}, "missing field", "column completion"),
        ("prompt-completion", {"prompt": None, "completion": "a"}, "not messages", "column prompt is None"),
        ("alpaca", {"instruction": 4, "output": "a"}, "not text", "column instruction has type int: 4"),
        ("preference", {"prompt": [USER], "chosen": [USER], "rejected": [WORSE]}, "no answer", "role user, not the"),
        ("preference", {"chosen": "a b", "rejected": "c d"}, "no prompt", "do not begin alike"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]}, "another prompt", "rejected"),
        ("preference", {"prompt": "p", "chosen": None, "rejected": "c"}, "missing field", "column chosen"),
    ],
)  # fmt: skip
def test_rows_that_break_a_rule(name: str, row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(Unusable, match=detail) as caught:
        last(name, row)
    assert caught.value.reason == reason


def test_columns_of_no_format() -> None:
    with pytest.raises(InputError, match=r"its columns \(q, a\) are those of no known format; set data\.columns\.prom"):
        detect(["q", "a"], "s")


KEYS = st.sampled_from(["role", "content", "function", "name", "arguments", "type", "text"])
WORDS = st.sampled_from(["user", "assistant", "gpt", "system", "function_call", "text", "[1]", "{}", '{"name": 1}', ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
CALLS = st.lists(st.fixed_dictionaries({"function": VALUES}) | VALUES, max_size=2) | VALUES
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS}, optional={"content": VALUES, "tool_calls": CALLS})
    | st.fixed_dictionaries({"from": WORDS, "value": VALUES}),
    max_size=3,
)


@pytest.mark.parametrize("name", slow_except(FORMATS, "preference"))
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_a_row_holds_it_is_read_or_refused(name: str, data: st.DataObject) -> None:
    known = FORMATS[name]
    row = {column: data.draw(MESSAGES | VALUES, label=column) for column in (*known.columns, *known.optional)}
    try:
        turns = list(known.read(row))
    except Unusable:
        return
    for turn in turns:
        json.loads(turn.prompt.to_json())
        assert isinstance(content_of(turn.answer), str)
        assert all(isinstance(message["content"], str) for message in (*turn.prompt.messages, turn.answer))
