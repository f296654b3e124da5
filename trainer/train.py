"""Stage `train`: one named training, from its initial model to a checkpoint in the store."""

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.examples import selection_hash
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, Spec, model_fingerprint, sha256_file
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.data.progress import track
from cpo_pipe.data.recipe import ScratchModel, Training
from cpo_pipe.data.store import Product, Rows, Store

if TYPE_CHECKING:  # torch is imported only when there is something to train
    from torch import Tensor
    from transformers import PreTrainedModel

    from cpo_pipe.trainer.groups import Group, ReferenceLogprobs
    from cpo_pipe.trainer.interim import Interim

log = logging.getLogger(__name__)

METRICS_FILE = "training-metrics.parquet"

# What changes neither the data order nor the arithmetic that decides the weights.
_NOT_IDENTITY = {"init", "reference", "micro_batch"}
_ONLY_LISTWISE = {"beta", "mle_weight", "length_normalize"}

ROUNDING = 1e-5
"""Relative difference that a log-prob may have from itself when it is summed in another batch."""
FIRST_LOSS_TOLERANCE = {"float32": 0.05, "bfloat16": 1.0}
"""In nats, at the paper's β = 5 and log-probs of a thousand nats; what is really wrong shows as whole nats."""


@dataclass(frozen=True)
class Inputs:
    """What a training starts from, resolved."""

    tokenizer: TokenizerFiles
    init: Model | ScratchModel
    selection: pa.Table
    """Training examples, in order."""
    groups: Rows | None = None
    """For listwise objectives."""
    reference: Model | None = None
    """For listwise objectives."""


def training_spec(config: Training, inputs: Inputs) -> Spec:
    """Everything that decides the weights, and nothing that doesn't."""
    excluded = _NOT_IDENTITY | (_ONLY_LISTWISE if config.objective == "mle" else set())
    init = inputs.init
    return {
        "settings": config.model_dump(mode="json", exclude=excluded),
        "init": {"model": init.fingerprint} if isinstance(init, Model) else {"scratch": init.model_dump(mode="json")},
        "tokenizer": inputs.tokenizer.fingerprint,
        "rows": selection_hash(inputs.selection),
        "groups": _groups_spec(config, inputs.groups) if inputs.groups else None,
        "reference": inputs.reference.fingerprint if inputs.reference else None,
    }


def _groups_spec(config: Training, groups: Rows) -> Spec:
    """Eq. 1 does not see the order of the negatives, hence not what embedded them."""
    return groups.spec if config.objective == "cpo-ranked" else {**groups.spec, "embedder": None}


def checkpoint(store: Store, spec: Spec) -> Product:
    """The checkpoint of a training or an ensemble, made or not."""
    return store.product("checkpoints", spec)


def checkpoint_model(name: str, product: Product) -> Model:
    """A complete checkpoint as a model."""
    return Model(name, product.path, product.manifest["fingerprint"])


def train(name: str, config: Training, store: Store, inputs: Inputs) -> Product:
    """Train, or find the checkpoint that the same training made before.

    Raises:
        InputError: an example does not fit into the model's context, or nothing is left to train on.
        RunError: the loss is not finite, or step 0 shows that policy and reference are not computed alike.
    """
    product = checkpoint(store, training_spec(config, inputs))
    if not product.complete():
        with product.lock():
            if not product.complete():  # again: another process may have made it while we waited
                _make(name, config, store, inputs, product)
                return product
    log.info("train %s: reused %s", name, product.name)
    return product


def _make(name: str, config: Training, store: Store, inputs: Inputs, product: Product) -> None:
    from cpo_pipe.trainer.interim import Interim

    groups = _groups(name, config, inputs)
    model = _initial_model(name, inputs, groups)
    reference = _reference(config, store, inputs, groups)
    interim = Interim(product)
    metrics = _optimize(name, config, model, groups, reference, interim, check_start=_starts_as_reference(inputs))
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise RunError(f"train.{name}: weights are not finite after the last step; lower train.{name}.lr")
    with product.create() as folder:
        model.save_pretrained(folder.path)
        copy_tokenizer(inputs.tokenizer.path, folder.path)
        pq.write_table(pa.Table.from_pylist(metrics), folder.path / METRICS_FILE)
        folder.facts["fingerprint"] = model_fingerprint(folder.path, sha256_file)
        folder.facts["seconds"] = sum(row["seconds"] for row in metrics)
        folder.facts["groups"] = len(groups)
    interim.clear()
    log.info("train %s: %d steps in %s, loss %.4f", name, config.steps, product.name, metrics[-1]["loss"])


def _groups(name: str, config: Training, inputs: Inputs) -> list["Group"]:
    """What is trained on; groups of K = 1 only where the MLE loss has a use for them."""
    from cpo_pipe.trainer.groups import groups_from_examples, read_groups

    if inputs.groups is None:
        groups = groups_from_examples(inputs.selection)
    else:
        everything = read_groups(inputs.groups, inputs.selection)
        groups = [group for group in everything if len(group.candidates) > 1 or config.mle_weight]
        alone = sum(len(group.candidates) == 1 for group in everything)
        if alone:
            log.info("train %s: %d of %d groups have K = 1 and leave the listwise loss", name, alone, len(everything))
    if not groups:
        raise InputError(f"train.{name}: nothing to train on: no example, or no group with a negative that was kept")
    for model in (inputs.init, inputs.reference):
        if isinstance(model, Model):
            _check_fits(name, groups, model.name, model.context())
    return groups


def _check_fits(name: str, groups: Sequence["Group"], model: str, context: int | None) -> None:
    longest = max(groups, key=lambda group: group.tokens())
    if context is not None and longest.tokens() > context:
        raise InputError(
            f"train.{name}: example {longest.example_id} has {longest.tokens()} tokens and the context of {model} is "
            f"{context}: lower data.max_prompt_tokens and data.max_target_tokens (or negatives.max_new_tokens)"
        )


def _reference(config: Training, store: Store, inputs: Inputs, groups: Sequence["Group"]) -> "ReferenceLogprobs":
    from cpo_pipe.trainer.groups import read_reference
    from cpo_pipe.trainer.logprobs import cached_logprobs

    if inputs.reference is None:
        return {}
    pairs = [(group.example_id, group.prompt_ids, group.candidates) for group in groups]
    return read_reference(cached_logprobs(store, inputs.reference, config.dtype, pairs), groups)


def _starts_as_reference(inputs: Inputs) -> bool:
    init, reference = inputs.init, inputs.reference
    return isinstance(init, Model) and reference is not None and init.fingerprint == reference.fingerprint


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put a tokenizer's files beside a checkpoint's weights."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def _initial_model(name: str, inputs: Inputs, groups: Sequence["Group"]) -> "PreTrainedModel":
    from cpo_pipe.trainer.logprobs import device, load_model

    if isinstance(inputs.init, Model):
        return load_model(inputs.init)
    model: PreTrainedModel = scratch_model(inputs.init, inputs.tokenizer)
    model.to(device()).eval()  # type: ignore[arg-type]
    _check_fits(name, groups, "the scratch model", getattr(model.config, "max_position_embeddings", None))
    return model


def scratch_model(config: ScratchModel, tokenizer: TokenizerFiles) -> "PreTrainedModel":
    """A model with random weights, its vocabulary and special tokens taken from the tokenizer.

    Raises:
        InputError: transformers does not know the architecture or its settings.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = tokenizer.load()
    ids = {"eos_token_id": vocabulary.eos_token_id, "bos_token_id": vocabulary.bos_token_id,
           "pad_token_id": vocabulary.pad_token_id}  # fmt: skip
    try:
        settings = AutoConfig.for_model(config.architecture, vocab_size=len(vocabulary), **ids, **config.config)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, dtype=torch.float32
            )
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        made = f"a {config.architecture} model cannot be made from config {config.config}"
        raise InputError(f"init: {made} ({reason})") from error
    return model


def _optimize(
    name: str,
    config: Training,
    model: "PreTrainedModel",
    groups: Sequence["Group"],
    reference: "ReferenceLogprobs",
    interim: "Interim",
    check_start: bool,
) -> list[dict[str, float]]:
    """Run all steps in place, or those that are left of a training that was stopped; returns the metrics of each.

    The model stays in eval mode: that is what turns off all dropout, also where it hides in attention modules.
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    metrics = interim.restore(model, optimizer)
    done = len(metrics)
    order = batches(len(groups), config.batch_size, config.steps, config.seed)
    with track(f"train {name}", config.steps - done) as meter:
        for step, chosen in islice(enumerate(order), done, None):
            start = time.monotonic()
            for parameters in optimizer.param_groups:
                parameters["lr"] = config.lr * lr_factor(config, step)
            batch = [groups[index] for index in chosen]
            row = _step(config, model, batch, reference)
            sizes = [len(group.candidates) for group in batch]
            if check_start and step == 0 and max(sizes) > 1:  # with an MLE term a batch may be all K = 1
                check_first_loss(config, row["cpo"], sizes)
            if not math.isfinite(row["loss"]):
                ids = ", ".join(group.example_id for group in batch[:5])
                raise RunError(f"train.{name}: the loss is {row['loss']} at step {step}; its batch starts with {ids}")
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf))
            if not math.isfinite(norm):
                raise RunError(f"train.{name}: the gradient's norm is {norm} at step {step}, the loss {row['loss']}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics.append({"step": step, "lr": config.lr * lr_factor(config, step), "grad_norm": norm, **row,
                            "seconds": time.monotonic() - start})  # fmt: skip
            meter.advance(1, note=_note(row))
            interim.save_now_and_then(model, optimizer, metrics)
    return metrics


def _step(
    config: Training,
    model: "PreTrainedModel",
    batch: Sequence["Group"],
    reference: "ReferenceLogprobs",
) -> dict[str, float]:
    """Gradients of one batch, accumulated over micro-batches so that the means are those of the whole batch."""
    import torch

    from cpo_pipe.trainer.logprobs import continuation_logprobs, precision

    target_tokens = sum(len(group.candidates[0]) for group in batch)
    listwise = sum(len(group.candidates) > 1 for group in batch) if config.objective != "mle" else 0
    mle_weight = 1.0 if config.objective == "mle" else config.mle_weight
    totals = dict.fromkeys(("mle", "cpo", "won", "margin"), 0.0)
    ordered = sorted(batch, key=lambda group: group.tokens())  # like lengths side by side: less padding
    for start in range(0, len(ordered), config.micro_batch):
        micro = ordered[start : start + config.micro_batch]
        scored = [group.candidates if config.objective != "mle" else group.candidates[:1] for group in micro]
        with precision(config.dtype):
            logprobs = continuation_logprobs(
                model,
                [group.prompt_ids for group, candidates in zip(micro, scored, strict=True) for _ in candidates],
                [candidate for candidates in scored for candidate in candidates],
            )
        per_group = torch.split(logprobs, [len(candidates) for candidates in scored])
        loss = _mle(per_group, totals) / target_tokens * mle_weight
        if listwise:
            loss = loss + _listwise(config, micro, per_group, reference, totals) / listwise
        loss.backward()  # type: ignore[no-untyped-call]
    mle = totals["mle"] / target_tokens
    row = {
        "loss": mle_weight * mle + (totals["cpo"] / listwise if listwise else 0.0),
        "target_logprob": -totals["mle"] / len(batch),
        "target_logprob_per_token": -mle,
    }
    if config.objective != "mle":
        row |= {key: totals[key] / listwise if listwise else math.nan for key in ("cpo", "won", "margin")}
        row["candidates"] = sum(len(group.candidates) for group in batch) / len(batch)
    return row


def _mle(per_group: Sequence["Tensor"], totals: dict[str, float]) -> "Tensor":
    import torch

    from cpo_pipe.trainer.losses import mle_loss

    loss = mle_loss(torch.stack([logprobs[0] for logprobs in per_group])).sum()
    totals["mle"] += float(loss.detach())
    return loss


def _listwise(
    config: Training,
    micro: Sequence["Group"],
    per_group: Sequence["Tensor"],
    reference: "ReferenceLogprobs",
    totals: dict[str, float],
) -> "Tensor":
    """Summed loss of a micro-batch's groups with K ≥ 2, its metrics added to `totals`."""
    from torch.nn.utils.rnn import pad_sequence

    from cpo_pipe.trainer.groups import collate
    from cpo_pipe.trainer.losses import cpo_loss, margin, ranked_cpo_loss, won

    chosen = [index for index, group in enumerate(micro) if len(group.candidates) > 1]
    if not chosen:
        return per_group[0].sum() * 0
    batch = collate([micro[index] for index in chosen], reference, per_group[0].device)
    policy_GK = pad_sequence([per_group[index] for index in chosen], batch_first=True)
    reference_GK = batch.reference_GK
    if config.length_normalize:
        policy_GK, reference_GK = policy_GK / batch.tokens_GK, reference_GK / batch.tokens_GK
    if config.objective == "cpo":
        losses = cpo_loss(policy_GK, reference_GK, batch.mask_GK, beta=config.beta)
    else:
        losses = ranked_cpo_loss(policy_GK, reference_GK, batch.rank_GK, batch.mask_GK, beta=config.beta)
    rewards = losses.reward_GK.detach()
    totals["cpo"] += float(losses.loss_G.detach().sum())
    # Policy and reference were scored in other batches: sums of floats that are equal differ by about this much.
    noise_G = config.beta * ROUNDING * reference_GK.abs().amax(-1)
    totals["won"] += float(won(rewards, batch.mask_GK, noise_G).sum())
    totals["margin"] += float(margin(rewards, batch.mask_GK).sum())
    return losses.loss_G.sum()


def check_first_loss(config: Training, loss: float, sizes: Sequence[int]) -> None:
    """Refuse a run that starts from its reference and does not show the loss of equal models at step 0.

    With all rewards 0 it is log K (eq. 1) or log K! (eq. 2), averaged over the groups of K ≥ 2; `sizes` are the K.

    Raises:
        RunError: it is not, within rounding.
    """
    one = math.log if config.objective == "cpo" else (lambda k: math.lgamma(k + 1))
    expected = float(np.mean([one(k) for k in sizes if k > 1]))
    if abs(loss - expected) > FIRST_LOSS_TOLERANCE[config.dtype]:
        formula = "log K" if config.objective == "cpo" else "log K!"
        raise RunError(
            f"step 0: the policy starts from its reference, but the loss is {loss:.4f}, not {formula} = "
            f"{expected:.4f}: dropout is on, or the two are computed in another way"
        )


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's batch: one shuffled pass over all after the other, cut into batches of `size`."""

    def passes() -> Iterator[int]:
        epoch = 0
        while True:
            yield from np.random.default_rng([seed, epoch]).permutation(count).tolist()
            epoch += 1

    stream = passes()
    for _ in range(steps):
        yield [next(stream) for _ in range(size)]


def lr_factor(config: Training, step: int) -> float:
    """Share of the peak learning rate at a step (from 0)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _note(row: Mapping[str, float]) -> str:
    won = f" won {row['won']:.2f} margin {row['margin']:.2f}" if "won" in row else ""
    return f"loss {row['loss']:.4f}{won} target {row['target_logprob']:.1f}"
