"""A sweep over decodings: all from one recipe, each generated once, on examples drawn by a seed."""

from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.store import Store
from cpo_pipe.eval.evaluate import Evaluation
from cpo_pipe.pipeline import samples
from tests.support.evaluation import Bench, no_engine

SWEEP: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8},
    "cool": {"temperature": 0.5},
    "beam": {"beams": 3},
}


def texts(result: Evaluation) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in result.table("outputs").to_pylist():
        found.setdefault((row["system"], row["decoding"]), []).append(row["text"])
    return found


def made(store: Store) -> dict[str, int]:
    """Rows of each artifact of generations."""
    return {path.name: len([*path.glob("shards/*")]) for path in (Path(store.root) / "generations").iterdir()}


def test_each_decoding_is_generated_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_engine, opened = samples.choose_engine, []

    def opening(*arguments: Any) -> Any:
        opened.append(arguments[1].path)
        return choose_engine(*arguments)

    monkeypatch.setattr(samples, "choose_engine", opening)
    without = {name: decoding for name, decoding in SWEEP.items() if name != "top-p"}
    first = texts(bench.run(decodings=without))
    assert opened == [model.path for model in bench.models.values()], "one engine for sampling and beam search"
    assert {decoding for _, decoding in first} == {*without}
    assert all(len(found) == 12 for found in first.values())
    assert len({tuple(found) for found in first.values()}) == len(first), "no two write the same"
    before = made(bench.store)

    more = texts(bench.run(decodings=SWEEP))
    assert {of: found for of, found in more.items() if of in first} == first
    assert {of for of in more if of not in first} == {("one", "top-p"), ("two", "top-p")}
    after = made(bench.store)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2

    monkeypatch.setattr(samples, "choose_engine", no_engine)
    assert texts(bench.run(decodings=SWEEP, bootstrap=300)) == more
    assert made(bench.store) == after


def test_beam_search_writes_what_transformers_writes(bench: Bench) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = bench.run(decodings={"greedy": SWEEP["greedy"], "beam": SWEEP["beam"]}, engine="auto")
    tokenizer = bench.examples.tokenizer.load()
    model: Any = AutoModelForCausalLM.from_pretrained(bench.models["two"].path)
    for prompt_ids, text in zip(result.examples["prompt_ids"].to_pylist(), texts(result)["two", "beam"], strict=True):
        prompt = torch.tensor([prompt_ids])
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=3, do_sample=False, max_new_tokens=6,
            eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        assert text == tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


def test_examples_are_drawn_by_a_seed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(**settings: Any) -> list[str]:
        found: list[str] = bench.run(**settings).examples["example_id"].to_pylist()
        return found

    whole = ids()
    monkeypatch.setattr(samples, "choose_engine", no_engine)  # what was made of the whole is found
    assert ids(examples=5) == whole[:5]
    drawn = ids(examples=5, sample_seed=1)
    assert len(drawn) == 5
    assert drawn == [one for one in whole if one in drawn]
    assert {*drawn} < {*ids(examples=8, sample_seed=1)}
    assert len({tuple(ids(examples=5, sample_seed=seed)) for seed in range(4)} | {tuple(whole[:5])}) > 3
