"""Systems whose outputs exist already, in a file."""

from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.eval.evaluate import Evaluation
from cpo_pipe.eval.output_file import OutputColumns, open_outputs
from tests.support.evaluation import DECODINGS, Bench, figures
from tests.support.pools import write
from tests.support.project import Project


def texts(result: Evaluation, system: str, decoding: str) -> list[str]:
    key = (system, decoding)
    return [row["text"] for row in result.table("outputs").to_pylist() if (row["system"], row["decoding"]) == key]


def run(bench: Bench, path: Path, columns: dict[str, str] | None = None, **settings: Any) -> Evaluation:
    """Compare the outputs in a file with the models of the bench."""
    opened = open_outputs("gpt4", str(path), OutputColumns(**(columns or {})), bench.store)
    bench.models = {**bench.models, "gpt4": opened}
    return bench.run(**settings)


def prompts(bench: Bench) -> list[str]:
    return bench.examples.read("test")["prompt"].to_pylist()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_outputs_in_a_file_are_measured_as_a_models(bench: Bench, tmp_path: Path, suffix: str) -> None:
    plain = bench.run(judges=["longer", "exact"])
    copied = dict(zip(prompts(bench), texts(plain, "two", "greedy"), strict=True))
    rows = [{"dataset": "mine", "instruction": prompt, "output": text, "generator": "x"}
            for prompt, text in reversed(copied.items())]  # fmt: skip
    result = run(bench, write(tmp_path / f"o{suffix}", rows), judges=["longer", "exact"])
    assert texts(result, "gpt4", "greedy") == texts(plain, "two", "greedy")
    found = figures(result)
    copy = {metric: row["value"] for (system, _, metric), row in found.items() if system == "gpt4"}
    model = {metric: row["value"] for (system, _, metric), row in found.items() if system == "two"}
    assert model.keys() - copy.keys() == {"target NLL", "target perplexity"}, "a file gives no log-probs of targets"
    # The tokens are those of the text encoded again, so that figures of tokens may differ.
    assert all(copy[key] == model[key] for key in ("chrF", "longer win rate", "exact match"))


def test_a_file_stands_beside_every_decoding(bench: Bench, tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", [{"prompt": prompt, "text": f"{prompt} so"} for prompt in prompts(bench)])
    decodings = {**DECODINGS, "many": {"top_k": 5, "samples": 3}}
    result = run(bench, path, decodings=decodings, judges=["longer"])
    written = [f"{prompt} so" for prompt in prompts(bench)]
    assert all(texts(result, "gpt4", decoding) == written for decoding in decodings)
    assert ("gpt4", "many", "self-BLEU") not in figures(result)


def test_rows_are_matched_by_example_id_or_by_the_columns_named(bench: Bench, tmp_path: Path) -> None:
    examples = bench.examples.read("test")
    ids = [{"example_id": one, "output": f"o{number}"} for number, one in enumerate(examples["example_id"].to_pylist())]
    assert texts(run(bench, write(tmp_path / "a.jsonl", ids)), "gpt4", "greedy")[:2] == ["o0", "o1"]
    named = [{"ask": prompt, "say": "" if not number else "yes", "output": "no"}
             for number, prompt in enumerate(prompts(bench))]  # fmt: skip
    twice = [*named, {"ask": prompts(bench)[1], "say": "again", "output": "no"}]
    result = run(bench, write(tmp_path / "b.jsonl", twice), {"prompt": "ask", "output": "say"})
    assert texts(result, "gpt4", "greedy")[:2] == ["", "yes"], "an empty output is one, and the first of two counts"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "other", "output": "x"}], "has no output for 12 of 12 examples, the first of them '1 the quick'"),
        ([{"prompt": "other", "said": "x"}], "has no column any of output, text, completion, response, answer; it has"),
        ([{"prompt": "other", "output": 3}], "o.jsonl:1: not text (column output has type int: 3); correct the row"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(bench: Bench, tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(bench, write(tmp_path / "o.jsonl", rows))
    assert str(caught.value).startswith("evaluate.systems.gpt4.file ")
    assert message in str(caught.value)


def test_a_file_is_checked_before_anything_is_trained(project: Project) -> None:
    (project.root / "o.jsonl").write_text('{"prompt": "nobody asked", "output": "x"}\n')
    result = project.cli("run", "tiny.yaml", "--set", "evaluate.systems.gpt4={file: o.jsonl}")
    assert result.status == 2
    assert "evaluate.systems.gpt4.file o.jsonl: has no output for 4 of 4 examples" in result.error()
    assert not [*project.store.glob("checkpoints/*")]
