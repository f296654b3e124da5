"""The packages that a training needs beyond those that are always installed."""

import importlib.util

from cpo_pipe.data.errors import InputError
from cpo_pipe.trainer.objectives.base import Training


def check_installed(name: str, config: Training) -> None:
    """Refuse a training whose trackers, or whose adapters' package, are not installed.

    Raises:
        InputError: a package is missing.
    """
    for tracker in config.report_to:  # accelerate would skip it silently
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"train.{name}.report_to: {tracker} is not installed; pip install {tracker}")
    if config.lora is not None and importlib.util.find_spec("peft") is None:
        raise InputError(f'train.{name}.lora: needs peft; run pip install "cpo-pipe[lora]"')
