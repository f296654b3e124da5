import json
import re
from pathlib import Path

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.recipe.load import parse_recipe
from tests.support.ground_truth import by_split, data, jsonl

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, which is not part of the project")


def test_presets_fill_only_what_the_user_left_out():
    dolly = data(preset="dolly", tokenizer="t", columns={"category": None}, template="plain")
    assert (dolly.split_sizes(), dolly.source) == ((7505, 0, 7506), "databricks/databricks-dolly-15k")
    assert dolly.columns.model_dump() == {
        "prompt": "instruction", "target": "response", "context": "context", "category": None,
        "rejected": None, "system": None,
    }  # fmt: skip
    assert dolly.template == "plain"
    assert data(preset="dolly", tokenizer="t").template == "dolly"
    assert data(preset="dolly", tokenizer="t", test=5).split_sizes() == (None, 0, 5)
    gsm8k = data(preset="gsm8k", tokenizer="t", train=5)
    assert (gsm8k.source, gsm8k.subset, gsm8k.columns.target) == ("openai/gsm8k", "main", "answer")
    assert gsm8k.template == "Question: {prompt}\nAnswer:\n"
    assert data(preset="gsm8k", source="a.jsonl", tokenizer="t", train=5).subset is None


def test_a_preset_of_the_users_own(tmp_path, store, byte_tokenizer, monkeypatch):
    guide = Path(__file__).parents[3] / "docs" / "guide" / "custom-data.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_data.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    source = jsonl(tmp_path / "a.jsonl", [{"q": f"{n}?", "a": "yes"} for n in range(6)])
    quiz = data(preset="my_data:Quiz", source=source, tokenizer=byte_tokenizer)
    examples = prepare(quiz, store)
    assert {name: len(rows) for name, rows in by_split(examples).items()} == {"train": 3, "validation": 0, "test": 2}
    assert all(text.startswith("Q: ") for text in examples.read("train")["rendered"].to_pylist())


def test_an_incomplete_preset_is_refused_when_the_recipe_is_read(tmp_path, monkeypatch):
    code = 'from cpo_pipe.pipeline.prepare.base import Data\nclass Bare(Data):\n    """Rows."""\n'
    (tmp_path / "bare_data.py").write_text(code + "    def limits(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = {
        "data": {"preset": "bare_data:Bare", "source": "a.jsonl", "tokenizer": "t", "train": 1},
        "train": {"mle": {"objective": "mle", "init": "m"}},
    }
    message = r"data: preset bare_data:Bare is incomplete; implement corpus, encode, longest_target, rendering"
    with pytest.raises(InputError, match=message):
        parse_recipe(content, "r.yaml")


@needs_shared
def test_dolly_preset_on_its_own_rows(store, byte_tokenizer):
    limits = {"max_prompt_tokens": 100_000, "max_target_tokens": 100_000}
    shared = {"preset": "dolly", "source": str(SHARED / "dolly-150.jsonl"), "tokenizer": byte_tokenizer, **limits}
    with pytest.raises(InputError, match=r"data\.train 7,505 \+ data\.test 7,506: only 151 rows are left to split"):
        prepare(data(**shared), store)
    examples = prepare(data(**shared, train=100), store)
    assert {name: len(rows) for name, rows in by_split(examples).items()} == {"train": 100, "validation": 0, "test": 51}
    lines = (SHARED / "dolly-150.jsonl").read_text(encoding="utf-8").splitlines()
    contexts = {row["response"]: row["context"] for row in map(json.loads, lines)}
    for example in examples.read("train").to_pylist():
        context = contexts[example["target"]]
        assert example["rendered"].endswith(
            f"### Input:\n{context}\n\n### Response:\n" if context else "\n\n### Response:\n"
        )
        assert ("### Input:" in example["rendered"]) == bool(context)
