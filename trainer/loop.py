"""The optimization loop: all steps of one training, in one process or several (accelerate), stoppable at any moment."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Artifact
from cpo_pipe.trainer.checks import check_start
from cpo_pipe.trainer.curriculum import curriculum_batches, shuffled_batches
from cpo_pipe.trainer.groups import Data, Group
from cpo_pipe.trainer.monitors import Watch, repetition
from cpo_pipe.trainer.objectives.base import GroupFigures, Normalizers, Training
from cpo_pipe.trainer.optimizer import lr_factor, parameter_groups
from cpo_pipe.trainer.resume import Metrics, ResumeCheckpoint, best_step
from cpo_pipe.trainer.samples import greedy_samples
from cpo_pipe.trainer.scoring.batching import micro_batches, pass_tokens
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.scoring.self_check import choose_backend
from cpo_pipe.trainer.signals import Stopped, StopRequests

log = logging.getLogger(__name__)


class Loop:
    """Run the steps of one training.

    Args:
        name: as the recipe calls it.
        config: its settings.
        model: initial weights, with all dropout off; trained in place.
        data: what it learns from.
        artifact: the checkpoint that is being made.
        accelerator: see `new_accelerator`.
        starts_as_reference: whether the first loss must be that of equal models.
    """

    def __init__(
        self,
        name: str,
        config: Training,
        model: PreTrainedModel,
        data: Data,
        artifact: Artifact,
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
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        module, prepared = accelerator.prepare(self.scorer, optimizer)
        self._module: nn.Module = module
        self.sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        """Whether each process holds only a part of the weights."""
        if self.sharded:
            # FSDP would leave the outermost weights whole after a forward pass, and after one without a backward pass
            # (validation) use these, stale, in the next step.
            module.set_reshard_after_forward(True)
        self._optimizer: torch.optim.Optimizer = prepared
        self._resume = ResumeCheckpoint(artifact, accelerator, module, getattr(prepared, "optimizer", prepared))
        self.facts: dict[str, Any] = {}
        """What decides the order of floating-point sums, and how the model is computed; kept over a resume."""

    def run(self) -> Metrics:
        """Take all steps, or those that are left of a training that was stopped, and return their metrics.

        Row n is about the weights after n steps: the loss of the batch that step n learns from and, where they are due,
        measurements of validation groups and samples. The last row has only the measurements after the last step. There
        are fewer steps than `max_steps` where a monitor of `stop_on` warns.

        Raises:
            RunError: a loss is not finite (the last good state is kept), or the first one shows that policy and
                reference are not computed alike.
            InputError: the attention backend asked for is not numerically equivalent for this model.
            Stopped: a signal arrived; the state is saved.
        """
        metrics, facts = self._resume.restore()
        self._start(facts)
        main = self._accelerator.is_main_process
        watch = Watch(self.name, self.config, metrics, quiet=not main)
        done = len(metrics)
        order = self._order()
        with (
            StopRequests() as stop,
            track(f"train {self.name}", self.config.max_steps, "steps", done=done, shown=main) as meter,
        ):
            for step, chosen in islice(enumerate(order), done, None):
                if watch.stop is not None:
                    break
                start = time.monotonic()
                measured = self._measurements(step)
                if self._is_best(metrics, measured):
                    self._resume.save_best(step)
                row = self._step(step, [self.data.groups[index] for index in chosen], metrics, stop) | measured
                row["seconds"] = time.monotonic() - start
                metrics.append(row)
                self._report(row, watch)
                meter.advance(1, note=_note(row))
                self._resume.save_now_and_then(metrics, self.facts)
            self._resume.save(metrics, self.facts)  # whatever may happen to the checkpoint
            start = time.monotonic()
            last = self._measurements(len(metrics), last=True)
            self._leave_if_asked(stop, metrics, between_steps=True)
        if len(last) > 1:
            metrics.append({**last, "seconds": time.monotonic() - start})
            self._report(metrics[-1], watch)
        if self.config.keep == "best":
            self._keep_best(metrics)
        return metrics

    def _report(self, row: dict[str, float], watch: Watch) -> None:
        """Give a row of metrics to the monitors and the trackers."""
        watch.step(row)
        if self.config.report_to:
            values = {key: value for key, value in row.items() if key != "step"}
            self._accelerator.log(values, step=int(row["step"]))

    def _is_best(self, metrics: Metrics, measured: dict[str, float]) -> bool:
        """Return whether the recipe keeps the best weights, and those just measured are the best so far."""
        asked = self.config.keep == "best" and "validation_loss" in measured
        return asked and best_step([*metrics, measured]) == measured["step"]

    def _order(self) -> Iterator[list[int]]:
        """Return which groups each step takes; a resumed training takes the same."""
        config, difficulty_G = self.config, self.data.difficulty_G
        if config.curriculum is None:
            return shuffled_batches(len(self.data.groups), config.batch_size, config.max_steps, config.seed)
        assert difficulty_G is not None
        return curriculum_batches(config.curriculum, difficulty_G, config.batch_size, config.max_steps, config.seed)

    def whole_state(self) -> dict[str, Tensor]:
        """Gather sharded weights on the CPU of the main process; return nothing in the others."""
        gathered = {}
        for name, tensor in self.scorer.model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self._accelerator.is_main_process:
                gathered[name] = whole.detach().cpu()
        return gathered

    def _start(self, facts: dict[str, Any]) -> None:
        """Choose the attention backend, or take the one from before the training was stopped."""
        if self.config.report_to:
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
                    "train %s: ignores %s and resumes with %s, as it began; to start from the beginning, remove %s",
                    self.name, ", ".join(ignored), kept, self._resume.folder,
                )  # fmt: skip
            if facts["threads"] != torch.get_num_threads():
                log.info("train %s: uses %d threads, as before it was stopped", self.name, facts["threads"])
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
            "micro_batch_tokens": pass_tokens(self.config.micro_batch_tokens, now["device"]),
            **self.facts, **now,
        }  # fmt: skip
        budget = self.facts["micro_batch_tokens"]
        name, probes = f"train {self.name}", self.data.probes
        choice = choose_backend(name, self.scorer, probes, requested, budget, module=self._module)
        self.facts |= asdict(choice)

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, step: int, batch: Sequence[Group], metrics: Metrics, stop: StopRequests) -> dict[str, float]:
        config = self.config
        learning_rate = config.learning_rate * lr_factor(config, step)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = learning_rate
        normalizers = Normalizers.of(batch)
        figures = []
        passes = self._passes(batch)
        for number, micro in enumerate(passes):
            self._leave_if_asked(stop, metrics, between_steps=number == 0)
            # Processes exchange gradients in the last pass only.
            last = number == len(passes) - 1
            with nullcontext() if last else self._accelerator.no_sync(self._module):
                found, share = self._figures(batch, micro, normalizers, step)
                # DDP and FSDP average gradients over processes; a loss is a sum over them.
                self._accelerator.backward(share * self._accelerator.num_processes)
            figures.append((micro, found))
        sums = self._sums(figures)
        row = config.metrics(sums, normalizers, batch)
        self._check_finite(step, batch, row, figures, metrics)
        # With an MLE term a batch may be all K = 1.
        if self._starts_as_reference and step == 0 and normalizers.groups_with_negatives:
            check_start(self.name, float(sums.start_G) / normalizers.groups_with_negatives, self.facts["noise"])
        norm = self._clip()
        if not math.isfinite(norm):
            self._save_last_whole_step(metrics)
            raise RunError(
                f"train.{self.name}: the gradient's norm is {norm} at step {step}, the loss {row['loss']}; its batch "
                f"is {_ids(batch)}; lower train.{self.name}.learning_rate"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"step": step, "learning_rate": learning_rate, "grad_norm": norm, **row}

    def _passes(self, batch: Sequence[Group]) -> list[list[int]]:
        """Return the groups of each of this process's forward passes."""
        asked = [self.config.largest_texts(group) for group in batch]
        budget = self.facts["micro_batch_tokens"]
        plan = micro_batches(asked, self.scorer.attention, budget, self._accelerator.num_processes)
        return plan[self._accelerator.process_index]

    def _figures(
        self, batch: Sequence[Group], micro: Sequence[int], normalizers: Normalizers, step: int | None = None
    ) -> tuple[GroupFigures, Tensor]:
        """Return figures and share of the loss of one forward pass; `step` is None for a measurement."""
        # A process without a group left computes some group for nothing: the others wait for it to take part.
        groups = [batch[index] for index in micro or [0]]
        packed = self.config.inputs(groups, step, self.scorer.pack, self._module)
        logprobs = packed.per_group(self._module(packed))
        found = self.config.figures(groups, logprobs)
        if not micro:
            share = sum((values.sum() for values in logprobs), start=torch.zeros((), device=logprobs[0].device)) * 0
            return GroupFigures(*(field.detach()[:0] for field in found)), share
        share = self.config.loss(found, normalizers)
        return GroupFigures(*(field.detach() for field in found)), share

    def _sums(self, figures: Sequence[tuple[list[int], GroupFigures]]) -> GroupFigures:
        """Return the sum of each figure over all groups of a batch and all processes."""
        sums = torch.stack([torch.cat(fields).double().sum() for fields in zip(*(f for _, f in figures), strict=True)])
        return GroupFigures(*self._accelerator.reduce(sums, "sum").unbind())

    def _clip(self) -> float:
        """Clip the gradient to the recipe's norm; return its norm before that."""
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    # ── what may end it early ────────────────────────────────────────────────────────────────────────────────────

    def _leave_if_asked(self, stop: StopRequests, metrics: Metrics, between_steps: bool) -> None:
        """Save and stop, in one process even within a step, which the resumed training then repeats."""
        number = stop.number
        if self._accelerator.num_processes > 1:
            if not between_steps:
                return  # the processes would leave at different places
            flags = torch.tensor(number, device=self._accelerator.device)
            number = int(self._accelerator.gather(flags.unsqueeze(0)).max())
        if number:
            self._save_last_whole_step(metrics)
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
        self._save_last_whole_step(metrics)
        raise RunError(
            f"train.{self.name}: the loss is {row['loss']} at step {step}, because of {_ids(broken or batch)}; look at "
            f"these groups, or lower train.{self.name}.learning_rate"
        )

    def _save_last_whole_step(self, metrics: Metrics) -> None:
        """Save the state after the last whole step, if it is valid, and drop the gradients of the step in progress."""
        self._optimizer.zero_grad(set_to_none=True)
        self._resume.save(metrics, self.facts)

    # ── measurements ───────────────────────────────────────────────────────────────────────────────

    def _measurements(self, step: int, last: bool = False) -> dict[str, float]:
        """Measure validation groups and samples after `step` steps if they are due; the first are before any step."""
        row: dict[str, float] = {"step": step}
        if step % self.config.eval_steps and not last:
            return row
        if self.data.validation:
            row |= {f"validation_{key}": value for key, value in self._validation(step).items()}
        if not self.sharded:  # generating needs the weights whole
            row["repetition"] = repetition(greedy_samples(self.scorer, self.data.validation or self.data.groups))
        return row

    @torch.no_grad()
    def _validation(self, step: int) -> dict[str, float]:
        normalizers = Normalizers.of(self.data.validation)
        passes = self._passes(self.data.validation)
        figures = [(micro, self._figures(self.data.validation, micro, normalizers)[0]) for micro in passes]
        row = self.config.metrics(self._sums(figures), normalizers, self.data.validation)
        if not math.isfinite(row["loss"]):  # the steps since the last save are lost: their weights may be no good
            broken = _broken(self.data.validation, figures) or self.data.validation
            lower = f", or lower train.{self.name}.learning_rate" if step else ""
            raise RunError(
                f"train.{self.name}: the validation loss is {row['loss']} after {step} steps, because of "
                f"{_ids(broken)}; look at these groups{lower}"
            )
        return row

    def _keep_best(self, metrics: Metrics) -> None:
        best = best_step(metrics)
        loss = next(row["validation_loss"] for row in metrics if row["step"] == best)
        if best < metrics[-1]["step"]:
            self._resume.restore_best(best)
        if best == 0:
            log.warning(
                "train %s: no step lowered the validation loss below the %.4f of the initial weights; keeps the "
                "initial weights; lower learning_rate, or measure more often (eval_steps)",
                self.name, loss,
            )  # fmt: skip
            return
        log.info(
            "train %s: keeps the weights after %d steps, which have the lowest validation loss, %.4f",
            self.name,
            best,
            loss,
        )


def _broken(batch: Sequence[Group], figures: Sequence[tuple[list[int], GroupFigures]]) -> list[Group]:
    """Return the groups (of this process) whose loss is not finite."""
    return [
        batch[index]
        for micro, found in figures
        for index, nll, preference in zip(micro, found.nll_G, found.preference_G, strict=True)
        if not math.isfinite(nll + preference)
    ]


def _ids(groups: Sequence[Group]) -> str:
    shown = ", ".join(group.example_id for group in groups[:5])
    return f"group{'s' if len(groups) > 1 else ''} {shown}" + (", …" if len(groups) > 5 else "")


def _flat(config: Training) -> dict[str, Any]:
    return {key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in config.model_dump(mode="json").items()}  # fmt: skip


def _note(row: dict[str, float]) -> str:
    rewards = ""
    if "reward_accuracy" in row:
        rewards = f" accuracy {row['reward_accuracy']:.2f} margin {row['reward_margin']:.2f}"
    return f"loss {row['loss']:.4f}{rewards} target {row['target_logprob']:.1f}"
