"""A model behind an API: its identity, key, prices, and its usage by a command."""

import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any

from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.engines.base import Sampling

SERVER_SECONDS = 10.0
"""How long a server may take to list its models."""


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens: of prompts, and written by the model."""

    prompt: int = 0
    written: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.written + other.written)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.written - other.written)


@dataclass
class Ledger:
    """Usage of an API by a command so far."""

    used: Tokens = field(default_factory=Tokens)
    samples: int = 0
    failed: int = 0
    """Requests whose attempts all failed."""
    last_failure: str = ""
    in_vain: float = 0.0
    """Failed attempts since the last answer, as a fraction of those after which the server counts as down."""
    unused_top_k: set[int] = field(default_factory=set)
    """Values of top_k that a message has already reported as unused."""


@dataclass(frozen=True)
class ApiModel:
    """A model behind a server. A command makes one for each API, so that the caps apply to all its requests."""

    name: str
    """Its key in `apis`, for messages only."""
    config: Api
    ledger: Ledger = field(default_factory=Ledger, compare=False, repr=False)

    def spec(self) -> Spec:
        """Return what identifies its distribution, as far as a client can know it."""
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
        """The hash of its spec."""
        return digest(self.spec())

    def obeyed(self, sampling: Sampling) -> Sampling:
        """Return the part of a sampling that the server obeys; it identifies the samples.

        Only vLLM takes top-k. `stop_ids` are not part of it: the tokenizer's EOS always ends a text, and the model
        defines the others.

        Raises:
            InputError: the sampling is beam search, which servers do not offer.
        """
        if sampling.beams > 1:
            raise InputError(
                f"apis.{self.name}: beams is {sampling.beams}, but an API has no beam search; remove the API "
                "from the comparison, or use another decoding"
            )
        return replace(sampling, top_k=sampling.top_k if self.config.server == "vllm" else 0, stop_ids=())

    def key(self) -> str | None:
        """Return the key from the environment; None where it is not set, since a server of your own needs none.

        Raises:
            InputError: the recipe names a variable that is not set, or its value cannot be a key.
        """
        variable, named = self.config.key, "key" in self.config.model_fields_set
        key = os.environ.get(variable, "").strip()
        if named and not key:
            raise InputError(f"apis.{self.name}.key: the environment variable {variable} is not set; export it")
        if not re.fullmatch(r"[!-~]*", key):  # the client's error would show it
            raise InputError(
                f"apis.{self.name}.key: the environment variable {variable} holds spaces, line breaks or characters "
                "beyond ASCII, which no key contains; export the key again"
            )
        return key or None

    def check_client(self) -> None:
        """Check that requests are possible, before the first one.

        Raises:
            InputError: the extra `openai` is not installed, or the environment variable that the recipe names is not
                set or invalid.
        """
        if not all(map(importlib.util.find_spec, ("openai", "tenacity"))):
            raise InputError(f"apis.{self.name}: its client is not installed; run pip install 'cpo-pipe[openai]'")
        self.key()

    def check_server(self) -> None:
        """Check that the server can be reached and takes the key; it is asked for the list of its models.

        Raises:
            InputError: as `check_client`; or the server does not answer, or refuses the key.
        """
        self.check_client()
        import openai

        client = openai.OpenAI(
            base_url=self.config.url, api_key=self.key() or "none", timeout=SERVER_SECONDS, max_retries=0
        )
        try:
            client.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(
                f"apis.{self.name}.key: {self.config.url} refuses the key in {self.config.key} (status "
                f"{error.status_code}); export a valid one"
            ) from error
        except openai.APIStatusError:  # a server need not list its models
            return
        except (openai.OpenAIError, ValueError) as error:
            raise InputError(
                f"apis.{self.name}.url: {self.config.url} does not answer ({cause(error)}); start the server, or "
                "correct the URL"
            ) from error
        finally:
            client.close()

    def check_answered(self) -> None:
        """Check after the work that all requests were answered.

        Raises:
            RunError: all attempts of some requests failed. The answers to the others are kept.
        """
        ledger = self.ledger
        if ledger.failed:
            raise RunError(
                f"apis.{self.name}: {ledger.failed:,} requests got no answer, each sent {self.config.attempts} times "
                f"or more (the last: {ledger.last_failure}); completed work is kept; run the same command again"
            )

    def neutral(self) -> dict[str, Any]:
        """Return defaults to send, since vLLM's server would otherwise use those of the model's generation config."""
        return {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} if self.config.server == "vllm" else {}

    def price(self, tokens: Tokens) -> float | None:
        """Return the price of the tokens in US dollars; None where the recipe has no prices."""
        config = self.config
        if config.input_price is None or config.output_price is None:
            return None
        return (tokens.prompt * config.input_price + tokens.written * config.output_price) / 1e6

    def cap_below(self, tokens: Tokens) -> str | None:
        """Return the recipe's key of the cap that this many tokens exceed; None where they exceed none."""
        price = self.price(tokens)
        if self.config.max_usd is not None and price is not None and price > self.config.max_usd:
            return "max_usd"
        if self.config.max_tokens is not None and tokens.prompt + tokens.written > self.config.max_tokens:
            return "max_tokens"
        return None

    def spent(self) -> str:
        """Return the command's usage so far, for messages."""
        used = self.ledger.used
        price = self.price(used)
        dollars = f", {price:.4g} US dollars" if price is not None else ""
        return f"{used.prompt:,} prompt tokens and {used.written:,} written{dollars}"
