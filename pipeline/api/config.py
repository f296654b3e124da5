"""The settings of a model behind an OpenAI-compatible server."""

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cpo_pipe.data.config import Positive, Section


class Api(Section):
    """A model behind an OpenAI-compatible server."""

    url: str = Field(
        description="base URL of the server, such as https://api.openai.com/v1; without a key or password, which stay "
        "in the environment"
    )
    model: str = Field(description="the model's name there")
    revision: str | None = Field(
        None, description="your label for the current version of the model; another label invalidates its outputs"
    )
    key: str = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the API key, which is never stored; your own server needs none",
    )
    server: Literal["openai", "vllm"] = Field(
        "openai",
        description="`vllm`: also takes top-k and, as completions, gives and takes token ids; it must then serve a "
        "model with the tokenizer of the examples",
    )
    endpoint: Literal["chat", "completions"] = Field(
        "chat", description="`chat`: the prompt as a user's message; `completions`: as rendered by data.template"
    )
    system: str | None = Field(None, description="system message before the user's; chat only")
    concurrency: Positive = Field(16, description="concurrent requests at most")
    timeout: float = Field(120, gt=0, description="timeout of a request, in seconds")
    attempts: Positive = Field(
        6, description="attempts before a request counts as failed; requests to slow down do not count"
    )
    input_price: float | None = Field(None, ge=0, description="price in US dollars per million prompt tokens")
    output_price: float | None = Field(None, ge=0, description="price in US dollars per million output tokens")
    max_usd: float | None = Field(
        None,
        gt=0,
        description="stop a command before it spends more US dollars on this API; each command starts at zero",
    )
    max_tokens: Positive | None = Field(
        None, description="stop a command before it uses more tokens of this API, prompt and output together"
    )

    # Errors show neither value, since either may contain a key. The URL is also stored with the artifacts.

    @field_validator("url", mode="before")
    @classmethod
    def _check_url(cls, url: Any) -> Any:
        try:
            parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:  # such as a [ without its ]
            valid = False
        if not valid:
            raise ValueError("must be a URL that begins with http:// or https://, such as https://api.openai.com/v1")
        if "@" in parts.netloc:
            raise ValueError("contains a user name or password; remove it and set `key` to the environment variable "
                             "that holds the key")  # fmt: skip
        if "?" in url or "#" in url:
            raise ValueError("contains a query string or fragment, in which a key would be stored; give the base URL "
                             "alone and set `key` to the environment variable that holds the key")  # fmt: skip
        return url

    @field_validator("key", mode="before")
    @classmethod
    def _check_key(cls, name: Any) -> Any:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("must be the name of an environment variable, in capitals; never the key itself")
        return name

    @model_validator(mode="after")
    def _check(self) -> "Api":
        if self.max_usd is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_usd needs input_price and output_price; set both")
        if self.system is not None and self.endpoint != "chat":
            raise ValueError("system: not used by the endpoint completions; remove it")
        return self
