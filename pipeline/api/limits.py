"""Retries, and pauses that a server asks for."""

import asyncio
import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TypeVar

from cpo_pipe.pipeline.api.answers import Failed, Retryable

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF = 2.0
"""Longest pause before the first retry, in seconds; doubled with each failure."""
LONGEST_BACKOFF = 60.0
WORTH_SAYING = 5.0
"""Shortest pause that is logged, in seconds."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Pace:
    """Decides when requests to one server are sent. All tasks share it."""

    def __init__(self, name: str):
        """`name` is the API's, for messages."""
        self._name = name
        self._halted = asyncio.Event()
        self._resume_at = 0.0

    def halt(self) -> None:
        """Stop sending requests; those under way may still be answered."""
        self._halted.set()

    def heed(self, headers: Mapping[str, str]) -> None:
        """Read from the headers until when the server wants no request; the pause applies to all tasks."""
        wait = wanted_pause(headers)
        if wait >= WORTH_SAYING and time.monotonic() + wait > self._resume_at + WORTH_SAYING:
            log.info("apis.%s: the server asks for a pause of %.0f s", self._name, wait)
        self._resume_at = max(self._resume_at, time.monotonic() + wait)

    async def turn(self) -> None:
        """Wait until the pause that the server asked for is over.

        Raises:
            Failed: requests are no longer sent.
        """
        while (wait := self._resume_at - time.monotonic()) > 0 and not self._halted.is_set():
            await self.rest(wait + random.uniform(0, BACKOFF))  # not all at the same moment
        if self._halted.is_set():
            raise Failed("requests are no longer sent")

    async def rest(self, seconds: float) -> None:
        """Sleep; `halt` ends the sleep early."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._halted.wait()

    async def retry(self, attempt: Callable[[], Awaitable[T]], attempts: int) -> T:
        """Attempt a request until it succeeds, with growing pauses, and return its result.

        Args:
            attempt: sends the request once.
            attempts: how often it may fail; requests to slow down do not count.

        Raises:
            Retryable: all attempts failed.
        """
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

        failures = 0

        def enough(state: RetryCallState) -> bool:
            nonlocal failures
            error = state.outcome.exception() if state.outcome is not None else None
            failures += isinstance(error, Retryable) and error.counts
            return failures >= attempts

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Retryable),
            wait=wait_random_exponential(multiplier=BACKOFF, max=LONGEST_BACKOFF),
            stop=enough,
            sleep=self.rest,
            reraise=True,
        )

        async def once() -> T:  # tenacity awaits only what it recognizes as a coroutine function
            return await attempt()

        return await retrying(once)


def wanted_pause(headers: Mapping[str, str]) -> float:
    """Return the pause in seconds that the headers of an answer ask for; 0 where they ask for none."""
    waits = [0.0]
    with suppress(ValueError):
        waits.append(float(headers.get("retry-after-ms", "")) / 1000)
    after = headers.get("retry-after", "")
    try:
        waits.append(float(after))
    except ValueError:
        with suppress(ValueError):
            waits.append(parsedate_to_datetime(after).timestamp() - time.time())
    for what in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{what}") == "0":
            parts = _DURATION.findall(headers.get(f"x-ratelimit-reset-{what}", ""))
            waits.append(sum(float(number) * _UNITS[unit] for number, unit in parts))
    return max(wait for wait in waits if math.isfinite(wait))
