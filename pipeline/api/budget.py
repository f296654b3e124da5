"""The caps on what a command may spend on an API."""

import asyncio

from cpo_pipe.data.errors import RunError
from cpo_pipe.pipeline.api.model import ApiModel, Tokens


class Budget:
    """Keeps spent tokens, and the most that requests under way may use, below the caps of an API."""

    def __init__(self, api: ApiModel):
        self._api, self._ledger = api, api.ledger
        self._reserved = Tokens()
        self._settled = asyncio.Condition()

    async def reserve(self, most: Tokens) -> None:
        """Wait until this many more tokens fit below the caps, whatever the requests under way will use.

        Raises:
            RunError: they exceed a cap although no request is under way.
        """

        def broken() -> str | None:
            return self._api.cap_below(self._ledger.used + self._reserved + most)

        async with self._settled:
            await self._settled.wait_for(lambda: not broken() or self._reserved == Tokens())
            if cap := broken():
                raise RunError(self._at_cap(cap))
            self._reserved += most

    async def settle(self, most: Tokens, used: Tokens) -> None:
        """Replace the tokens reserved for a request with those it used."""
        async with self._settled:
            self._reserved -= most
            self._ledger.used += used
            self._settled.notify_all()

    def _at_cap(self, cap: str) -> str:
        ledger, api = self._ledger, f"apis.{self._api.name}"
        if cap == "max_usd":
            limit, spent = f"{self._api.config.max_usd:g} US dollars", f"{self._api.price(ledger.used):.4g}"
        else:
            limit, spent = f"{self._api.config.max_tokens:,} tokens", f"{ledger.used.prompt + ledger.used.written:,}"
        return (
            f"{api}: the cap of {limit} is reached ({spent} spent, {ledger.samples:,} samples made); completed work is "
            f"kept; raise {api}.{cap} and run the same command again"
        )
