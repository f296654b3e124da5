"""Exported conversations: TRL makes our token ids of them, for ten families of chat templates, and so do we again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.export.messages import MessageWriter
from cpo_pipe.pipeline.export.trl_tokens import PromptedCandidate
from cpo_pipe.recipe.load import load_recipe
from cpo_pipe.run import Run
from tests.support.chat_templates import FAMILIES, family_tokenizer, shipped
from tests.support.marks import slow_except
from tests.support.project import Project

ONLY = 'negatives={"sources": {"rejected": {}}}'
trl_side = pytest.importorskip("tests.support.trl_side", reason="trl is not installed")

USER = {"role": "user", "content": "How many äpfel?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Count things.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}, "of": {"type": "number"}}},
    },
}
WITHOUT_TOOLS = ("chatml", "gemma", "phi", "olmo", "plain")
"""Families whose template renders no tools."""
AFTER_END = {"chatml": "\n", "gemma": "\n", "phi": "\n<|endoftext|>", "qwen-3": "\n", "granite": "\n"}
"""What the templates write after the end of the last turn, on which TRL trains with the tokenizer's own template."""


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(**arguments: Any) -> dict[str, Any]:
    return said("", tool_calls=[{"type": "function", "function": {"name": "count", "arguments": arguments}}])


def rows_of(family: str) -> list[dict[str, Any]]:
    """Preference data with one row of each kind."""
    more = {"role": "user", "content": f"And pears? {FAMILIES[family][2]}"}  # a control token as text
    answers: dict[str, Any] = {"chosen": [said("34 apples.")], "rejected": [said("35 apples.")]}
    rows = [
        {"prompt": [USER], **answers},
        {"prompt": [USER], **answers, "rejected": [said("36.")]},
        {"prompt": [SYSTEM, USER], **answers},
        {"prompt": [USER, said("Two."), more], **answers},
        {"prompt": [USER | {"content": "Think."}], "chosen": [said("34.", reasoning_content="Count.")],
         "rejected": [said("35.", reasoning_content="Guess.")]},
    ]  # fmt: skip
    if family not in WITHOUT_TOOLS:
        asked, result = call(what="apples", of=0.1), {"role": "tool", "name": "count", "content": "34"}
        rows += [
            {"prompt": [USER], "tools": [TOOL], "chosen": [asked], "rejected": [call(of=[1, {"a": None}])]},
            {"prompt": [USER], "tools": [TOOL], "chosen": [asked], "rejected": [said("34, I guess.")]},
            {"prompt": [USER, asked, result], "tools": [TOOL], **answers},
        ]
    return rows


def options(source: str, family: str, **data: Any) -> list[str]:
    train = 6 if family not in WITHOUT_TOOLS else 4  # rows with the same prompt and target are one example
    section = {"source": source, "tokenizer": "chat", "train": train, "max_prompt_tokens": 4000, **data}
    negatives = {"sources": {"rejected": {"count": 2}, "batch": {"count": 1}}}
    return ["--set", f"data={json.dumps(section)}", "--set", f"negatives={json.dumps(negatives)}"]


Group = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and its candidates."""


def grouped(project: Project, *settings: str) -> list[Group]:
    for stage in ("prepare", "generate-negatives", "rank"):
        result = project.cli(stage, "tiny.yaml", *settings)
        assert result.status == 0, result.err
    run = Run(load_recipe("tiny.yaml", list(settings[1::2])), "tiny.yaml", Store("cpo-store"), Path("runs/tiny"))
    plan, groups = run.resolver.groups()
    return [(group["prompt_ids"], [candidate["token_ids"] for candidate in group["candidates"]])
            for group in groups.read(plan.selection["example_id"]).to_pylist()]  # fmt: skip


def pairs_of(groups: list[Group]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    for prompt, (target, *negatives) in groups:
        yield from ((prompt, target, negative) for negative in negatives)


@pytest.fixture(params=slow_except(FAMILIES, "qwen-3", "gemma", "llama-3", "mistral"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str, project: Project) -> PreTrainedTokenizerFast:
    project.write("talk.jsonl", "".join(json.dumps(row) + "\n" for row in rows_of(family)))
    return family_tokenizer(project.root / "chat", family)


def test_trl_makes_our_token_ids_of_messages(project: Project, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = options("talk.jsonl", family)
    groups = grouped(project, *settings)
    result = project.cli("export", "tiny.yaml", "--out", "out", *settings)
    assert result.status == 0, result.err
    card = Path("out/README.md").read_text()
    template = Path("out/chat_template.jinja")
    assert template.exists() is (family in AFTER_END) is ("chat_template.jinja" in card)
    rows = datasets.load_dataset("out", split="train")
    if template.exists():
        behind = tokenizer.encode(AFTER_END[family])
        longer = trl_side.tokenized(rows, tokenizer)
        assert [row["chosen_ids"] for row in longer] == [target + behind for _, target, _ in pairs_of(groups)]
        tokenizer.chat_template = template.read_text()
    theirs = trl_side.tokenized(rows, tokenizer)
    assert [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in theirs] == list(pairs_of(groups))
    assert len(theirs) >= 2 * len(groups)
    texts = sum(len(candidates) for _, candidates in groups)
    assert f" 0 of {texts} texts get other token ids" in card
    assert "TRL will give" not in result.err
    assert 'AutoTokenizer.from_pretrained("chat")' in card


@pytest.mark.parametrize("family", ["llama-3", "mistral", "qwen-3"], indirect=True)
def test_what_is_exported_is_read_again(project: Project, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = options("talk.jsonl", family)
    groups = grouped(project, *settings)
    assert project.cli("export", "tiny.yaml", "--out", "out", *settings).status == 0
    negatives = '{"sources": {"rejected": {"count": 3}}}'
    again = grouped(project, *options("out", family, format="preference"), "--set", f"negatives={negatives}")
    assert sorted(again) == sorted(groups)
    assert max(len(candidates) for _, candidates in groups) == 4


def test_messages_are_structs_where_they_are_texts_and_json_where_they_are_more(project: Project) -> None:
    family_tokenizer(project.root / "chat", "qwen-3")
    rows = rows_of("qwen-3")
    for out, count, kind in (("simple", 1, USER), ("more", 6, json.dumps(USER, ensure_ascii=False))):
        project.write("talk.jsonl", "".join(json.dumps(row) + "\n" for row in rows[: None if count > 1 else 1]))
        settings = [*options("talk.jsonl", "qwen-3", train=count), "--set", ONLY]
        grouped(project, *settings)
        assert project.cli("export", "tiny.yaml", "--out", out, *settings).status == 0
        table = pq.read_table(f"{out}/data/train-00000.parquet")
        assert table["prompt"].to_pylist().count([kind]) >= 1
        assert ("tools" in table.column_names) is (out == "more")
        assert ("`datasets` 4.7" in Path(out, "README.md").read_text()) is (out == "more")
    calls = [row["chosen"][0] for row in datasets.load_dataset("more", split="train") if row["tools"]]
    assert call(what="apples", of=0.1) in calls, "without keys of other messages"


def test_arguments_of_the_chat_template_go_with_it(project: Project) -> None:
    tokenizer = family_tokenizer(project.root / "chat", "qwen-3")
    project.write("talk.jsonl", json.dumps(rows_of("qwen-3")[0]))
    settings = [
        *options("talk.jsonl", "qwen-3", train=1, chat_template_kwargs={"enable_thinking": False}),
        "--set",
        ONLY,
    ]
    groups = grouped(project, *settings)
    assert project.cli("export", "tiny.yaml", "--out", "out", *settings).status == 0
    rows = datasets.load_dataset("out", split="train")
    assert rows["chat_template_kwargs"] == [{"enable_thinking": False}]
    (row,) = trl_side.tokenized(rows, tokenizer)
    ((prompt, (target, _)),) = groups
    assert (row["prompt_ids"], row["chosen_ids"]) == (prompt, target + tokenizer.encode("\n"))
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("arguments", [{}, {"date_string": "26 Jul 2024"}])
def test_a_date_that_the_template_prints_is_named_unless_it_is_given(
    project: Project, arguments: dict[str, Any]
) -> None:
    tokenizer = family_tokenizer(project.root / "chat", "llama-3")
    tokenizer.chat_template = shipped("llama3_2")
    tokenizer.save_pretrained("chat")
    project.write("talk.jsonl", json.dumps(rows_of("llama-3")[0]))
    settings = [*options("talk.jsonl", "llama-3", train=1, chat_template_kwargs=arguments), "--set", ONLY]
    ((prompt, _),) = grouped(project, *settings)
    result = project.cli("export", "tiny.yaml", "--out", "out", *settings)
    said_of_dates = "TRL will give 2 of 2 texts other token ids than they have here: the chat template prints the day"
    assert (said_of_dates in result.err) is not bool(arguments)
    (row,) = trl_side.tokenized(datasets.load_dataset("out", split="train"), tokenizer)
    assert row["prompt_ids"] == prompt or not arguments


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<think>\n\n</think>\n\n35 apples.", "35 apples."),
        ("<think>\nLet me see.\n</think>\n\n35 apples.", "<think>\nLet me see.\n</think>\n\n35 apples."),
    ],
)
def test_a_sampled_text_has_no_start_that_the_template_writes(tmp_path: Path, text: str, content: str) -> None:
    tokenizer = family_tokenizer(tmp_path, "qwen-3")
    examples = pa.Table.from_pylist([], schema=EXAMPLES)
    chat = ChatTemplate(tokenizer)
    conversation = Conversation([USER])
    rendered = chat.prompt(conversation)
    ids = tokenizer.encode(text + "<|im_end|>")
    (written,) = MessageWriter(tokenizer, {"template": "chat"}, examples).write(
        [PromptedCandidate(conversation, rendered, tokenizer.encode(rendered), text, ids)]
    )
    assert written.completion == [said(content)]
    assert written.same_ids
    (other,) = MessageWriter(tokenizer, {"template": "chat"}, examples).write(
        [
            PromptedCandidate(
                conversation, rendered, tokenizer.encode(rendered), "35.", tokenizer.encode("35.<|im_end|>")
            )
        ]
    )
    assert not other.same_ids, "the template writes a thought before it"
