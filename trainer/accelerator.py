"""The processes of a training, as accelerate is configured for them."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution import processes
from cpo_pipe.trainer.distributed import join, wants_fsdp
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.packages import check_installed

_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def new_accelerator(name: str, config: Training, log_dir: Path | None) -> Accelerator:
    """Return the Accelerator of this run's processes, started by `accelerate launch` or one alone.

    Raises:
        InputError: accelerate is configured for what this loop does not support, or a tracker is not installed.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if config.dtype == "bfloat16" else "no"
    if asked not in ("no", ours):
        raise InputError(
            f"train.{name}.dtype is {config.dtype}, but accelerate is configured for mixed_precision {asked}: the "
            "recipe decides the arithmetic; set mixed_precision to no, or the recipe's dtype to bfloat16"
        )
    check_installed(name, config)
    join()
    # The arithmetic is the scorer's (autocast over float32 weights), the same in every mode.
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(config.report_to) or None,
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
