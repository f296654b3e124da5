"""Choose the executor from the options of the command line."""

import importlib.util

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Executor, LocalExecutor


def open_executor(name: str, workers: int | None, worker_gpus: float | None) -> Executor:
    """Return the executor for the options of the command line.

    Raises:
        InputError: the name is unknown, Ray is not installed, or an option is for another executor.
    """
    if name == "local":
        if workers is not None or worker_gpus is not None:
            raise InputError("--workers and --worker-gpus need --executor ray; add it, or remove them")
        return LocalExecutor()
    if name != "ray":
        raise InputError(f"--executor {name}: must be local or ray")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--executor ray: Ray is not installed: pip install 'cpo-pipe[ray]'")
    from cpo_pipe.data.execution.ray import RayExecutor

    return RayExecutor(workers, worker_gpus)
