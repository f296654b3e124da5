"""The processes that train together: one alone, or those that `accelerate launch` started."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.execution import processes
from cpo_pipe.data.store import locks

if TYPE_CHECKING:  # torch is imported only when there is something to make
    from accelerate import PartialState

_Answer = TypeVar("_Answer")


def join() -> "PartialState":
    """Return this process's place among the others, with a GPU if there is one."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # By accelerate's default, transformers leaves weights empty in all processes but the first, for FSDP to fill. Those
    # of a frozen model, which FSDP does not manage, would stay empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.distributed_type == DistributedType.MULTI_CPU and wants_fsdp():
        # accelerate runs FSDP only on accelerators, torch also on CPUs: this makes accelerate use it.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state


def wants_fsdp() -> bool:
    """Return whether the user's accelerate config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wait() -> None:
    """Wait until all processes have called this."""
    if processes.count() > 1:
        join().wait_for_everyone()


def agreed(answer: _Answer) -> _Answer:
    """Return the main process's answer in all processes."""
    if processes.count() == 1:
        return answer
    from accelerate.utils import broadcast_object_list

    join()
    answers = [answer]
    broadcast_object_list(answers)
    return answers[0]


def share(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return this process's share of the work."""
    if processes.count() == 1:
        return places
    state = join()
    return places[state.process_index :: state.num_processes]


def make_missing(find: Callable[[], _Answer], make: Callable[[_Answer], None], output: locks.Lockable) -> bool:
    """Make what is missing as `locks.make_missing` does, with all processes that train together.

    Only the main process holds the lock, until all are done.

    Args:
        find: returns what is missing; all processes call it and go by the main process's answer.
        make: makes this process's share, or all that is missing in cooperation with the others.
        output: the artifact.

    Returns:
        Whether anything was missing.
    """

    def make_together(missing: _Answer) -> None:
        make(missing)
        wait()

    outputs = [output] if processes.is_main() else []
    return locks.make_missing(lambda: agreed(find()), make_together, *outputs) is not None
