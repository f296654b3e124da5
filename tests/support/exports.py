"""Exports of a project."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from cpo_pipe.data.store import Store
from cpo_pipe.recipe.load import load_recipe
from cpo_pipe.run import Run
from tests.support.project import Project

BATCH = ("--set", "negatives={sources: {batch: {count: 2}, truncation: {count: 1}}}")
"""Negatives that all end, and need no model."""


def grouped(project: Project, *options: str) -> Run:
    """Make the groups of the project's recipe."""
    for stage in ("prepare", "generate-negatives", "rank"):
        result = project.cli(stage, "tiny.yaml", *options)
        assert result.status == 0, result.err
    return opened(*options)


def opened(*options: str) -> Run:
    return Run(load_recipe("tiny.yaml", list(options[1::2])), "tiny.yaml", Store("cpo-store"), Path("runs/tiny"))


def exported(project: Project, *options: str, out: str = "out") -> list[dict[str, Any]]:
    result = project.cli("export", "tiny.yaml", "--out", out, *options)
    assert result.status == 0, result.err
    files = sorted((project.root / out).glob("data/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def groups_of(run: Run) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Example and candidates of each group, in the order of the selection."""
    sources, groups = run.resolver.groups()
    found = groups.read(sources.selection["example_id"]).to_pylist()
    return [(e, g["candidates"]) for e, g in zip(sources.selection.to_pylist(), found, strict=True)]


def row_of(example: dict[str, Any], one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": example["rendered"],
        "chosen": one["text"],
        "rejected": other["text"],
        "example_id": example["example_id"],
        "chosen_strategy": one["strategy"],
        "rejected_strategy": other["strategy"],
        "similarity": other["similarity"],
    }


TEMPLATE = ("--set", "data.template='Q: {prompt} A:'")


CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_chat(project: Project, template: str | None) -> None:
    """The project's tokenizer with another chat template, in the folder `chat`."""
    tokenizer = AutoTokenizer.from_pretrained(project.model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained("chat")


OTHER = (*BATCH, "--set", "data.tokenizer=chat")
CHAT = (*OTHER, "--set", "data.template=chat")
