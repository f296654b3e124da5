"""The checkpoint of a training: files that transformers loads, end tokens, and a trial before the first step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import checkpoint_model
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.train import training_spec
from tests.support.training import Bench, metrics


def test_transformers_loads_the_checkpoint(bench: Bench) -> None:
    artifact = bench.train("cpo")
    AutoModelForCausalLM.from_pretrained(artifact.path)
    assert AutoTokenizer.from_pretrained(artifact.path).eos_token_id == 0
    assert checkpoint_model("t", artifact).fingerprint == locate_model(str(artifact.path), bench.store).fingerprint
    assert json.loads((artifact.path / "spec.json").read_text())["reference"] == bench.model.fingerprint


def test_a_failed_export_loses_no_step_and_leftovers_are_removed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cpo_pipe.trainer.checkpoint.CheckpointFiles.rehearse", lambda *_: None)
        patch.setattr("cpo_pipe.trainer.checkpoint.copy_tokenizer", full)
        with pytest.raises(OSError, match="No space left"):
            bench.train("cpo")
    caplog.set_level("INFO")
    artifact = bench.train("cpo")
    assert "resumes after step 2" in caplog.text
    assert not artifact.in_progress.exists()
    artifact.in_progress.mkdir(parents=True)  # as if killed between the checkpoint and its removal
    bench.train("cpo")
    assert not artifact.in_progress.exists()


GENERATION_CONFIG = {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 5.0, "min_length": 40, "eos_token_id": 7}
"""Contradictory settings, as in those of Vicuna and Llama 2, which also change greedy decoding."""


def with_generation_config(source: Path, folder: Path, **content: Any) -> Path:
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_the_generation_config_of_the_init_is_not_used_or_passed_on(tmp_path: Path, tiny_model: Path) -> None:
    configured = with_generation_config(tiny_model, tmp_path / "configured", **GENERATION_CONFIG)
    plain = with_generation_config(tiny_model, tmp_path / "plain", eos_token_id=7)
    made = [
        Bench(tmp_path / f"store {folder.name}", folder).train("mle", eval_steps=1) for folder in (configured, plain)
    ]
    assert [row["repetition"] for row in metrics(made[0])] == [row["repetition"] for row in metrics(made[1])]
    written = [(artifact.path / "generation_config.json").read_bytes() for artifact in made]
    assert written[0] == written[1]


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_checkpoint_names_the_end_token_of_its_targets_first(
    tmp_path: Path, tiny_model: Path, lora: dict[str, Any] | None
) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    base = with_generation_config(tiny_model, tmp_path / "base", eos_token_id=[9, 7])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 8}))
    artifact = Bench(tmp_path, base).train("mle", lora=lora)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((artifact.path / name).read_text())["eos_token_id"] == [0, 7, 8, 9], name
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert model.generation_config.eos_token_id == [0, 7, 8, 9]


def test_end_tokens_are_part_of_a_checkpoints_identity(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(tmp_path / "store")
    names = ({"eos_token_id": 0}, {"eos_token_id": [0]}, {"eos_token_id": [5, 0]})
    hashes = []
    for number, content in enumerate(names):
        bench = Bench(tmp_path, with_generation_config(tiny_model, tmp_path / str(number), **content))
        config = OBJECTIVES.parse(
            {"init": "m", "objective": "mle", "max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
        )
        hashes.append(store.artifact("checkpoints", training_spec(config, bench.inputs("mle"))).name)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("these settings contradict each other\nand more")

    monkeypatch.setattr("cpo_pipe.trainer.loop.Loop.run", lambda _: pytest.fail("it trained"))
    for written in ("transformers.PreTrainedModel.save_pretrained", "cpo_pipe.trainer.model_card.write_card",
                    "cpo_pipe.trainer.resume.metrics_table", "cpo_pipe.trainer.checkpoint.copy_tokenizer"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(written, refuse)
            with pytest.raises(InputError) as error:
                bench.train("mle")
        assert str(error.value).startswith("train.t: its checkpoint could not be written after the last step (these")
        assert "\n" not in str(error.value)
    assert not [*bench.store.local.glob("checkpoints/.tmp-*")], "files of the trial are removed"


def test_the_trial_before_the_first_step_leaves_nothing(bench: Bench) -> None:
    artifact = bench.train("mle")
    assert {path.name for path in (bench.store.local / "checkpoints").iterdir()} <= {
        artifact.path.name, ".locks", ".in-progress",
    }  # fmt: skip
