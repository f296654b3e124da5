"""The processes that train together: one alone, or those that `accelerate launch` started."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list

from cpo_pipe.data import processes


def join() -> PartialState:
    """This process's place among the others; with a GPU where there is one."""
    # accelerate's default makes transformers leave weights empty in all processes but the first, for FSDP to fill:
    # those of a frozen model, which FSDP never sees, would stay so.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.distributed_type == DistributedType.MULTI_CPU and wants_fsdp():
        # accelerate has FSDP for accelerators only, torch for CPUs, too: this makes accelerate go that way.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state


def wants_fsdp() -> bool:
    """Whether the user's accelerate config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wait() -> None:
    """For all processes to be here, if there are several."""
    if processes.count() > 1:
        join().wait_for_everyone()


def agreed(answer: bool) -> bool:
    """What the main process says, so that all of them do the same."""
    if processes.count() == 1:
        return answer
    join()
    said = [answer]
    broadcast_object_list(said)
    return said[0]
