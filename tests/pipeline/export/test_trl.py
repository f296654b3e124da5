"""TRL trains on an export, and an export is a pool again."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.trainer.checkpoint import METRICS_FILE
from tests.support.exports import BATCH, exported, grouped, groups_of, opened
from tests.support.project import Project


def trl_losses(policy: Path, reference: Path, beta: float, chat_template: str | None = None) -> list[float]:
    """The losses of two steps of TRL on what is in `out`, each on all pairs."""
    trl_side = pytest.importorskip("tests.support.trl_side", reason="trl is not installed")

    class Quiet(trl_side.DPOTrainer):  # type: ignore[misc, name-defined]
        def _send_telemetry(self) -> None:
            """Nothing leaves the machine."""

    pairs = datasets.load_dataset("out", split="train")
    tokenizer = AutoTokenizer.from_pretrained(reference)
    tokenizer.chat_template = chat_template
    trainer = Quiet(
        AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=trl_side.DPOConfig(
            "trl",
            beta=beta,
            max_steps=2,
            learning_rate=1e-3,
            per_device_train_batch_size=len(pairs),
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trl_trains_on_it_and_its_first_loss_is_ours(project: Project, new_model: Callable[..., Path]) -> None:
    """The policy is another model than the reference: else the first loss is log 2, whatever the pairs are."""
    other, beta = new_model(seed=7), 0.05
    options = ("--set", "negatives={sources: {batch: {count: 3}}}")
    run = grouped(project, *options)
    count = sum(len(candidates) - 1 for _, candidates in groups_of(run))
    training = (
        f"train.dpo={{init: {other}, objective: dpo, reference: {project.model}, beta: {beta}, max_steps: 1, "
        f"learning_rate: 1e-3, batch_size: {count}, pairs: [[target, batch]]}}"
    )
    options = (*options, "--set", training)
    result = project.cli("train", "tiny.yaml", "dpo", *options)
    assert result.status == 0, result.err
    metrics = pq.read_table(opened(*options).resolver.model("dpo").path / METRICS_FILE).to_pylist()
    result = project.cli("export", "tiny.yaml", "--out", "out", *options)
    assert "other token ids" not in result.err, "what TRL tokenizes are the same ids"
    first, second = trl_losses(other, project.model, beta)
    assert first == pytest.approx(metrics[0]["loss"], rel=1e-4)
    assert abs(first - 0.6931) > 0.01, "not the loss of equal models"
    assert second < first


def test_trl_trains_on_messages(project: Project, new_model: Callable[..., Path]) -> None:
    grouped(project, *BATCH)
    exported(project, *BATCH, "--conversational")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    first, second = trl_losses(new_model(seed=7), project.model, 0.05, template)
    assert abs(first - 0.6931) > 0.01
    assert second < first


@pytest.mark.parametrize("conversational", [False, True])
def test_an_export_is_a_pool_again(project: Project, conversational: bool) -> None:
    grouped(project, *BATCH)
    rows = exported(project, *BATCH, *(["--conversational"] if conversational else []))
    texts = {row["example_id"]: [] for row in rows}
    for row in rows:
        rejected = row["rejected"]
        texts[row["example_id"]].append(rejected[0]["content"] if conversational else rejected)
    pools = (
        "worse: {strategy: pool, file: out, columns: {prompt: prompt, text: rejected}, count: 3}, "
        "better: {strategy: pool, file: out/data/train-00000.parquet, columns: {text: chosen}, count: 4}"
    )
    options = ("--set", f"negatives={{sources: {{{pools}}}}}", "--set", "rank={drop_duplicates: false}")
    run = grouped(project, *options)
    for example, candidates in groups_of(run):
        found = {label: [c["text"] for c in candidates if c["strategy"] == label] for label in ("worse", "better")}
        assert found["worse"] == texts[example["example_id"]]
        assert found["better"] == [example["target"]] * len(found["worse"])
