"""Files beside the report: figures as Markdown, and outputs for AlpacaEval."""

import json
from pathlib import Path

import pyarrow as pa

from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.eval.config import Published
from cpo_pipe.eval.report.exports import write_exports
from tests.support import hostile as control
from tests.support.report_data import HOSTILE, example, make_data
from tests.support.report_page import render


def test_foreign_text_is_escaped_in_markdown(tmp_path: Path) -> None:
    hostile = f"{control.HOSTILE} | <b>x</b> [y](http://z) `c`"
    published = Published(source=hostile, metric="chrF", decoding="greedy", values={hostile: 0.5})
    data = make_data(published=[published], notes=[f"# {hostile}\n\n| --- |"])
    write_exports(tmp_path, data)
    text = (tmp_path / "metrics.md").read_text()
    assert not control.RAW.search(text)
    shown = control.SHOWN.replace(r"\re", " e").replace("\\", r"\\")
    cell = rf"{shown} \| &lt;b>x&lt;/b> [y\](http://z) \`c\`"
    assert f"\n{cell}: chrF, greedy\n" in text
    assert f"\n| {cell} | 0.500 | – |\n" in text
    assert rf"{chr(10)}\# {cell} \| --- \|{chr(10)}" in text
    html, _ = render(tmp_path, data)
    assert not control.RAW.search(html)


def test_the_figures_are_exported_as_markdown(tmp_path: Path) -> None:
    write_exports(tmp_path, make_data())
    lines = (tmp_path / "metrics.md").read_text().splitlines()
    assert "a note" in lines, "notes are exported with the figures"
    assert any(line.startswith("† Measured with the embedding model") for line in lines)
    assert "| metric | ground-truth | mle (baseline) | cpo |" in lines
    assert "| --- | ---: | ---: | ---: |" in lines
    assert "| MAUVE † | – | – | 0.750 ± 0.015 |" in lines


def test_outputs_are_exported_in_the_format_of_alpaca_eval(tmp_path: Path) -> None:
    examples = pa.Table.from_pylist([example(0), {**example(1), "category": "qa"}], schema=EXAMPLES)
    outputs = [{"example_id": name, "system": "ens@0.5", "decoding": "top-p", "text": f"{HOSTILE} {name}"}
               for name in ("e1", "e0")]  # fmt: skip
    write_exports(tmp_path, make_data(examples=examples, outputs=pa.Table.from_pylist(outputs)))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert files == ["model_outputs/ens@0.5/top-p.json", "model_outputs/ground-truth/targets.json"]
    assert json.loads((tmp_path / files[0]).read_text()) == [
        {"instruction": f"prompt {number}", "output": f"{HOSTILE} e{number}", "generator": "ens@0.5/top-p",
         "dataset": dataset} for number, dataset in enumerate(("a-run", "qa"))
    ]  # fmt: skip
    target = json.loads((tmp_path / files[1]).read_text())[0]
    assert (target["output"], target["generator"]) == ("target 0 ", "ground-truth")


def test_exports_that_a_run_no_longer_has_are_removed(tmp_path: Path) -> None:
    def outputs(*columns: tuple[str, str]) -> pa.Table:
        return pa.Table.from_pylist([
            {"example_id": name, "system": system, "decoding": decoding, "text": f"{system} {decoding}"}
            for system, decoding in columns for name in ("e0", "e1")
        ])  # fmt: skip

    examples = pa.Table.from_pylist([example(0), example(1)], schema=EXAMPLES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.json").write_text("mine")
    write_exports(
        tmp_path, make_data(examples=examples, outputs=outputs(("old", "greedy"), ("cpo", "a"), ("cpo", "b")))
    )
    # Files of the user, and those that AlpacaEval writes beside its input, are kept.
    own = {"old/annotations.json": '[{"generator_1": "old/greedy"}]', "gpt4/outputs.json": '[{"generator": "gpt4"}]',
           "gpt4/empty.json": "[]", "gpt4/labels.json": "not an export"}  # fmt: skip
    for name, content in own.items():
        (tmp_path / "model_outputs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model_outputs" / name).write_text(content)
    # A system may have the name of a file or folder of the targets.
    new = outputs(("cpo", "b"), ("ground-truth.json", "greedy"), ("targets.json", "greedy"))
    write_exports(tmp_path, make_data(examples=examples, outputs=new))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "metrics.md",
        "mine/note.json",
        "model_outputs/cpo/b.json",
        "model_outputs/gpt4/empty.json",
        "model_outputs/gpt4/labels.json",
        "model_outputs/gpt4/outputs.json",
        "model_outputs/ground-truth.json/greedy.json",
        "model_outputs/ground-truth/targets.json",
        "model_outputs/old/annotations.json",
        "model_outputs/targets.json/greedy.json",
    ]
    assert not [*tmp_path.glob(".tmp-*")]
    assert json.loads((tmp_path / "model_outputs/cpo/b.json").read_text())[0]["output"] == "cpo b"
