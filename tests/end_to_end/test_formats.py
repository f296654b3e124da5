"""From five rows of each format to a training on their groups, and what the recipe says of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from cpo_pipe.data.store import Store
from cpo_pipe.recipe.load import load_recipe
from cpo_pipe.run import Run
from tests.support.chat_templates import family_tokenizer
from tests.support.marks import slow_except
from tests.support.models import make_model
from tests.support.project import Project

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {
    "type": "object", "properties": {"a": {"type": "string"}}}}}]  # fmt: skip


def user(n: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Say {n}."}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(n: int) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": str(n)})}}]}  # fmt: skip


ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "messages": ([{"messages": [user(n), said(f"It is {n}.")]} for n in range(5)], "messages"),
    "tools": (
        [{"messages": [user(n), call(n)], "tools": json.dumps(TOOLS)} for n in range(5)], "messages"
    ),
    "sharegpt": (
        [{"conversations": [{"from": "system", "value": "Count."}, {"from": "human", "value": f"Say {n}."},
                            {"from": "gpt", "value": f"{n}!"}]} for n in range(5)],
        "sharegpt",
    ),
    "alpaca": (
        [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!", "system": "Count."} for n in range(5)],
        "alpaca",
    ),
    "prompt-completion": (
        [{"prompt": [user(n)], "completion": [said(f"{n}!")]} for n in range(5)], "prompt-completion"
    ),
    "trl": (
        [{"prompt": [user(n)], "chosen": [said(f"{n}!")], "rejected": [said("no")]} for n in range(5)], "preference"
    ),
    "implicit": (
        [{"chosen": [user(n), said(f"{n}!")], "rejected": [user(n), said("no")]} for n in range(5)], "preference"
    ),
    "ultrafeedback": (
        [{"prompt": f"Say {n}.", "chosen": [user(n), said(f"{n}!")], "rejected": [user(n), said("no")]}
         for n in range(5)],
        "preference",
    ),
    "hh": (
        [{"chosen": f"\n\nHuman: Say {n}.\n\nAssistant: {n}!", "rejected": f"\n\nHuman: Say {n}.\n\nAssistant: no"}
         for n in range(5)],
        "preference",
    ),
    "plain preference": (
        [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": ["no", "never"]} for n in range(5)], "preference"
    ),
    "pairs": ([{"prompt": f"Say {n}.", "target": f"{n}!"} for n in range(5)], "pairs"),
}  # fmt: skip


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A tiny model with the tokenizer and the chat template of Qwen 3."""
    folder = make_model(tmp_path / "chat-model", vocab_size=400, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    family_tokenizer(folder, "qwen-3")
    return folder


def recipe(model: Path, negatives: str) -> str:
    return (
        f"data: {{source: rows.jsonl, tokenizer: {model}, template: chat, train: 5, max_prompt_tokens: 800}}\n"
        f"train:\n  cpo: {{init: {model}, objective: cpo, reference: {model}, max_steps: 1, batch_size: 5}}\n"
        f"{negatives}"
    )


@pytest.mark.parametrize("name", slow_except(ROWS, "pairs", "tools", "implicit"))
def test_from_five_rows_to_a_training(project: Project, chat_model: Path, name: str) -> None:
    rows, format_name = ROWS[name]
    project.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    has_rejected = format_name == "preference"
    sources = "" if has_rejected else "negatives: {sources: {batch: {count: 2}}}\nrank: {by: none}\n"
    project.write("chat.yaml", recipe(chat_model, sources))
    result = project.cli("run", "chat.yaml")
    assert result.status == 0, result.err
    assert f"examples: read 5 rows as {format_name}" in result.err
    resolver = Run(load_recipe("chat.yaml", []), "chat.yaml", Store("cpo-store"), Path("runs/chat")).resolver
    plan, groups = resolver.groups()
    tokenizer = resolver.examples().tokenizer.load()
    chat, end = ChatTemplate(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plan.selection.num_rows == 5
    found = groups.read(plan.selection["example_id"]).to_pylist()
    for example, group in zip(plan.selection.to_pylist(), found, strict=True):
        assert chat.prompt(Conversation.of_example(example)) == example["rendered"]
        assert example["rendered"].endswith("<|im_start|>assistant\n")
        assert ("Count." in example["rendered"]) is (name in ("sharegpt", "alpaca"))
        assert ("<tools>" in example["rendered"]) is (name == "tools")
        target, *negatives = group["candidates"]
        assert len(negatives) == (1 if has_rejected and name != "plain preference" else 2)
        assert ("never" in negatives[-1]["text"] or "no" in negatives[-1]["text"]) is has_rejected
        for candidate in (target, *negatives):
            assert candidate["token_ids"].count(end) == 1
            assert candidate["token_ids"][-1] == end
            assert tokenizer.decode(candidate["token_ids"]).startswith("<think>\n\n</think>\n\n")
    (checkpoint,) = project.store.glob("checkpoints/*/generation_config.json")
    assert json.loads(checkpoint.read_text())["eos_token_id"][0] == end, "first the token that ends targets"
