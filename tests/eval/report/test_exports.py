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


def test_a_system_may_have_the_name_of_a_folder_or_file_of_the_targets(tmp_path: Path) -> None:
    examples = pa.Table.from_pylist([example(0), example(1)], schema=EXAMPLES)
    systems = ("cpo", "ground-truth.json", "targets.json")
    outputs = [{"example_id": name, "system": system, "decoding": "greedy", "text": f"{system} {name}"}
               for system in systems for name in ("e0", "e1")]  # fmt: skip
    written = write_exports(tmp_path, make_data(examples=examples, outputs=pa.Table.from_pylist(outputs)))
    files = sorted(str(path.relative_to(tmp_path)) for path in written)
    assert files == [
        "metrics.md",
        "model_outputs/cpo/greedy.json",
        "model_outputs/ground-truth.json/greedy.json",
        "model_outputs/ground-truth/targets.json",
        "model_outputs/targets.json/greedy.json",
    ]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == files
    assert json.loads((tmp_path / files[1]).read_text())[0]["output"] == "cpo e0"
