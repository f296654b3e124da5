"""When a server is asked again, and how fast."""

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
"""Seconds within which a request that failed once is sent again; doubled with each failure."""
LONGEST_BACKOFF = 60.0
WORTH_SAYING = 5.0
"""Seconds of waiting that the user is told about."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Pace:
    """When requests to one server are sent, from whichever task they come."""

    def __init__(self, name: str):
        """`name` is the API's, for messages."""
        self._name = name
        self._halted = asyncio.Event()
        self._resume_at = 0.0

    def halt(self) -> None:
        """Send nothing more; what is under way may still be answered."""
        self._halted.set()

    def heed(self, headers: Mapping[str, str]) -> None:
        """Remember when the server wants the next request, from whichever task it comes."""
        wait = wanted_pause(headers)
        if wait >= WORTH_SAYING and time.monotonic() + wait > self._resume_at + WORTH_SAYING:
            log.info("apis.%s: the server wants no request for %.0f s", self._name, wait)
        self._resume_at = max(self._resume_at, time.monotonic() + wait)

    async def turn(self) -> None:
        """Wait until the server wants requests again."""
        while (wait := self._resume_at - time.monotonic()) > 0 and not self._halted.is_set():
            await self.rest(wait + random.uniform(0, BACKOFF))  # not all at the same moment
        if self._halted.is_set():
            raise Failed("not sent any more")

    async def rest(self, seconds: float) -> None:
        """Sleep, but not on when nothing is to be sent any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._halted.wait()

    async def retry(self, attempt: Callable[[], Awaitable[T]], attempts: int) -> T:
        """Return the result of an attempt, repeated after `Retryable`, with growing pauses.

        Args:
            attempt: sends the request once.
            attempts: times that it may fail; being told to slow down is not counted.

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

        async def once() -> T:  # tenacity awaits what it sees to be a coroutine function
            return await attempt()

        return await retrying(once)


def wanted_pause(headers: Mapping[str, str]) -> float:
    """Seconds for which a server wants no request, by the headers of its answer."""
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
