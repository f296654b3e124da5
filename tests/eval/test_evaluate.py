"""Evaluations of tiny models: figures, reuse, and what is refused."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.schemas import EXAMPLES, METRICS
from cpo_pipe.data.store import Rows
from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.pipeline import samples
from tests.support.evaluation import DECODINGS, Bench, figures, no_engine


def test_an_evaluation_has_all_figures(bench: Bench) -> None:
    result = bench.run(decodings=DECODINGS)
    found = figures(result)

    assert result.table("metrics").schema.equals(METRICS)
    text = {"rep-4", "repetition loops", "distinct-1", "distinct-2", "distinct-3", "length"}
    per_decoding = {*text, "chrF", "exact match"}
    wins = {"exact win", "exact tie", "exact loss", "exact win rate"}
    expected = {(GROUND_TRUTH, "-", name) for name in text}
    likelihood = ("target NLL", "target perplexity")
    expected |= {(system, "-", name) for system in ("one", "two") for name in likelihood}
    expected |= {(system, d, name) for system in ("one", "two") for d in DECODINGS for name in per_decoding}
    expected |= {("two", d, name) for d in DECODINGS for name in wins}
    assert set(found) == expected
    assert {row["n"] for row in found.values()} == {12}
    assert found["one", "-", "target NLL"]["value"] == pytest.approx(2)
    assert found["one", "-", "target perplexity"]["value"] == pytest.approx(math.exp(2))
    # A target's length does not count the token that ends it.
    lengths = [len(bench.examples.tokenizer.load().encode(text)) for text in result.examples["target"].to_pylist()]
    assert found[GROUND_TRUTH, "-", "length"]["value"] == pytest.approx(sum(lengths) / 12)


def test_outputs_are_those_of_the_model(bench: Bench) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    result = bench.run()
    rows = result.table("outputs").to_pylist()
    assert [row["example_id"] for row in rows[:12]] == result.examples["example_id"].to_pylist()
    tokenizer = bench.examples.tokenizer.load()
    model = AutoModelForCausalLM.from_pretrained(bench.models["two"].path)
    prompt = torch.tensor([result.examples["prompt_ids"][3].as_py()])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)
    ids = model.generate(prompt, generation_config=config)[0, prompt.shape[1] :]
    assert rows[15]["system"] == "two"
    assert rows[15]["text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_second_run_makes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run(decodings=DECODINGS)
    monkeypatch.setattr(samples, "choose_engine", no_engine)
    again = bench.run(decodings=DECODINGS, nll=no_engine)
    assert again.artifact.path == first.artifact.path
    assert again.table("metrics").equals(first.table("metrics"))


def test_other_figures_reuse_the_outputs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run()
    monkeypatch.setattr(samples, "choose_engine", no_engine)
    assert bench.run(bootstrap=300).artifact.path != first.artifact.path
    assert bench.run(examples=5).table("metrics")["n"].unique().to_pylist() == [5]
    assert bench.run(baseline="two").artifact.path != first.artifact.path


def test_the_seed_changes_samples_but_not_greedy_outputs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench.run(decodings=DECODINGS).table("outputs").to_pylist()
    two = bench.run(decodings=DECODINGS, seed=1).table("outputs").to_pylist()
    sampled = [a["text"] == b["text"] for a, b in zip(one, two, strict=True) if a["decoding"] == "top-k"]
    assert not all(sampled)
    monkeypatch.setattr(samples, "choose_engine", no_engine)
    bench.run(seed=2)  # greedy only: nothing to make


def test_bad_input_is_one_line(bench: Bench) -> None:
    with pytest.raises(InputError, match=r"evaluate.split is validation, which has no examples"):
        bench.run(split="validation")
    with pytest.raises(InputError, match=r"judges.right.pattern is '#### \(.\)': it matches none of the 12 targets"):
        bench.run(judges={"right": {"kind": "exact", "pattern": "#### (.)"}})


def test_a_target_without_an_answer_is_noted(bench: Bench) -> None:
    result = bench.run(judges={"exact": {"pattern": r"(\d+)"}})
    assert result.notes == []
    result = bench.run(judges={"exact": {"pattern": r"the (\w+)|1(\d)"}})  # two groups; the first is the answer
    assert result.notes


def test_a_pattern_that_truncates_numbers_is_noted(bench: Bench) -> None:
    (note,) = bench.run(judges={"exact": {"pattern": r"(\d)"}}).notes  # the targets have the numbers 1 to 12
    assert note.startswith("exact: the pattern reads only a part of the number in 3 of 12 targets, such as 1 of 10:")


def test_texts_are_compared_in_one_unicode_form(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that composes letters yields other code points than targets in decomposed form."""
    composed, decomposed = "In Z\u00fcrich und K\u00f6ln.", "In Zu\u0308rich und Ko\u0308ln."
    bench = Bench(tmp_path / "store", {name: models[name] for name in ("one", "two")}, 12)
    rows = pq.read_table(bench.examples.artifact.path / "examples.parquet").to_pylist()
    texts = {"one": composed, "two": decomposed}
    as_sampled = Rows.read

    def read(rows: Rows, *args: Any, **kwargs: Any) -> pa.Table:
        table = as_sampled(rows, *args, **kwargs)
        if rows.kind != "generations":
            return table
        name = next(name for name, model in bench.models.items() if model.fingerprint == rows.spec["model"])
        return table.set_column(table.column_names.index("text"), "text", pa.array([texts[name]] * table.num_rows))

    monkeypatch.setattr(Rows, "read", read)
    decomposed_targets = pa.Table.from_pylist([row | {"target": decomposed} for row in rows], schema=EXAMPLES)
    monkeypatch.setattr(Examples, "read", lambda *_: decomposed_targets.slice(1))
    result = bench.run(judges=["exact", "longer"], baseline="two")
    found = figures(result)
    for name in texts:
        assert found[name, "greedy", "exact match"]["value"] == 1
        assert found[name, "greedy", "chrF"]["value"] == pytest.approx(100)
    assert found["one", "greedy", "longer characters"]["value"] == found["two", "greedy", "longer characters"]["value"]
    assert found["one", "greedy", "longer tie"]["value"] == 1
    verdicts = result.table("verdicts").to_pylist()
    assert all(verdict["orders"] == [] for verdict in verdicts)  # equal outputs are not judged


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    bench = Bench(tmp_path, {"one": new_model(max_position_embeddings=8)}, 3)
    with pytest.raises(InputError, match=r"evaluate.max_new_tokens is 6 and the longest prompt has \d+ tokens, but"):
        bench.run()


def test_a_target_that_does_not_fit_is_refused_before_anything_is_made(
    tmp_path: Path, new_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bench(tmp_path / "one", {"one": new_model()}, 3).examples.read("test")
    longest = max(len(row["prompt_ids"] + row["target_ids"]) for row in whole.to_pylist())
    assert longest > max(len(row["prompt_ids"]) for row in whole.to_pylist()) + 2  # there is room for new tokens
    monkeypatch.setattr(samples, "choose_engine", no_engine)
    bench = Bench(tmp_path / "two", {"one": new_model(max_position_embeddings=longest - 1)}, 3)
    message = (
        rf"evaluate.split is test, whose longest prompt and target together have {longest} tokens, but the context"
    )
    with pytest.raises(InputError, match=message):
        bench.run(nll=no_engine, max_new_tokens=2)
    monkeypatch.undo()
    fitting = Bench(tmp_path / "two", {"one": new_model(max_position_embeddings=longest)}, 3)
    assert fitting.run(max_new_tokens=2).artifact.complete()


def test_a_killed_evaluation_keeps_its_outputs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> Sequence[tuple[float, int]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(nll=killed)
    monkeypatch.setattr(samples, "choose_engine", no_engine)
    assert bench.run().artifact.complete()


WARM = """
import json
import sys
from pathlib import Path
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.eval.config import Evaluate
from cpo_pipe.data.store import Store
from cpo_pipe.eval.evaluate import evaluate
store = Store(Path({root!r}))
model = locate_model({model!r}, store)
artifact, tokenizer = store.artifact("examples", {{"count": 12}}), locate_tokenizer({model!r}, store)
examples = Examples(artifact, tokenizer, {{"template": "plain"}})
config = Evaluate.model_validate(json.loads({config!r}))
nothing = dict(ranker=None, models={{}}, apis={{}}, executor=None)
result = evaluate(config, store, examples, {{"one": model}}, max_new_tokens=6, **nothing)
print(result.table("metrics").num_rows, [name for name in {heavy} if name in sys.modules])
"""


HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "scipy")


def test_a_warm_run_imports_nothing_heavy(tmp_path: Path, models: dict[str, Path]) -> None:
    settings = {"systems": {"one": {"model": "one"}}, "baseline": "one", "bootstrap": 200, "engine": "transformers",
                "judges": ["similarity", "exact"]}  # fmt: skip
    rows = Bench(tmp_path, {"one": models["one"]}, 12).run(**{**settings, "mauve_seeds": 3}).table("metrics").num_rows
    code = WARM.format(
        root=str(tmp_path),
        model=str(models["one"]),
        config=json.dumps(settings),
        heavy=HEAVY,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"{rows} []\n"


def test_judges_are_compared_with_each_other_and_with_annotations(bench: Bench, tmp_path: Path) -> None:
    first = bench.run(judges=["exact", "longer"])
    (judges,) = first.table("agreement").to_pylist()
    assert (judges["judge_a"], judges["judge_b"]) == ("exact", "longer")
    won = {(row["example_id"], row["judge"]): row["winner"] for row in first.table("verdicts").to_pylist()}
    written = {(row["system"], row["example_id"]): row["text"] for row in first.table("outputs").to_pylist()}
    examples = first.examples.select(["example_id", "prompt"]).to_pylist()
    unequal = [
        example
        for example in examples
        if written["one", example["example_id"]] != written["two", example["example_id"]]
    ]
    alike = [won[example["example_id"], "exact"] == won[example["example_id"], "longer"] for example in unequal]
    assert judges["n"] == len(unequal) > 5
    assert judges["agreement"] == pytest.approx(sum(alike) / len(alike))

    # Annotators prefer the longer of the first five outputs and see the other system's output first.
    swapped = {"a": "b", "b": "a", "tie": "tie"}
    labels = [
        {"prompt": example["prompt"], "output_a": written["one", example["example_id"]],
         "output_b": written["two", example["example_id"]], "winner": swapped[won[example["example_id"], "longer"]]}
        for example in unequal[:5]
    ]  # fmt: skip
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))
    second = bench.run(judges=["exact", "longer"], annotations=str(path))
    rows = {(row["judge_a"], row["judge_b"]): row for row in second.table("agreement").to_pylist()}
    assert [*rows] == [("exact", "longer"), ("exact", "human annotations"), ("longer", "human annotations")]
    assert rows["exact", "longer"] == judges
    assert (rows["longer", "human annotations"]["agreement"], rows["longer", "human annotations"]["n"]) == (1, 5)
    assert not second.notes

    path.write_text(json.dumps({**labels[0], "prompt": "another"}) + "\n")
    third = bench.run(judges=["exact", "longer"], annotations=str(path))
    assert [note for note in third.notes if "annotations" in note] == [
        "annotations: none of the 1 annotated pairs is among the judged pairs; prompts and outputs must match exactly"
    ]


def test_the_diversity_of_several_samples_is_measured(bench: Bench) -> None:
    from cpo_pipe.eval.metrics.text import self_bleu

    one = bench.run(decodings=DECODINGS)
    several = bench.run(decodings={**DECODINGS, "top-k": {"top_k": 5, "samples": 3}})
    assert several.table("outputs").equals(one.table("outputs")), "figures of outputs are those of the first sample"
    found, before = figures(several), figures(one)
    extra = {of for of in found if of not in before}
    names = ("self-BLEU", "distinct-2 of samples")
    assert extra == {(system, "top-k", name) for system in bench.models for name in names}
    assert {of: row for of, row in found.items() if of not in extra} == before

    texts: dict[str, list[str]] = {}
    for path in sorted((Path(bench.store.root) / "generations").glob("*/shards/*.parquet")):
        spec = json.loads((path.parents[1] / "spec.json").read_text())
        if spec["model"] == bench.models["two"].fingerprint and spec["sampling"]["temperature"]:
            for row in pq.read_table(path).to_pylist():
                texts.setdefault(row["example_id"], []).append(row["text"])
    assert {len(of) for of in texts.values()} == {3}
    expected = sum(map(self_bleu, texts.values())) / len(texts)
    assert found["two", "top-k", "self-BLEU"]["value"] == pytest.approx(expected)
    assert found["two", "top-k", "self-BLEU"]["n"] == 12
