"""Our token ids against `apply_chat_template` on the whole conversation."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cpo_pipe.data.models.chat import ChatTemplate, Conversation, NotRenderable
from tests.support.chat_templates import FAMILIES, family_tokenizer, shipped

USER = {"role": "user", "content": "How many apples?"}
ANSWER = {"role": "assistant", "content": "34 apples."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Count things.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {"what": "apples"}}}],
}
RESULT = {"role": "tool", "name": "count", "content": "34"}

CONVERSATIONS = {
    "one turn": ([USER], ANSWER, []),
    "system": ([SYSTEM, USER], ANSWER, []),
    "several turns": ([USER, ANSWER, {"role": "user", "content": "And pears?"}], {**ANSWER, "content": "Two."}, []),
    "tool call": ([USER], CALL, [TOOL]),
    "after a tool": ([USER, CALL, RESULT], ANSWER, [TOOL]),
}
WITHOUT_TOOLS = ("chatml", "gemma", "phi", "olmo", "plain")
"""Families whose template renders no tools."""


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The arguments of calls as JSON text, which DeepSeek's template wants."""
    calls = [{**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
             for call in message.get("tool_calls", [])]  # fmt: skip
    return message | {"tool_calls": calls} if calls else message


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str, tmp_path: Path) -> PreTrainedTokenizerFast:
    return family_tokenizer(tmp_path / family, family)


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_ids_are_those_of_the_whole_conversation_up_to_the_end_of_the_turn(
    family: str, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    messages, answer, tools = CONVERSATIONS[kind]
    if tools and family in WITHOUT_TOOLS:
        pytest.skip("its template renders no tools")
    chat = ChatTemplate(tokenizer)
    rendered, prompt_ids, answer_ids = chat.encode(Conversation(messages, tools), answer)
    theirs = [with_text_arguments(message) for message in (*messages, answer)] if family == "deepseek" else [
        *messages, answer]  # fmt: skip
    whole: Any = tokenizer.apply_chat_template(theirs, tools=tools or None, return_dict=False)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family][2])
    ours = [*prompt_ids, *answer_ids]
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]).strip() in ("", tokenizer.eos_token), "nothing but the template's own"
    assert answer_ids[-1] == end
    assert answer_ids.count(end) == 1
    alone: Any = tokenizer.apply_chat_template(
        theirs[:-1], tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids == alone, "what the model is given when it writes"
    assert rendered == tokenizer.decode(prompt_ids)
    assert chat.end_of_turn == end
    assert (answer["content"] or "count") in tokenizer.decode(answer_ids)


def test_one_bos_and_one_end_whatever_the_text_has(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    _, eos, end, _ = FAMILIES[family]
    bos = tokenizer.bos_token or ""
    chat = ChatTemplate(tokenizer)
    prompt = [{"role": "user", "content": f"{bos}a {end} b {eos}"}]
    answer = chat.without_end({"role": "assistant", "content": f"c {end} d{end}\n{eos}"})
    assert answer["content"] == f"c {end} d"
    _, prompt_ids, answer_ids = chat.encode(Conversation(prompt), answer)
    clean, clean_answer = Conversation([{"role": "user", "content": "a b"}]), {"role": "assistant", "content": "c d"}
    special = set(tokenizer.all_special_ids)
    _, clean_prompt, clean_ids = chat.encode(clean, clean_answer)
    for found, expected in ((prompt_ids, clean_prompt), (answer_ids, clean_ids)):
        assert [token for token in found if token in special] == [token for token in expected if token in special]


def test_qwen_3_writes_an_empty_thought_before_an_answer(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "qwen-3")
    think, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    chat = ChatTemplate(tokenizer)
    _, _, ids = chat.encode(Conversation([USER]), ANSWER)
    assert (ids[0], ids.index(close)) == (think, 3), "<think>, two line feeds, </think>"
    assert chat.text_of(ANSWER, ids) == "<think>\n\n</think>\n\n34 apples."
    _, _, ids = chat.encode(Conversation([USER]), {**ANSWER, "reasoning_content": "Count."})
    assert tokenizer.decode(ids) == "<think>\nCount.\n</think>\n\n34 apples.<|im_end|>"
    off = ChatTemplate(tokenizer, settings={"enable_thinking": False})
    rendered, _, ids = off.encode(Conversation([USER]), ANSWER)
    assert rendered.endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(ids) == "34 apples.<|im_end|>"


def test_a_prompt_that_is_no_prefix_of_the_whole_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "plain")
    tokenizer.chat_template = tokenizer.chat_template.replace("ASSISTANT: {%", "Answer: {%")
    with pytest.raises(NotRenderable, match=r"character 23: the prompt has '.*Answer: ', the whole .*ASSISTANT: 34"):
        ChatTemplate(tokenizer).encode(Conversation([USER]), ANSWER)
    tokenizer.chat_template = shipped("deepseekv3")
    with pytest.raises(NotRenderable, match=r"the prompt has '.*<think>.n', the whole conversation '.*34 apples"):
        ChatTemplate(tokenizer).encode(Conversation([USER]), ANSWER)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(NotRenderable, match="writes nothing of the assistant's message"):
        ChatTemplate(tokenizer).encode(Conversation([USER]), ANSWER)


def test_tokens_that_merge_across_the_boundary_are_refused(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "plain")
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = tokenizer.chat_template.replace("ASSISTANT: {% endif", "ASSISTANT:\n{% endif").replace(
        "upper }}: {{ m.content }}", "upper }}:\n{{ m.content }}"
    )
    chat = ChatTemplate(tokenizer)
    chat.encode(Conversation([USER]), ANSWER)
    with pytest.raises(NotRenderable, match=r"token \d+ is .* alone, but .* with the answer behind it"):
        chat.encode(Conversation([USER]), {**ANSWER, "content": "\n34"})


def test_a_template_without_an_end_of_turn_gets_the_eos(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "plain")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
    chat = ChatTemplate(tokenizer)
    _, _, ids = chat.encode(Conversation([USER]), ANSWER)
    assert (chat.end_of_turn, tokenizer.decode(ids)) == (None, "34 apples.<eos>")


def test_a_tokenizer_that_adds_a_bos_does_not_double_it(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "mistral")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    _, prompt_ids, _ = ChatTemplate(tokenizer).encode(Conversation([USER]), ANSWER)
    assert prompt_ids.count(tokenizer.bos_token_id) == 1


def test_a_conversation_is_the_same_after_json() -> None:
    conversation = Conversation([SYSTEM, USER, CALL, RESULT], [TOOL])
    row = {"prompt": conversation.text, "messages": conversation.to_json()}
    assert Conversation.of_example(row) == conversation
    assert Conversation.of_example({"prompt": "hi", "messages": None}).messages == [{"role": "user", "content": "hi"}]
    assert Conversation([SYSTEM, USER]).text == "How many apples?", "what a reader looks for"
    assert conversation.text.startswith("system: Be brief.\n\nuser: How many apples?\n\nassistant: {")
