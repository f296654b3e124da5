"""Examples in the report: outputs, verdicts and negatives."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.eval.judging import VERDICTS
from tests.support.report_data import make_data, said, verdict
from tests.support.report_page import render, unpacked


def test_negatives_are_sorted_by_rank(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert page.text.index("cosine 0.500nearer") < page.text.index("cosine 0.250farther")
    assert "autoregressive, cosine 0.500" in page.text
    assert "gold" not in page.text  # the target is shown as the target


def test_the_page_holds_all_examples_with_outputs_and_verdicts(tmp_path: Path) -> None:
    scores = said("ab", "a", '{"a": 0.81234567, "b": true}')
    answers = said("ab", "a", '{"answer": "A"}'), said("ba", "b", '{"answer": "A"}', p_a=0.25)
    verdicts = [
        verdict(0, "a", scores),
        verdict(0, "tie", *answers, judge="api"),
        verdict(2, "tie"),  # equal outputs
    ]
    html, _ = render(tmp_path, make_data(count=3, verdicts=pa.Table.from_pylist(verdicts, schema=VERDICTS)))
    head, examples = unpacked(html)
    assert head["columns"] == [["mle", "greedy"], ["cpo", "greedy"]]
    assert head["comparisons"] == [
        {"judge": judge, "system": "cpo", "decoding": "greedy", "opponent": "mle"} for judge in ("similarity", "api")
    ]
    assert [example["id"] for example in examples] == ["e0", "e1", "e2"]
    assert examples[1]["outputs"] == ["mle says ", "cpo says "]
    assert examples[1]["verdicts"] == [None, None]
    assert examples[0]["verdicts"] == [
        {"winner": "a", "orders": [{"order": "ab", "winner": "a", "said": "cpo: 0.8123; mle: yes"}]},
        {
            "winner": "tie",
            "orders": [
                {"order": "ab", "winner": "a", "said": "answer: A"},
                {"order": "ba", "winner": "b", "said": "answer: A; P(cpo is better): 0.25"},
            ],
        },
    ]
    assert examples[2]["verdicts"] == [{"winner": "tie", "orders": []}, None]


def test_examples_are_omitted_when_the_page_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpo_pipe.eval.report.examples.MAX_PACKED", 300_000)
    noise = np.random.default_rng(0).integers(0, 256, (40, 20_000), np.uint8)
    outputs = [
        {"example_id": f"e{number}", "system": "mle", "decoding": "greedy", "text": row.tobytes().hex()}
        for number, row in enumerate(noise)
    ]
    html, page = render(tmp_path, make_data(count=40, outputs=pa.Table.from_pylist(outputs)))
    _, examples = unpacked(html)
    assert 13 <= len(examples) <= 20, "20,000 bytes each of 300,000, and what the compressor buffers"
    assert examples[-1]["outputs"] == [outputs[len(examples) - 1]["text"]]
    assert f"The first {len(examples)} of 40 held-out prompts" in page.text
