"""Stage `train`: one named training, from its initial model to a checkpoint in the store."""

import hashlib
import heapq
import logging
import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data import atomic, processes
from cpo_pipe.data.end_tokens import end_tokens, name_end_tokens
from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.data.examples import selection_hash
from cpo_pipe.data.executor import Executor
from cpo_pipe.data.fingerprint import Spec, model_fingerprint, sha256_file
from cpo_pipe.data.models import Model, TokenizerFiles, copy_tokenizer, new_network
from cpo_pipe.data.recipe import ScratchModel, Training
from cpo_pipe.data.store import Product, Rows, Store

if TYPE_CHECKING:  # torch is imported only when there is something to train
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

    from cpo_pipe.trainer.interim import Metrics
    from cpo_pipe.trainer.tables import Extremes, Ints

log = logging.getLogger(__name__)

METRICS_FILE = "training-metrics.parquet"

ORDER = 2
"""Raise when the same curriculum comes to take groups in another order."""

# What changes neither the data order nor the arithmetic that decides the weights.
_NOT_IDENTITY = {
    "init", "reference", "negatives",  # whose content is
    "attention", "gradient_checkpointing", "micro_batch_tokens", "logits_mb", "trackers", "eval_every",
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a training starts from, resolved."""

    tokenizer: TokenizerFiles
    init: Model | ScratchModel
    selection: pa.Table
    """Training examples, in order."""
    groups: Rows | None = None
    """For objectives with negatives."""
    reference: Model | None = None
    """For the objectives that have one."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """How good what is of a strategy is, by its label in the groups; for a curriculum by strength."""

    def end_tokens(self) -> tuple[int, ...]:
        """Return the tokens that end a text of the trained model: first the one that ends the targets."""
        return end_tokens(self.init.path if isinstance(self.init, Model) else None, self.tokenizer)


def training_spec(config: Training, inputs: Inputs) -> Spec:
    """Everything that decides the weights, and nothing that doesn't."""
    excluded = _NOT_IDENTITY | config.without_meaning()
    excluded |= {name for name in ("pairs", "curriculum") if getattr(config, name) is None}
    if config.keep == "best":  # then the steps that are looked at decide which weights are kept
        excluded -= {"eval_every"}
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
    """Only eq. 2 sees the order of the negatives, and a curriculum their cosines, hence what embedded them."""
    embedded = config.curriculum is not None and config.curriculum.by == "similarity"
    return groups.spec if config.sees_ranks or embedded else {**groups.spec, "embedder": None}


def checkpoint(store: Store, spec: Spec) -> Product:
    """The checkpoint of a training or an ensemble, made or not."""
    return store.product("checkpoints", spec)


def train(
    name: str, config: Training, store: Store, inputs: Inputs, log_dir: Path | None, executor: Executor
) -> Product:
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
        Stopped: a signal came; the state is saved, and the next call goes on.
    """
    product = checkpoint(store, training_spec(config, inputs))
    if not _agreed(product.complete()):
        with product.lock() if processes.is_main() else nullcontext():
            if not _agreed(product.complete()):  # again: another process may have made it while we waited
                from cpo_pipe.trainer.loop import new_accelerator

                accelerator = new_accelerator(name, config, log_dir)
                with _table(name, config, inputs, product) as groups:
                    _make(name, config, store, inputs, groups, product, accelerator, executor)
                return product
    if processes.is_main():  # of a training that was killed between its checkpoint and this
        shutil.rmtree(product.in_progress, ignore_errors=True)
    log.info("train %s: reused %s", name, product.name)
    return product


def _agreed(answer: bool) -> bool:
    """What the main process says; one alone needs no torch to know it."""
    if processes.count() == 1:
        return answer
    from cpo_pipe.trainer.parallel import agreed

    return agreed(answer)


def _table(name: str, config: Training, inputs: Inputs, product: Product) -> AbstractContextManager[pa.Table]:
    """All groups of the selection that are of use; without negatives those of the target alone.

    Groups of K = 1 are trained on only where the MLE loss has a use for them.
    """
    from cpo_pipe.trainer.curriculum import similarities, strength_gaps
    from cpo_pipe.trainer.tables import mapped_groups, targets

    if inputs.groups is None:
        return nullcontext(targets(inputs.selection))
    measures = {
        "strength": lambda candidates: strength_gaps(name, candidates, inputs.strengths),
        "similarity": similarities,
    }
    return mapped_groups(
        inputs.groups,
        inputs.selection,
        product.in_progress,
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
    product: Product,
    accelerator: "Accelerator",
    executor: Executor,
) -> None:
    from cpo_pipe.trainer.groups import Data, Groups
    from cpo_pipe.trainer.health import check_groups, check_pairs
    from cpo_pipe.trainer.loop import Loop
    from cpo_pipe.trainer.tables import DIFFICULTY, Extremes, probes

    if not table.num_rows:
        raise InputError(f"train.{name}: nothing to train on: no example, or no group with a negative that was kept")
    extremes = Extremes.of(table)
    for needed in (inputs.init, inputs.reference):
        if isinstance(needed, Model):
            _check_fits(name, extremes, needed.name, needed.context(), needed.vocabulary())
    if config.pairs:
        check_pairs(name, table, config.pairs, inputs.selection.num_rows)
    trained, held_out = _held_out(name, config, table)
    if DIFFICULTY in table.column_names:  # before anything that takes long
        _graded(name, config, table[DIFFICULTY].to_numpy()[trained])
    everything = Groups.of(table, _reference(config, store, inputs, table, executor))
    if config.contrasts:
        check_groups(name, everything, len(everything) if config.pairs else inputs.selection.num_rows)
    model, model_config = _initial_model(name, inputs, extremes)
    checkpoint = _Checkpoint(name, config, inputs, product.spec["settings"], len(trained))
    if accelerator.is_main_process:
        checkpoint.rehearse(product, model)
    adapted = _adapters(name, config, model)
    difficulty_G = _difficulty(config, store, inputs, table, everything.reference_C, executor)
    data = Data(
        everything[trained],
        everything[held_out],
        probes(table),
        None if difficulty_G is None else _graded(name, config, difficulty_G[trained]),
    )
    loop = Loop(name, config, model, data, product, accelerator, starts_as_reference=_starts_as_reference(inputs))
    metrics = loop.run()
    loss = metrics[config.steps - 1]["loss"]
    state = loop.whole_state() if loop.sharded else None
    if accelerator.is_main_process:
        if state is not None:  # into a network that is whole
            model, _ = _initial_model(name, inputs, extremes)
            adapted = _adapters(name, config, model)
            model.load_state_dict(state)
        if adapted is not None:
            from cpo_pipe.trainer.lora import merged

            model = merged(adapted)
        if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
            raise RunError(f"train.{name}: weights are not finite after the last step; lower train.{name}.lr")
        model.config = model_config
        with product.create() as folder:
            checkpoint.write(folder.path, model, metrics, loss)
            folder.facts["fingerprint"] = model_fingerprint(folder.path, sha256_file)
            folder.facts["seconds"] = sum(row["seconds"] for row in metrics)
            folder.facts["groups"] = len(trained)
            folder.facts["computed"] = loop.facts
        shutil.rmtree(product.in_progress, ignore_errors=True)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # end_training would also part the processes, which may train again
        tracker.finish()
    log.info("train %s: %d steps in %s, loss %.4f", name, config.steps, product.name, loss)


@dataclass(frozen=True)
class _Checkpoint:
    """The files of a training's result."""

    name: str
    config: Training
    inputs: Inputs
    settings: Spec
    """Those that decide the weights."""
    groups: int
    """How many it is trained on."""

    def write(self, folder: Path, model: "PreTrainedModel", metrics: "Metrics", loss: float) -> None:
        """Write weights, configs, tokenizer, metrics and model card; `loss` is that of the last step."""
        from cpo_pipe.trainer.card import write_card
        from cpo_pipe.trainer.interim import metrics_table

        model.save_pretrained(folder)
        copy_tokenizer(self.inputs.tokenizer.path, folder)
        pq.write_table(metrics_table(metrics), folder / METRICS_FILE)
        write_card(folder, self.name, self.config, self.inputs.init, self.settings, self.groups, loss)

    def rehearse(self, product: Product, model: "PreTrainedModel") -> None:
        """Write all of it once and remove it, so that what cannot be written is found before the first step.

        Raises:
            InputError: transformers, or what writes the card, refuses it.
        """
        from safetensors import SafetensorError

        folder = atomic.temporary(product.path)
        try:
            folder.mkdir(parents=True)
            self.write(folder, model, [{"step": 0, "loss": math.nan}], math.nan)
        except (OSError, SafetensorError, InputError):  # a full disk is no fault of the model's
            raise
        except Exception as error:  # the libraries' refusals have no common type
            raise InputError(
                f"train.{self.name}: its checkpoint could not be written after the last step ({cause(error)}); nothing "
                "was trained; correct the files of the initial model, or start from another one"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _held_out(name: str, config: Training, groups: pa.Table) -> tuple["Ints", "Ints"]:
    """Which groups are trained on, and which only measured: chosen by hash, so that more rows move few."""
    from cpo_pipe.trainer.tables import Lengths

    if config.held_out >= groups.num_rows:
        raise InputError(f"train.{name}.held_out is {config.held_out}, but there are only {groups.num_rows} groups")
    several = Lengths.of(groups).size_G > (1 if config.contrasts else 0)
    ids = (example_id for chunk in groups["example_id"].chunks for example_id in chunk.to_pylist())
    hashes = (
        (hashlib.sha256(f"held out {example_id}".encode()).digest(), row)
        for row, example_id in enumerate(ids)
        if several[row]
    )
    chosen = np.array(sorted(row for _, row in heapq.nsmallest(config.held_out, hashes)), np.int64)
    if config.pairs and config.held_out:  # no pair is trained on that has its prompt among the held out
        prompts = (tuple(ids) for chunk in groups["prompt_ids"].chunks for ids in chunk.to_pylist())
        held = {tuple(ids) for ids in groups["prompt_ids"].take(pa.array(chosen)).to_pylist()}
        chosen = np.array([row for row, prompt in enumerate(prompts) if prompt in held], np.int64)
    if len(chosen) < config.held_out:
        raise InputError(f"train.{name}.held_out is {config.held_out}, but only {len(chosen)} groups have a negative")
    trained = np.setdiff1d(np.arange(groups.num_rows), chosen)
    if not several[trained].any():
        raise InputError(f"train.{name}: no group with a negative is left to train on; lower train.{name}.held_out")
    staged = config.curriculum is not None and config.curriculum.order == "staged"
    if staged and config.curriculum is not None and len(trained) < config.curriculum.stages:
        raise InputError(
            f"train.{name}.curriculum.stages is {config.curriculum.stages}, but there are only {len(trained)} groups "
            "to train on; lower it"
        )
    return trained, chosen


def _check_fits(name: str, groups: "Extremes", model: str, context: int | None, vocabulary: int | None) -> None:
    if context is not None and groups.longest > context:
        raise InputError(
            f"train.{name}: example {groups.longest_in} has {groups.longest} tokens and the context of {model} is "
            f"{context}: lower data.max_prompt_tokens and data.max_target_tokens (or negatives.max_new_tokens)"
        )
    if vocabulary is not None and groups.largest >= vocabulary:
        raise InputError(
            f"train.{name}: a candidate of example {groups.largest_in} has the token id {groups.largest}, but {model} "
            f"has {vocabulary}: its generator has another vocabulary"
        )


def _reference(
    config: Training, store: Store, inputs: Inputs, groups: pa.Table, executor: Executor
) -> "NDArray[np.float64] | None":
    from cpo_pipe.trainer.logprobs import cached_logprobs, read_logprobs

    if inputs.reference is None:
        return None
    how = config.attention, config.micro_batch_tokens, config.logits_mb
    rows = cached_logprobs(store, inputs.reference, config.dtype, groups, executor, *how)
    return read_logprobs(rows, groups)


def _graded(name: str, config: Training, difficulty_G: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """The same, if some groups are more difficult than others.

    Raises:
        InputError: none is.
    """
    measured_G = difficulty_G[~np.isnan(difficulty_G)]
    if len(np.unique(measured_G)) < 2:
        assert config.curriculum is not None
        raise InputError(
            f"train.{name}.curriculum.by is {config.curriculum.by}, but by that all groups are equally difficult: "
            "leave the curriculum out, or take another measure"
        )
    return difficulty_G


def _difficulty(
    config: Training,
    store: Store,
    inputs: Inputs,
    table: pa.Table,
    reference_C: "NDArray[np.float64] | None",
    executor: Executor,
) -> "NDArray[np.float64] | None":
    """Of each group of the table, where the training takes them from easy to hard."""
    from cpo_pipe.trainer.curriculum import margins
    from cpo_pipe.trainer.logprobs import target_logprobs
    from cpo_pipe.trainer.tables import DIFFICULTY, Lengths

    if config.curriculum is None:
        return None
    lengths = Lengths.of(table)
    match config.curriculum.by:
        case "strength" | "similarity":
            found: NDArray[np.float64] = table[DIFFICULTY].to_numpy()
            return found
        case "margin":
            assert reference_C is not None
            return margins(reference_C, lengths.candidate_C, lengths.size_G)
        case "length":
            return lengths.candidate_C.astype(np.float64)
        case "likelihood":
            assert isinstance(inputs.init, Model)
            scored = target_logprobs(store, inputs.init, inputs.selection, executor)
            return np.array([-logprob / tokens for logprob, tokens in scored])


def _starts_as_reference(inputs: Inputs) -> bool:
    init, reference = inputs.init, inputs.reference
    return isinstance(init, Model) and reference is not None and init.fingerprint == reference.fingerprint


def _initial_model(name: str, inputs: Inputs, extremes: "Extremes") -> tuple["PreTrainedModel", "PreTrainedConfig"]:
    """Make the network to train, in float32 and without dropout; it ends texts as the targets do.

    Returns:
        The network, and the config for its checkpoint, which keeps the dropout.
    """
    import torch

    from cpo_pipe.trainer.dropout import remove_dropout

    model: PreTrainedModel
    if isinstance(inputs.init, Model):
        model = inputs.init.load(torch.float32)
    else:
        model = scratch_model(inputs.init, inputs.tokenizer)
        settings = model.config.get_text_config()
        context = getattr(settings, "max_position_embeddings", None)
        _check_fits(name, extremes, "the scratch model", context, settings.vocab_size)
    model.train(False)
    name_end_tokens(model, inputs.end_tokens())
    return model, remove_dropout(model)


def _adapters(name: str, config: Training, model: "PreTrainedModel") -> "PeftModel | None":
    """Give the network adapters, where the recipe asks for any."""
    if config.lora is None:
        return None
    from cpo_pipe.trainer.lora import add_adapters

    return add_adapters(name, model, config.lora, config.seed)


def scratch_model(config: ScratchModel, tokenizer: TokenizerFiles) -> "PreTrainedModel":
    """A model with random weights, its vocabulary and special tokens taken from the tokenizer.

    Raises:
        InputError: transformers does not know the architecture or its settings.
    """
    import torch
    from transformers import AutoConfig

    vocabulary = tokenizer.load()
    ids = {"eos_token_id": vocabulary.eos_token_id, "bos_token_id": vocabulary.bos_token_id,
           "pad_token_id": vocabulary.pad_token_id}  # fmt: skip
    try:
        settings = AutoConfig.for_model(config.architecture, vocab_size=len(vocabulary), **ids, **config.config)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = new_network(settings)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        made = f"a {config.architecture} model cannot be made from config {config.config}"
        raise InputError(f"init: {made} ({cause(error)})") from error
    return model
