"""`merge`, and ensembles in an evaluation."""

import json
from pathlib import Path

import pytest

from tests.support.project import figures, trainings

ENSEMBLES = ("--set", "evaluate.ensembles={mix: {of: [start, cpo], alphas: [0, 0.5, 1]}}")


@pytest.mark.slow
def test_an_ensemble_with_weight_0_or_1_reuses_the_outputs_of_its_model(made) -> None:
    def kept(kind: str) -> set[Path]:
        return {path.parent for path in made.store.glob(f"{kind}/*/spec.json")}

    checkpoints, generations = kept("checkpoints"), kept("generations")
    result = made.cli("evaluate", "tiny.yaml", *ENSEMBLES)
    assert result.status == 0, result.err
    (merged,), (written,) = kept("checkpoints") - checkpoints, kept("generations") - generations
    assert json.loads((merged / "spec.json").read_text())["merge"][0][1] == 0.5
    fingerprint = json.loads((merged / "manifest.json").read_text())["fingerprint"]
    assert json.loads((written / "spec.json").read_text())["model"] == fingerprint
    rows = {(row["system"], row["metric"]): row["value"] for row in figures(made)}
    assert {system for system, _ in rows} == {"ground-truth", "start", "cpo", "mix@0", "mix@0.5", "mix@1"}
    assert rows["mix@1", "exact tie"] == 1, "the baseline itself"
    for metric in ("target NLL", "rep-4", "exact match"):
        assert (rows["mix@0", metric], rows["mix@1", metric]) == (rows["cpo", metric], rows["start", metric])
    assert rows["mix@0.5", "target NLL"] not in (rows["cpo", "target NLL"], rows["start", "target NLL"])


def test_merge_writes_a_model_that_transformers_loads(made) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = made.cli("merge", "tiny.yaml", "mix@0.5", "--out", "out/mix", *ENSEMBLES)
    assert result.status == 0, result.err
    assert result.out == "mix@0.5: written to out/mix\n"
    hashes = trainings(made)
    start, cpo, mix = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (made.store / hashes["start"], made.store / hashes["cpo"], made.root / "out/mix")
    )
    assert all((mix[name] == start[name] * 0.5 + cpo[name] * 0.5).all() for name in mix)
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (made.root / "out/mix", made.model)]
    assert tokenizers[0] == tokenizers[1]
    assert not [*(made.root / "out").glob(".tmp-*")]


def test_merge_writes_any_system_but_overwrites_nothing(made) -> None:
    (made.root / "empty").mkdir()
    assert made.cli("merge", "tiny.yaml", "cpo", "--out", "empty").status == 0
    kept = {path.name: path.read_bytes() for path in (made.root / "empty").iterdir()}
    assert kept["model.safetensors"] == (made.store / trainings(made)["cpo"] / "model.safetensors").read_bytes()
    made.write("file", "mine")
    for out in ("empty", "file"):
        result = made.cli("merge", "tiny.yaml", "start", "--out", out)
        assert result.status == 2
        assert result.error() == f"error: --out {out}: already exists; name a folder that is new or empty"
    assert {path.name: path.read_bytes() for path in (made.root / "empty").iterdir()} == kept
    assert (made.root / "file").read_text() == "mine"


def test_merge_writes_a_training_that_is_not_evaluated(made) -> None:
    result = made.cli("merge", "tiny.yaml", "cpo", "--out", "out/cpo", "--set", "evaluate=null")
    assert result.status == 0, result.err
    weights = [(folder / "model.safetensors").read_bytes()
               for folder in (made.root / "out/cpo", made.store / trainings(made)["cpo"])]  # fmt: skip
    assert weights[0] == weights[1]
    result = made.cli("merge", "tiny.yaml", "cpp", "--out", "out/other", "--set", "evaluate=null")
    assert result.status == 2
    assert "error: cpp: the recipe has no such system or training; did you mean cpo" in result.error()


def test_merge_refuses_what_is_not_a_model(made) -> None:
    before = made.made()
    result = made.cli("merge", "tiny.yaml", "mix@0.4", "--out", "out", *ENSEMBLES)
    assert result.status == 2
    assert "error: mix@0.4: the recipe has no such system or training; did you mean mix@0" in result.error()
    api = ("--set", "apis.mini={url: 'http://127.0.0.1:9/v1', model: m}", "--set", "evaluate.systems.gpt={model: mini}")
    result = made.cli("merge", "tiny.yaml", "gpt", "--out", "out", *api)
    assert result.status == 2
    assert "error: gpt: is an API, which has no weights to merge" in result.error()
    result = made.cli("merge", "tiny.yaml", "start", "--out", "tiny.yaml/out")
    assert result.status == 2
    assert made.made() == before
    assert not (made.root / "out").exists()


def test_ensembles_of_apis_are_refused_before_any_request(made) -> None:
    api = ("--set", "apis.mini={url: 'http://127.0.0.1:9/v1', model: m}")
    sections = ("ensembles={mix: {of: [start, mini], alphas: [0]}}", "systems.x={merge: {start: 0.5, mini: 0.5}}")
    for section in sections:
        result = made.cli("evaluate", "tiny.yaml", *api, "--set", f"evaluate.{section}")
        assert result.status == 2
        assert "names mini, which is an API and has no weights here; name a local or hub model" in result.error()
