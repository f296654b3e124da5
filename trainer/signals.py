"""Requests to stop a training, by SIGTERM or SIGINT."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A signal asked the training to stop; its state is saved."""

    def __init__(self, name: str, step: int, number: int):
        super().__init__(f" by {signal.Signals(number).name} in the training {name}, saved after step {step}")


class StopRequests:
    """Notes SIGTERM and SIGINT instead of ending immediately; a second one ends the process."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
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
