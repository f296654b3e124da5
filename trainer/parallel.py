"""The processes that train together: one alone, or those that `accelerate launch` started."""

import os
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from numpy.typing import NDArray

from cpo_pipe.data import processes

_Answer = TypeVar("_Answer")


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


def agreed(answer: _Answer) -> _Answer:
    """What the main process says, so that all of them do the same; they wait for it."""
    if processes.count() == 1:
        return answer
    join()
    said = [answer]
    broadcast_object_list(said)
    return said[0]


def share(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of what is to be done this process's part."""
    if processes.count() == 1:
        return places
    state = join()
    return places[state.process_index :: state.num_processes]
