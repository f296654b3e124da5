"""The model behind an API, as a recipe names it: its identity, key, prices, and what a command has used."""

import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.engines.base import Sampling


@dataclass(frozen=True)
class Tokens:
    """Of prompts, and written."""

    prompt: int = 0
    written: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.written + other.written)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.written - other.written)


@dataclass
class Ledger:
    """What a command has had from an API so far."""

    used: Tokens = field(default_factory=Tokens)
    samples: int = 0
    failed: int = 0
    """Requests that got no answer however often they were sent."""
    last_failure: str = ""
    in_vain: float = 0.0
    """Requests sent since the last answer, each as its share of those that may be sent in vain."""
    unused_top_k: set[int] = field(default_factory=set)
    """Those that the user was told about."""


@dataclass(frozen=True)
class ApiModel:
    """A model behind a server; made once by a command for each API that it uses, so that caps hold for all it does."""

    name: str
    """As the recipe calls it; for messages only."""
    config: Api
    ledger: Ledger = field(default_factory=Ledger, compare=False, repr=False)

    def spec(self) -> Spec:
        """What identifies its distribution, as far as one can know it."""
        config = self.config
        return {
            "url": config.url.rstrip("/"),
            "model": config.model,
            "revision": config.revision,
            "server": config.server,
            "endpoint": config.endpoint,
            "system": config.system,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of what identifies it."""
        return digest(self.spec())

    def obeyed(self, sampling: Sampling) -> Sampling:
        """The part of a sampling that the server is asked for, which is what identifies samples.

        Only vLLM takes top-k. Ends are not asked for by id: the tokenizer's EOS always is one, and the others are the
        model's own.

        Raises:
            InputError: it is beam search, which servers do not have.
        """
        if sampling.beams > 1:
            raise InputError(
                f"apis.{self.name}: beams is {sampling.beams}, but an API has no beam search: leave it out of the "
                "comparison, or take other decodings"
            )
        return replace(sampling, top_k=sampling.top_k if self.config.server == "vllm" else 0, stop_ids=())

    def key(self) -> str | None:
        """The key in the environment, or None: a server of one's own wants none.

        Raises:
            InputError: the recipe names a variable that is not set, or what is in it cannot be a key.
        """
        variable, named = self.config.key, "key" in self.config.model_fields_set
        key = os.environ.get(variable, "").strip()
        if named and not key:
            raise InputError(f"apis.{self.name}.key: the environment variable {variable} is not set: export it")
        if not re.fullmatch(r"[!-~]*", key):  # it could not be sent, and the complaint would show it
            raise InputError(
                f"apis.{self.name}.key: the environment variable {variable} holds spaces, line breaks or characters "
                "beyond ASCII, as no key does: export it again"
            )
        return key or None

    def check_client(self) -> None:
        """Look for what asking takes, before anything is asked.

        Raises:
            InputError: the extra `openai` is not installed, or the key that the recipe names is not there.
        """
        if not all(map(importlib.util.find_spec, ("openai", "tenacity"))):
            raise InputError(f"apis.{self.name}: its client is not installed: pip install 'cpo-pipe[openai]'")
        self.key()

    def check_answered(self) -> None:
        """Say what is still missing after the work.

        Raises:
            RunError: requests got no answer, however often they were sent; the others went on.
        """
        ledger = self.ledger
        if ledger.failed:
            raise RunError(
                f"apis.{self.name}: {ledger.failed:,} requests got no answer, each sent {self.config.attempts} times "
                f"or more (the last: {ledger.last_failure}); what was made is kept: run the same command again"
            )

    def neutral(self) -> dict[str, Any]:
        """Defaults that are to be named: vLLM's server would put those of its model's generation config there."""
        return {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} if self.config.server == "vllm" else {}

    def price(self, tokens: Tokens) -> float | None:
        """US dollars for so many tokens; None where the recipe names no prices."""
        config = self.config
        if config.input_price is None or config.output_price is None:
            return None
        return (tokens.prompt * config.input_price + tokens.written * config.output_price) / 1e6

    def cap_below(self, tokens: Tokens) -> str | None:
        """The cap that so many tokens would break, as the recipe calls it; None if none."""
        price = self.price(tokens)
        if self.config.max_usd is not None and price is not None and price > self.config.max_usd:
            return "max_usd"
        if self.config.max_tokens is not None and tokens.prompt + tokens.written > self.config.max_tokens:
            return "max_tokens"
        return None

    def spent(self) -> str:
        """What the command has used, for people."""
        used = self.ledger.used
        price = self.price(used)
        dollars = f", {price:.4g} US dollars" if price is not None else ""
        return f"{used.prompt:,} prompt tokens and {used.written:,} written{dollars}"
