"""TRL's side of a comparison: DPOTrainer's own forward and backward on given token ids, without an optimizer step.

Written against trl 1.16.0. `make_trl` takes the model over (see there): give it a copy of its own.
"""

import ctypes
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import trl.trainer.utils as trl_utils
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

Group = tuple[list[int], list[list[int]]]
"""A prompt's token ids and its candidates', the target first."""

Step = Callable[[int], tuple[float, int]]
"""Runs the pairs of one group; returns their mean loss and the tokens given to the model, padding included."""


class PreparedDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that already have token ids and reference log-probs; collator, loss and step are TRL's.

    TRL 1.16 has no such way in: `_prepare_dataset` always tokenizes text (and adds an EOS), and
    `_precompute_ref_logps` always runs the model over the data.
    """

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""


def tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows of preference data with the token ids that DPOTrainer makes of them: `prompt_ids` and so on."""
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, max_length=None, bf16=False, use_cpu=True, report_to="none")
        trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
        return list(DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train"))


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """What the constructor insists on. Only its padding id is used, and padding is masked."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def pairs(group: Group, reference: Sequence[float]) -> list[dict[str, Any]]:
    """The K−1 rows (target, negative) as TRL's collator reads them."""
    prompt, (target, *negatives) = group
    return [
        {
            "prompt_ids": prompt,
            "chosen_ids": target,
            "rejected_ids": negative,
            "ref_chosen_logps": reference[0],
            "ref_rejected_logps": logprob,
        }
        for negative, logprob in zip(negatives, reference[1:], strict=True)
    ]


def make_trl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    groups: Sequence[Group],
    reference_logps: Sequence[Sequence[float]],
    beta: float,
    batch: Literal["pair", "group"],
    checkpointing: bool,
    restricted_head: bool,
    **settings: Any,
) -> Step:
    """TRL's step over one group; gradients of the mean loss over its pairs are left in the model's parameters.

    The constructor changes the model: its forward, its special token ids, its dropout and its checkpointing. It also
    seeds the global random generators.

    Args:
        model: float32; what an earlier call did to its forward and its checkpointing is undone first.
        tokenizer: only its special tokens matter; None for a stand-in.
        groups: each with at least one negative.
        reference_logps: per group the reference log-prob of each candidate, summed over its tokens.
        beta: DPO's β.
        batch: all pairs of a group in one batch, or one by one with their gradients accumulated.
        checkpointing: recompute each layer in the backward pass (TRL's default).
        restricted_head: score only the candidates' positions, as TRL does on CUDA; on the CPU it scores all of them.
        settings: others of DPOConfig.
    """
    model.__dict__.pop("forward", None)  # the trainer's fused head would be wrapped around an earlier one
    if checkpointing:  # only Trainer.train obeys the argument, and training_step is called without it here
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    rows = [pairs(group, reference) for group, reference in zip(groups, reference_logps, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            beta=beta,
            precompute_ref_log_probs=True,
            max_length=None,  # the default, 1024, cuts longer rows without a word
            bf16=False,  # the default is bfloat16 autocast
            gradient_checkpointing=checkpointing,
            use_cpu=model.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = PreparedDPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list([row for group in rows for row in group]),
            processing_class=tokenizer or stand_in_tokenizer(),
        )

    def step(group_index: int) -> tuple[float, int]:
        group = rows[group_index]
        batches = [group] if batch == "group" else [[row] for row in group]
        trainer.current_gradient_accumulation_steps = len(batches)  # training_step divides each loss by it
        model.zero_grad()
        loss, tokens = 0.0, 0
        for part in batches:
            inputs = trainer.data_collator(part)
            tokens += inputs["input_ids"].numel()
            # Read in that module only to choose the positions that are scored; the kernel's own copy is left alone.
            head = mock.patch.object(trl_utils, "_use_triton", return_value=True) if restricted_head else nullcontext()
            with head:
                loss += trainer.training_step(model, inputs).item()
        trainer._metrics["train"].clear()  # as Trainer's log does
        return loss, tokens

    step.trainer = trainer  # type: ignore[attr-defined]  # for tests that look inside
    return step


def peak_bytes(make: Callable[..., Callable[[int], object]], *args: Any, index: int, warm_up: int) -> int:
    """Peak resident memory of `make(*args)(index)` above what its fresh process had after `make(*args)(warm_up)`.

    A fresh process, because an allocator keeps what earlier steps freed. The kernel's high-water mark, because no
    sampling misses a short peak; it counts the libraries' scratch memory too, which torch's profiler does not see.
    Not `ru_maxrss`: a child's starts from its parent's peak. Linux only.

    Args:
        make: a module's top-level function (it is pickled); returns the step.
        args: picklable.
        index: what the measured step is called with.
        warm_up: what it is called with before, once: a small group, after which gradients and libraries are in place.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, make, args, index, warm_up))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())  # EOFError if the process died
    finally:
        process.join()


def _measure(
    sender: Any, make: Callable[..., Callable[[int], object]], args: tuple[Any, ...], index: int, warm_up: int
) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: freed tensors go back to the system at once, so peaks do not add up
    step = make(*args)
    step(warm_up)
    libc.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step(index)
    sender.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
