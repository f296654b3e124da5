"""A model that knows the answers, and ends its turns, still does so after training on its own samples."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from tests.support.chat_templates import FAMILIES, family_tokenizer
from tests.support.models import make_model
from tests.support.project import Project

PAIRS = [("red?", "yes"), ("blue?", "no"), ("tall?", "maybe"), ("old?", "never")]


def end_probabilities(folder: Path, tokenizer: Path, end: str) -> list[float]:
    """p(end of turn) after each right answer."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat, found = ChatTemplate(loaded), []
    for question, answer in PAIRS:
        _, prompt, ids = chat.encode(Conversation.of_text(question), {"role": "assistant", "content": answer})
        assert loaded.convert_ids_to_tokens(ids[-1]) == end
        with torch.no_grad():
            found.append(float(model(torch.tensor([prompt + ids[:-1]])).logits[0, -1].softmax(-1)[ids[-1]]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "qwen-3"])
def test_p_of_the_end_of_turn_stays_over_50_steps(project: Project, tmp_path: Path, family: str) -> None:
    end = FAMILIES[family][2]
    model = make_model(tmp_path / "base", vocab_size=320, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    family_tokenizer(model, family)
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in PAIRS]  # fmt: skip
    project.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    project.write(
        "end.yaml",
        f"""
data: {{source: rows.jsonl, tokenizer: {model}, train: 4}}
train:
  mle: {{init: {model}, objective: mle, max_steps: 250, batch_size: 4, learning_rate: 0.005}}
  cpo: {{init: mle, objective: cpo, reference: mle, beta: 0.5, max_steps: 50, batch_size: 4, learning_rate: 0.0001}}
negatives:
  sources:
    autoregressive: {{model: mle, count: 4, max_new_tokens: 40, temperature: 1.2, engine: transformers}}
    truncation: {{count: 1}}
    batch: {{count: 1}}
rank: {{by: none}}
""",
    )
    result = project.cli("run", "end.yaml")
    assert result.status == 0, result.err
    folders = {json.loads((path / "spec.json").read_text())["settings"]["objective"]: path
               for path in project.store.glob("checkpoints/[!.]*")}  # fmt: skip
    before, after = (end_probabilities(folders[name], model, end) for name in ("mle", "cpo"))
    assert min(before) > 0.9, "it knows the answers"
    assert all(late > early - 0.1 for early, late in zip(before, after, strict=True)), (before, after)
