"""Stage `train`: one named training, from its initial model to a checkpoint in the store."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.examples import selection_hash
from cpo_pipe.data.execution import processes
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.fingerprint import Spec, model_fingerprint, sha256_file
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.model import Model, ScratchModel
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Artifact, Rows, Store
from cpo_pipe.trainer.distributed import make_missing
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.objectives.preference import PreferenceTraining

if TYPE_CHECKING:  # torch is imported only when there is something to train
    from accelerate import Accelerator

log = logging.getLogger(__name__)

ORDER = 2
"""Version of the order in which curricula take groups."""

# What changes neither the data order nor the arithmetic that decides the weights.
_NOT_IDENTITY = {
    "init", "reference", "negatives",  # their content is part of the identity
    "attention", "gradient_checkpointing", "micro_batch_tokens", "logits_mb", "report_to", "eval_steps",
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a training starts from, resolved."""

    tokenizer: TokenizerFiles
    init: Model | ScratchModel
    selection: pa.Table
    """Training examples, in order."""
    groups: Rows | None = None
    """For objectives that learn from negatives."""
    reference: Model | None = None
    """For the objectives that have one."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Strength per label in the groups, for a curriculum by strength."""
    target_ends: Sequence[int] = ()
    """The tokens that end targets (`Examples.end_tokens`)."""

    def end_tokens(self) -> tuple[int, ...]:
        """Return the tokens that end a text of the trained model: first those that end the targets."""
        return end_tokens(self.init.path if isinstance(self.init, Model) else None, self.tokenizer, self.target_ends)


def training_spec(config: Training, inputs: Inputs) -> Spec:
    """Return everything that decides the weights, and nothing else."""
    excluded = _NOT_IDENTITY | {name for name in ("pairs", "curriculum", "stop_on") if not getattr(config, name, None)}
    if config.keep == "best":  # then the steps that are looked at decide which weights are kept
        excluded -= {"eval_steps"}
    init = inputs.init
    by = config.curriculum.by if config.curriculum is not None else None
    return {
        "settings": config.model_dump(mode="json", exclude=excluded),
        "init": {"model": init.fingerprint} if isinstance(init, Model) else {"scratch": init.model_dump(mode="json")},
        "tokenizer": inputs.tokenizer.fingerprint,
        "end_tokens": list(inputs.end_tokens()),  # its configs name them
        "rows": selection_hash(inputs.selection),
        "groups": _groups_spec(config, inputs.groups) if inputs.groups else None,
        "reference": inputs.reference.fingerprint if inputs.reference else None,
        **({"strengths": dict(inputs.strengths)} if by == "strength" else {}),
        **({"order": ORDER} if by is not None else {}),
    }


def _groups_spec(config: Training, groups: Rows) -> Spec:
    """Return the groups' spec, without the scorer where neither ranks nor similarities decide the weights."""
    assert isinstance(config, PreferenceTraining)
    scored = config.curriculum is not None and config.curriculum.by == "similarity"
    return groups.spec if config.sees_ranks or scored else {**groups.spec, "scorer": None}


def checkpoint(store: Store, spec: Spec) -> Artifact:
    """Return the checkpoint of a training or an ensemble, made or not."""
    return store.artifact("checkpoints", spec)


def train(
    name: str, config: Training, store: Store, inputs: Inputs, log_dir: Path | None, executor: Executor
) -> Artifact:
    """Train, or find the checkpoint that the same training made before.

    Args:
        name: as the recipe calls it.
        config: its settings.
        store: where the checkpoint and log π_ref are kept.
        inputs: what it starts from.
        log_dir: for trackers that write files.
        executor: computes log π_ref where it is missing; see `cached_logprobs`.

    Raises:
        InputError: an example does not fit into the model's context, or nothing is left to train on.
        RunError: the loss is not finite, or step 0 shows that policy and reference are not computed alike.
        Stopped: a signal arrived; the state is saved, and the next call goes on.
    """
    artifact = checkpoint(store, training_spec(config, inputs))

    def make(_: bool) -> None:
        from cpo_pipe.trainer.accelerator import new_accelerator

        accelerator = new_accelerator(name, config, log_dir)
        with _table(name, config, inputs, artifact) as groups:
            _make(name, config, store, inputs, groups, artifact, accelerator, executor)

    if not make_missing(lambda: not artifact.complete(), make, artifact):
        if processes.is_main():  # of a training that was killed between its checkpoint and this
            shutil.rmtree(artifact.in_progress, ignore_errors=True)
        log.info("train %s: reused %s", name, artifact.name)
    return artifact


def _table(name: str, config: Training, inputs: Inputs, artifact: Artifact) -> AbstractContextManager[pa.Table]:
    """Return the groups to train on; for objectives without negatives the targets.

    Groups of K = 1 are included only where the MLE loss uses them.
    """
    from cpo_pipe.trainer.difficulty import similarities, strength_gaps
    from cpo_pipe.trainer.mapped_groups import mapped_groups
    from cpo_pipe.trainer.scoring.group_table import targets

    if inputs.groups is None:
        return nullcontext(targets(inputs.selection))
    assert isinstance(config, PreferenceTraining)
    measures = {
        "strength": lambda candidates: strength_gaps(name, candidates, inputs.strengths),
        "similarity": similarities,
    }
    return mapped_groups(
        inputs.groups,
        inputs.selection,
        artifact.in_progress,
        alone=config.mle_weight > 0,
        pairs=config.pairs,
        difficulty=measures.get(config.curriculum.by) if config.curriculum is not None else None,
    )


def _make(
    name: str,
    config: Training,
    store: Store,
    inputs: Inputs,
    table: pa.Table,
    artifact: Artifact,
    accelerator: "Accelerator",
    executor: Executor,
) -> None:
    """Train on a table of groups and write the checkpoint."""
    from cpo_pipe.trainer.checkpoint import CheckpointFiles
    from cpo_pipe.trainer.checks import check_groups, check_pairs
    from cpo_pipe.trainer.difficulty import check_differences, group_difficulties
    from cpo_pipe.trainer.groups import Data, Groups
    from cpo_pipe.trainer.initial_model import check_fits, initial_model
    from cpo_pipe.trainer.loop import Loop
    from cpo_pipe.trainer.lora import add_adapters
    from cpo_pipe.trainer.mapped_groups import DIFFICULTY
    from cpo_pipe.trainer.scoring.group_table import Extremes
    from cpo_pipe.trainer.scoring.logprobs import cached_logprobs, read_logprobs
    from cpo_pipe.trainer.scoring.probes import select_probes
    from cpo_pipe.trainer.validation_split import split_validation

    init, reference, curriculum = inputs.init, inputs.reference, config.curriculum

    # Check the groups, before anything that takes long.
    if not table.num_rows:
        raise InputError(f"train.{name}: nothing to train on: no example, or no group with a negative that was kept")
    extremes = Extremes.of(table)
    for needed in (init, reference):
        if isinstance(needed, Model):
            check_fits(name, extremes, needed.name, needed.context(), needed.vocabulary())
    pairs = config.pairs if isinstance(config, PreferenceTraining) else None
    if pairs:
        check_pairs(name, table, pairs, inputs.selection.num_rows)
    trained, validation = split_validation(name, config, table)
    if curriculum is not None and DIFFICULTY in table.column_names:
        check_differences(name, curriculum, table[DIFFICULTY].to_numpy()[trained])

    # Compute log π_ref where it is missing.
    reference_C = None
    if reference is not None:
        how = config.attention, config.micro_batch_tokens, config.logits_mb
        reference_C = read_logprobs(cached_logprobs(store, reference, config.dtype, table, executor, *how), table)
    everything = Groups.of(table, reference_C)
    if isinstance(config, PreferenceTraining):
        check_groups(name, everything, len(everything) if pairs else inputs.selection.num_rows)

    # Make the network, and write its checkpoint to try.
    model, model_config = initial_model(name, init, inputs.tokenizer, inputs.end_tokens(), extremes)
    files = CheckpointFiles(name, config, init, inputs.tokenizer, artifact.spec["settings"], len(trained))
    if accelerator.is_main_process:
        files.rehearse(artifact, model)
    adapted = add_adapters(name, model, config.lora, config.seed) if config.lora is not None else None

    difficulty_G = None
    if curriculum is not None:
        all_G = group_difficulties(curriculum, store, init, inputs.selection, table, reference_C, executor)
        difficulty_G = all_G[trained]
        check_differences(name, curriculum, difficulty_G)

    # Train.
    data = Data(everything[trained], everything[validation], select_probes(table), difficulty_G)
    same = isinstance(init, Model) and reference is not None and init.fingerprint == reference.fingerprint
    loop = Loop(name, config, model, data, artifact, accelerator, starts_as_reference=same)
    metrics = loop.run()

    # Write the checkpoint.
    steps = [row for row in metrics if "loss" in row]  # the last row may have measurements only
    loss = steps[-1]["loss"]
    state = loop.whole_state() if loop.sharded else None
    if accelerator.is_main_process:
        if state is not None:  # into a network that is whole
            model, _ = initial_model(name, init, inputs.tokenizer, inputs.end_tokens(), extremes)
            adapted = add_adapters(name, model, config.lora, config.seed) if config.lora is not None else None
            model.load_state_dict(state)
        if adapted is not None:
            model = adapted.merge_and_unload()
        if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
            raise RunError(
                f"train.{name}: weights are not finite after the last step; lower train.{name}.learning_rate"
            )
        model.config = model_config
        with artifact.create() as folder:
            files.write(folder.path, model, metrics)
            folder.facts["fingerprint"] = model_fingerprint(folder.path, sha256_file)
            folder.facts["seconds"] = sum(row["seconds"] for row in metrics)
            folder.facts["groups"] = len(trained)
            folder.facts["computed"] = loop.facts
        shutil.rmtree(artifact.in_progress, ignore_errors=True)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # end_training would also part the processes, which may train again
        tracker.finish()
    log.info("train %s: %d steps in %s, loss %.4f", name, len(steps), artifact.name, loss)
