"""The optimization loop: all steps of one training, in one process or several (accelerate), stoppable at any moment."""

import importlib.util
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cpo_pipe.data import processes
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.progress import track
from cpo_pipe.data.recipe import Training
from cpo_pipe.data.store import Product
from cpo_pipe.trainer import objective
from cpo_pipe.trainer.batches import batches, micro_batches
from cpo_pipe.trainer.curriculum import curriculum_batches
from cpo_pipe.trainer.groups import Data, Group
from cpo_pipe.trainer.health import Watch, repetition
from cpo_pipe.trainer.interim import Interim, Metrics, best_step
from cpo_pipe.trainer.objective import GroupFigures, Normalizers
from cpo_pipe.trainer.optimizer import lr_factor, parameter_groups
from cpo_pipe.trainer.parallel import join, wants_fsdp
from cpo_pipe.trainer.scheduled_sampling import Draws
from cpo_pipe.trainer.scorer import Scorer, choose
from cpo_pipe.trainer.trees import Packed

log = logging.getLogger(__name__)

START_TOLERANCE = 2e-3
"""How far policy and reference may be apart at step 0, in nats per square root of a token; what is really wrong shows
as a share of a nat per token."""
START_NOISE = 2.0
"""What is added to it for rounding, as a multiple of what the self-check measured: both models are rounded, and the
reference's log-probs may have been computed in another way."""
SAMPLES = 8
SAMPLE_TOKENS = 64
"""How many greedy samples are looked at for repetition, and their length."""


class Stopped(KeyboardInterrupt):
    """A signal asked the training to stop; its state is saved."""

    def __init__(self, name: str, step: int, number: int):
        super().__init__(f" by {signal.Signals(number).name} in the training {name}, saved after step {step}")


def new_accelerator(name: str, config: Training, log_dir: Path | None) -> Accelerator:
    """The processes of this run, as `accelerate launch` or nothing made them.

    Raises:
        InputError: accelerate is configured for what this loop does not do, or a tracker is not installed.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if config.dtype == "bfloat16" else "no"
    if asked not in ("no", ours):
        raise InputError(
            f"train.{name}.dtype is {config.dtype}, but accelerate is configured for mixed_precision {asked}: the "
            "recipe decides the arithmetic; set mixed_precision to no, or the recipe's dtype to bfloat16"
        )
    for tracker in config.trackers:  # accelerate would leave it out without a word
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"train.{name}.trackers: {tracker} is not installed; pip install {tracker}")
    join()
    # The arithmetic is the scorer's (autocast over float32 weights), the same in every mode.
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(config.trackers) or None,
        project_dir=log_dir and log_dir / "trackers" / name,
    )
    if accelerator.num_processes != processes.count():
        raise InputError(
            f"{processes.count()} processes were started, but accelerate sees {accelerator.num_processes}: each would "
            "train alone; set distributed_type to MULTI_GPU or FSDP in its config"
        )
    kind = accelerator.distributed_type
    if kind not in _KINDS:
        raise InputError(
            f"accelerate is configured for {kind.value}; train runs alone, with DDP, or with FSDP version 2"
        )
    if wants_fsdp() and kind != DistributedType.FSDP:
        raise InputError("accelerate is configured for FSDP, but runs without: start it with accelerate launch")
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise InputError("accelerate is configured for FSDP version 1; set fsdp_version: 2")
    if kind == DistributedType.FSDP and isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise InputError(
            "accelerate is configured for FSDP with CPU offload, which train does not support; set "
            "fsdp_offload_params: false"
        )
    return accelerator


_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


class Loop:
    """One training.

    Args:
        name: as the recipe calls it.
        config: its settings.
        model: initial weights, with all dropout off; trained in place.
        data: what it learns from.
        product: the checkpoint that is being made.
        accelerator: see `new_accelerator`.
        starts_as_reference: whether the first loss must be that of equal models.
    """

    def __init__(
        self,
        name: str,
        config: Training,
        model: PreTrainedModel,
        data: Data,
        product: Product,
        accelerator: Accelerator,
        starts_as_reference: bool,
    ):
        self.name, self.config, self.data = name, config, data
        self._accelerator = accelerator
        self._starts_as_reference = starts_as_reference
        self.scorer = Scorer(model, config.dtype, config.logits_mb)
        try:
            self.scorer.set_checkpointing(config.gradient_checkpointing)
        except ValueError as error:
            raise InputError(f"train.{name}.gradient_checkpointing: {error}") from error
        optimizer = torch.optim.AdamW(
            parameter_groups(self.scorer.model, config),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        module, prepared = accelerator.prepare(self.scorer, optimizer)
        self._module: nn.Module = module
        self.sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        """Whether each process holds a part of the weights only."""
        if self.sharded:
            # FSDP would leave the outermost weights whole after a forward pass, and after one without a backward pass
            # (held-out groups) use these, stale, in the next step.
            module.set_reshard_after_forward(True)
        self._optimizer: torch.optim.Optimizer = prepared
        self._interim = Interim(product, accelerator, module, getattr(prepared, "optimizer", prepared))
        self.facts: dict[str, Any] = {}
        """What decides the order of floating-point sums, and how the model is computed; kept over a resume."""

    def run(self) -> Metrics:
        """All steps, or those that are left of a training that was stopped; returns their metrics.

        Row n is about the weights after n steps: the loss of the batch that step n learns from and, where they are due,
        measurements of held-out groups and samples. The last row has only the measurements after the last step.

        Raises:
            RunError: a loss is not finite (the last good state is kept), or the first one shows that policy and
                reference are not computed alike.
            InputError: the attention asked for is not exact for this model.
            Stopped: a signal came; the state is saved.
        """
        metrics, facts = self._interim.restore()
        self._start(facts)
        watch = Watch(self.name, self.config, metrics)
        done = len(metrics)
        order = self._order()
        main = self._accelerator.is_main_process
        with _StopRequests() as stop, track(f"train {self.name}", self.config.steps - done, shown=main) as meter:
            for step, chosen in islice(enumerate(order), done, None):
                start = time.monotonic()
                measured = self._measurements(step)
                if self._is_best(metrics, measured):
                    self._interim.save_best(step)
                row = self._step(step, [self.data.groups[index] for index in chosen], metrics, stop) | measured
                row["seconds"] = time.monotonic() - start
                metrics.append(row)
                self._report(row, watch)
                meter.advance(1, note=_note(row))
                self._interim.save_now_and_then(metrics, self.facts)
            self._interim.save(metrics, self.facts)  # whatever may happen to the checkpoint
            start = time.monotonic()
            last = self._measurements(self.config.steps)
            self._leave_if_asked(stop, metrics, between_steps=True)
        if len(last) > 1:
            metrics.append({**last, "seconds": time.monotonic() - start})
            self._report(metrics[-1], watch)
        if self.config.keep == "best":
            self._keep_best(metrics)
        return metrics

    def _report(self, row: dict[str, float], watch: Watch) -> None:
        """Give a row to the warnings and the trackers."""
        if self._accelerator.is_main_process:
            watch.step(row)
        if self.config.trackers:
            values = {key: value for key, value in row.items() if key != "step"}
            self._accelerator.log(values, step=int(row["step"]))

    def _is_best(self, metrics: Metrics, measured: dict[str, float]) -> bool:
        """Whether the weights just measured are the best so far, and the recipe asks for the best."""
        asked = self.config.keep == "best" and "held_out_loss" in measured
        return asked and best_step([*metrics, measured]) == measured["step"]

    def _order(self) -> Iterator[list[int]]:
        """Which groups each step takes, the same after a resume."""
        config, difficulty_G = self.config, self.data.difficulty_G
        if config.curriculum is None:
            return batches(len(self.data.groups), config.batch_size, config.steps, config.seed)
        assert difficulty_G is not None
        return curriculum_batches(config.curriculum, difficulty_G, config.batch_size, config.steps, config.seed)

    def whole_state(self) -> dict[str, Tensor]:
        """All weights of sharded ones, on the CPU of the main process; nothing in the others."""
        gathered = {}
        for name, tensor in self.scorer.model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self._accelerator.is_main_process:
                gathered[name] = whole.detach().cpu()
        return gathered

    def _start(self, facts: dict[str, Any]) -> None:
        """Decide how the model is computed, or do it as before the training was stopped."""
        if self.config.trackers:
            named = {"wandb": {"name": self.name}, "mlflow": {"run_name": self.name}}
            self._accelerator.init_trackers("cpo-pipe", config=_flat(self.config), init_kwargs=named)
        now = {
            "processes": self._accelerator.num_processes,
            "device": self._accelerator.device.type,
            "gradient_checkpointing": self.config.gradient_checkpointing,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        requested = self.config.attention
        if facts:
            kept = {key: facts[key] for key in ("attention", "logits_mb", "micro_batch_tokens")}
            asked = {key: getattr(self.config, key) for key in kept}
            ignored = [f"{key} {asked[key]}" for key in kept if asked[key] not in (kept[key], "auto")]
            if ignored:
                log.warning(
                    "train %s: %s not taken: it goes on with %s, as it began; to begin anew, remove %s",
                    self.name, ", ".join(ignored), kept, self._interim.folder,
                )  # fmt: skip
            if facts["threads"] != torch.get_num_threads():
                log.info("train %s: takes %d threads, as before it was stopped", self.name, facts["threads"])
                torch.set_num_threads(facts["threads"])
            self.scorer.logits_bytes = facts["logits_mb"] << 20
            self.facts = facts | now
            changed = [f"{key} {facts.get(key)} → {value}" for key, value in now.items() if facts.get(key) != value]
            if not changed:
                self.scorer.set_attention(facts["attention"])
                return
            log.warning(
                "train %s: resumes under other conditions than before (%s): the self-check runs again; "
                "the result is equal up to rounding, not bitwise",
                self.name, ", ".join(changed),
            )  # fmt: skip
            if requested != "auto" and facts["device"] == now["device"]:
                requested = facts["attention"]
        self.facts = {
            "threads": torch.get_num_threads(),
            "logits_mb": self.config.logits_mb,
            "micro_batch_tokens": self.config.micro_batch_tokens,
            **self.facts, **now,
        }  # fmt: skip
        budget = self.facts["micro_batch_tokens"]
        name, probes = f"train {self.name}", self.data.probes
        choice = choose(name, self.scorer, probes, requested, budget, module=self._module)
        self.facts |= asdict(choice)

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, step: int, batch: Sequence[Group], metrics: Metrics, stop: "_StopRequests") -> dict[str, float]:
        config = self.config
        lr = config.lr * lr_factor(config, step)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = lr
        normalizers = Normalizers.of(config, batch)
        figures = []
        passes = self._passes(batch)
        for number, micro in enumerate(passes):
            self._leave_if_asked(stop, metrics, between_steps=number == 0)
            with self._synchronized(number == len(passes) - 1):
                found, share = self._figures(batch, micro, normalizers, step)
                # DDP and FSDP average gradients over processes; a loss is a sum over them.
                self._accelerator.backward(share * self._accelerator.num_processes)
            figures.append((micro, found))
        sums = self._sums(figures)
        row = objective.metrics(config, sums, normalizers, batch)
        self._check_finite(step, batch, row, figures, metrics)
        # With an MLE term a batch may be all K = 1.
        if self._starts_as_reference and step == 0 and normalizers.contrasted:
            check_start(self.name, float(sums.start_G) / normalizers.contrasted, self.facts["noise"])
        norm = self._clip()
        if not math.isfinite(norm):
            self._keep_last_good(metrics)
            raise RunError(
                f"train.{self.name}: the gradient's norm is {norm} at step {step}, the loss {row['loss']}; its batch "
                f"is {_ids(batch)}; lower train.{self.name}.lr"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"step": step, "lr": lr, "grad_norm": norm, **row}

    def _passes(self, batch: Sequence[Group]) -> list[list[int]]:
        """The groups of each of this process's forward passes."""
        asked = [objective.texts(self.config, group) for group in batch]
        if self.config.objective == "pss":
            asked = [(prompt, target * self.config.sequences) for prompt, target in asked]
        budget = self.facts["micro_batch_tokens"]
        plan = micro_batches(asked, self.scorer.attention, budget, self._accelerator.num_processes)
        return plan[self._accelerator.process_index]

    def _figures(
        self, batch: Sequence[Group], micro: Sequence[int], normalizers: Normalizers, step: int | None = None
    ) -> tuple[GroupFigures, Tensor]:
        """Of one forward pass, and its share of the batch's loss; without a step nothing is drawn (pss)."""
        # A process without a group left computes some group for nothing: the others wait for it to take part.
        groups = [batch[index] for index in micro or [0]]
        packed = self._packed(groups)
        if self.config.objective == "pss" and step is not None:
            packed = self._drawn(groups, packed, step)
        logprobs = packed.per_group(self._module(packed))
        found = objective.figures(self.config, groups, logprobs)
        if not micro:
            share = sum((values.sum() for values in logprobs), start=torch.zeros((), device=logprobs[0].device)) * 0
            return GroupFigures(*(field.detach()[:0] for field in found)), share
        share = objective.loss(self.config, found, normalizers)
        return GroupFigures(*(field.detach() for field in found)), share

    def _packed(self, groups: Sequence[Group]) -> Packed:
        return self.scorer.pack([objective.texts(self.config, group) for group in groups])

    def _drawn(self, groups: Sequence[Group], packed: Packed, step: int) -> Packed:
        """The targets after inputs that mix their tokens with what the policy draws now."""
        config = self.config
        draws = Draws(config.seed, step, config.sequences, config.replace)
        with torch.no_grad():
            drawn_SM = self._module(packed, draws.uniform(groups, packed))
        mixed = draws.mixed(groups, packed, drawn_SM)
        texts = [(group.prompt_ids, inputs) for group, inputs in zip(groups, mixed, strict=True)]
        return self.scorer.pack(texts, [group.candidates[:1] * config.sequences for group in groups])

    def _sums(self, figures: Sequence[tuple[list[int], GroupFigures]]) -> GroupFigures:
        """Each figure over all groups of a batch and all processes."""
        sums = torch.stack([torch.cat(fields).double().sum() for fields in zip(*(f for _, f in figures), strict=True)])
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums, "sum")
        return GroupFigures(*sums.unbind())

    def _clip(self) -> float:
        """The norm of the gradient, before it was clipped to the recipe's."""
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last of a step's passes only."""
        if last:
            return nullcontext()
        manager: AbstractContextManager[Any] = self._accelerator.no_sync(self._module)
        return manager

    # ── what may end it early ────────────────────────────────────────────────────────────────────────────────────

    def _leave_if_asked(self, stop: "_StopRequests", metrics: Metrics, between_steps: bool) -> None:
        """Save and leave. In one process even within a step, which is then begun anew after the resume."""
        number = stop.number
        if self._accelerator.num_processes > 1:
            if not between_steps:
                return  # the processes would leave at different places
            flags = torch.tensor(number, device=self._accelerator.device)
            number = int(self._accelerator.gather(flags.unsqueeze(0)).max())
        if number:
            self._optimizer.zero_grad(set_to_none=True)
            self._interim.save(metrics, self.facts)
            raise Stopped(self.name, len(metrics), number)

    def _check_finite(
        self,
        step: int,
        batch: Sequence[Group],
        row: dict[str, float],
        figures: Sequence[tuple[list[int], GroupFigures]],
        metrics: Metrics,
    ) -> None:
        if math.isfinite(row["loss"]):
            return
        broken = _broken(batch, figures)
        self._keep_last_good(metrics)
        raise RunError(
            f"train.{self.name}: the loss is {row['loss']} at step {step}, because of {_ids(broken or batch)}; look at "
            f"these groups, or lower train.{self.name}.lr"
        )

    def _keep_last_good(self, metrics: Metrics) -> None:
        """Save the state before the step that went wrong, if it is sound itself."""
        self._optimizer.zero_grad(set_to_none=True)
        self._interim.save(metrics, self.facts)

    # ── looking at it now and then ───────────────────────────────────────────────────────────────────────────────

    def _measurements(self, step: int) -> dict[str, float]:
        """Of held-out groups and samples after `step` steps, where they are due: also before the first step."""
        row: dict[str, float] = {"step": step}
        if step % self.config.eval_every and step != self.config.steps:
            return row
        if self.data.held_out:
            row |= {f"held_out_{key}": value for key, value in self._held_out(step).items()}
        if not self.sharded:  # generating needs the weights whole
            row["repetition"] = self._repetition()
        return row

    @torch.no_grad()
    def _held_out(self, step: int) -> dict[str, float]:
        normalizers = Normalizers.of(self.config, self.data.held_out)
        passes = self._passes(self.data.held_out)
        figures = [(micro, self._figures(self.data.held_out, micro, normalizers)[0]) for micro in passes]
        row = objective.metrics(self.config, self._sums(figures), normalizers, self.data.held_out)
        if not math.isfinite(row["loss"]):  # the steps since the last save are lost: their weights may be no good
            broken = _broken(self.data.held_out, figures) or self.data.held_out
            lower = f", or lower train.{self.name}.lr" if step else ""
            raise RunError(
                f"train.{self.name}: the held-out loss is {row['loss']} after {step} steps, because of {_ids(broken)}; "
                f"look at these groups{lower}"
            )
        return row

    @torch.no_grad()
    def _repetition(self) -> float:
        """rep-4 of greedy samples. Each process makes the same: no weights move between them."""
        groups = (self.data.held_out or self.data.groups)[: SAMPLES * SAMPLES]
        prompts = list(dict.fromkeys(tuple(group.prompt_ids) for group in groups))[:SAMPLES]
        samples: list[list[int]] = []
        with self.scorer.own_attention() as model:
            eos = model.generation_config.eos_token_id
            ends = eos if isinstance(eos, list) else [eos]
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
            # Those of one length together: padding is not exact for every architecture.
            for length, alike in groupby(sorted(prompts, key=len), key=len):
                room = min(SAMPLE_TOKENS, context - length)
                if room < 1:
                    continue
                ids = torch.tensor(list(alike), device=self._accelerator.device)
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
                    pad_token_id=ends[0] or 0,
                )  # type: ignore[operator]  # fmt: skip
                rows = out[:, length:].tolist()
                samples += [row[: next((at for at, one in enumerate(row, 1) if one in ends), room)] for row in rows]
        return repetition(samples)

    def _keep_best(self, metrics: Metrics) -> None:
        best = best_step(metrics)
        loss = next(row["held_out_loss"] for row in metrics if row["step"] == best)
        if best < self.config.steps:
            self._interim.restore_best(best)
        if best == 0:
            log.warning(
                "train %s: no step lowered the held-out loss below the %.4f of the initial weights; keeps the initial "
                "weights; lower lr, or measure more often (eval_every)",
                self.name, loss,
            )  # fmt: skip
            return
        log.info(
            "train %s: keeps the weights after %d steps, whose held-out loss %.4f is the lowest", self.name, best, loss
        )


class _StopRequests:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one is not waited for."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequests":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        log.warning("%s: stops after the running micro-batch and saves", signal.Signals(number).name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def check_start(name: str, apart: float, noise: float) -> None:
    """Refuse a run that starts from its reference and does not compute it as the reference's log-probs were.

    Of equal models all rewards are 0 at step 0, and the loss of a group is log K (eq. 1), log K! (eq. 2), log 2 (DPO),
    1 (APO). The log-probs themselves are compared: in a loss those that are too large and too small may cancel.

    Args:
        name: of the training, for messages.
        apart: largest |log π_θ − log π_ref| of a candidate, mean over the first batch's groups, in nats per square root
            of a token.
        noise: rounding that the self-check measured, in the same unit.

    Raises:
        RunError: they differ by more than rounding.
    """
    allowed = START_TOLERANCE + START_NOISE * noise
    if not apart <= allowed:
        raise RunError(
            f"train.{name}: step 0: the policy starts from its reference, but their log-probs differ by {apart:.4f} "
            f"nats per square root of a token, where rounding explains {allowed:.4f}: the two are not computed alike"
        )


def _broken(batch: Sequence[Group], figures: Sequence[tuple[list[int], GroupFigures]]) -> list[Group]:
    """The groups (of this process) whose loss is not finite."""
    return [
        batch[index]
        for micro, found in figures
        for index, nll, contrast in zip(micro, found.nll_G, found.contrast_G, strict=True)
        if not math.isfinite(nll + contrast)
    ]


def _ids(groups: Sequence[Group]) -> str:
    shown = ", ".join(group.example_id for group in groups[:5])
    return f"group{'s' if len(groups) > 1 else ''} {shown}" + (", …" if len(groups) > 5 else "")


def _flat(config: Training) -> dict[str, Any]:
    return {key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in config.model_dump(mode="json").items()}  # fmt: skip


def _note(row: dict[str, float]) -> str:
    won = f" won {row['won']:.2f} margin {row['margin']:.2f}" if "won" in row else ""
    return f"loss {row['loss']:.4f}{won} target {row['target_logprob']:.1f}"
