"""Thirty mistakes of a new user: each is reported before anything is made, in one line that says what to do."""

import pytest

from tests.support.marks import slow_except
from tests.support.project import Project

API = "apis.gpt={url: 'http://127.0.0.1:9/v1', model: m}"
KEYED = "apis.gpt={url: 'http://127.0.0.1:9/v1', model: m, key: NO_SUCH_KEY}"
HUGE = "{architecture: llama, config: {hidden_size: 8192, intermediate_size: 32768, num_hidden_layers: 60}}"

MISTAKES: dict[str, tuple[list[str], str]] = {
    "a system's model does not exist": (["evaluate.systems.far={model: no/such}"], "evaluate.systems.far: model"),
    "a misspelled reference": (["train.cpo.reference=strat"], "did you mean the training start?"),
    "a misspelled init": (["train.cpo.init=stat"], "did you mean the training start?"),
    "a tracker that is not installed": (["train.cpo.report_to=[wandb]"], "wandb is not installed; pip install wandb"),
    "an unknown tracker": (["train.cpo.report_to=[wandbb]"], "train.cpo.report_to.0 is 'wandbb': input should be"),
    "no API key": ([KEYED, "evaluate.systems.gpt={model: gpt}"], "the environment variable NO_SUCH_KEY is not set"),
    "a server that does not answer": ([API, "evaluate.systems.gpt={model: gpt}"], "apis.gpt.url: http://127.0.0.1:9/v1"),
    "a misspelled API": (["evaluate.judges={j: {kind: openai, api: gtp}}", API], "did you mean gpt?"),
    "a model that cannot fit": ([f"train.start.init={HUGE}"], "parameters need at least"),
    "a misspelled size of a scratch model": (
        ["train.start.init={architecture: llama, config: {hiden_size: 8}}"], "did you mean hidden_size?",
    ),
    "a misspelled architecture": (["train.start.init={architecture: lama}"], "did you mean llama?"),
    "a missing data file": (["data.source=pairs.jsnl"], "data.source pairs.jsnl: no such file or folder"),
    "a column that is not there": (["data.columns.prompt=question"], "column question (data.columns.prompt)"),
    "a tokenizer that does not exist": (["data.tokenizer=no/such"], "tokenizer no/such: no such folder"),
    "a template for a tokenizer without one": (["data.template=chat"], "chat template"),
    "a pattern that finds no answer": (["evaluate.judges={exact: {pattern: 'x(y)'}}"], "evaluate.judges.exact.pattern"),
    "prompts longer than the context": (["evaluate.max_new_tokens=100000", "evaluate.systems.b={model: MODEL}"],
                                        "evaluate.max_new_tokens is 100000"),
    "examples longer than a scratch model's context": (
        ["train.start.init={architecture: gpt2, config: {n_embd: 32, n_head: 2, n_layer: 1, n_positions: 8}}"],
        "train.start: the longest training example has",
    ),
    "TRL's batch size": (["train.cpo.per_device_train_batch_size=4"], "use batch_size"),
    "PEFT's target_modules beside lora": (["train.cpo.target_modules=[q_proj]"], "use lora.target_modules"),
    "epochs": (["train.cpo.num_train_epochs=3"], "use max_steps"),
    "a misspelled key": (["train.cpo.learning_rte=0.1"], "did you mean learning_rate?"),
    "a key of another objective": (["train.start.beta=0.1"], 'not used by objective "mle"'),
    "a misspelled objective": (["train.cpo.objective=cop"], "unknown objective 'cop'; did you mean cpo?"),
    "TRL's name of an objective": (["train.start.objective=sft"], "unknown objective 'sft'; use mle"),
    "a text where a number belongs": (["train.cpo.max_steps=many"], "train.cpo.max_steps is 'many'"),
    "an engine that is not installed": (["evaluate.engine=vllm"], "evaluate.engine is vllm, which is not installed"),
    "a misspelled judge": (["evaluate.judges=[similarty]"], "unknown judge 'similarty'; did you mean similarity?"),
    "a baseline that is no system": (["evaluate.baseline=strat"], "is not among the systems"),
    "ranks for an objective without them": (["train.cpo.objective=cpo-ranked"], "needs ranks; use another objective"),
    "a file of outputs that is missing": (["evaluate.systems.gpt={file: outputs.json}"], "outputs.json: no such file"),
    "a file of negatives that is missing": (["negatives.sources.own={strategy: pool, file: none.jsonl}"], "none.jsonl"),
    "a reward model that does not exist": (["rank={by: reward, model: no/such}"], "reward model no/such"),
    "annotations that are missing": (["evaluate.annotations=none.jsonl"], "annotations none.jsonl: no such file"),
}  # fmt: skip
AFTER_PREPARE = {
    "a pattern that finds no answer",
    "examples longer than a scratch model's context",
    "prompts longer than the context",
    "a file of negatives that is missing",
}
"""Found once the examples are prepared, which takes seconds; nothing else is made."""


def test_there_are_thirty() -> None:
    assert len(MISTAKES) >= 30


@pytest.mark.parametrize(
    "mistake", slow_except(MISTAKES, "a misspelled reference", "a model that cannot fit", "no API key")
)
def test_a_mistake_is_reported_before_anything_is_made(
    project: Project, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "apis" in str(MISTAKES[mistake]):
        pytest.importorskip("openai")
    if "vllm" in str(MISTAKES[mistake]):
        monkeypatch.setattr("cpo_pipe.pipeline.engines.vllm.VllmEngine.not_installed", lambda: "pip install it")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    settings, message = MISTAKES[mistake]
    options = [part for one in settings for part in ("--set", one.replace("MODEL", str(project.model)))]
    result = project.cli("run", "tiny.yaml", *options)
    assert result.status == 2, result.err
    assert any(line.startswith("error: ") and message in line for line in result.err.splitlines()), result.err
    made = {path.parent.name for path in project.store.glob("*/*") if path.is_dir()} - {".locks"}
    assert made <= ({"examples"} if mistake in AFTER_PREPARE else set()), made
    if mistake not in AFTER_PREPARE:
        assert not (project.root / "runs").exists()
