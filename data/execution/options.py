"""The executor that the command line's options mean."""

import importlib.util

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Executor, LocalExecutor


def open_executor(name: str, workers: int | None, worker_gpus: float | None) -> Executor:
    """Return the executor that the command line's options mean.

    Raises:
        InputError: there is none of that name, or the options do not fit it.
    """
    if name == "local":
        if workers is not None or worker_gpus is not None:
            raise InputError("--workers and --worker-gpus are for --executor ray only: add it, or leave them out")
        return LocalExecutor()
    if name != "ray":
        raise InputError(f"--executor {name}: must be local or ray")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--executor ray: Ray is not installed: pip install 'cpo-pipe[ray]'")
    from cpo_pipe.data.execution.ray import RayExecutor

    return RayExecutor(workers, worker_gpus)
