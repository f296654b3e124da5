"""The engines, by name, and the choice of one. Adding one is a module and a line here."""

import inspect
import logging
from typing import Annotated

from pydantic import AfterValidator, Field

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.registry import ClassRegistry
from cpo_pipe.data.text import nearest
from cpo_pipe.pipeline.engines.base import Engine
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from cpo_pipe.pipeline.engines.vllm import VllmEngine

log = logging.getLogger(__name__)

ENGINES: ClassRegistry[Engine] = ClassRegistry(
    "engine",
    Engine,  # type: ignore[type-abstract]
    {"vllm": VllmEngine, "transformers": TransformersEngine},
)
"""In the order in which `auto` tries them."""

AUTO = "auto"


def _check(name: str) -> str:
    if name != AUTO:
        if name not in ENGINES.entries and (hint := nearest(name, [AUTO])):
            raise ValueError(f"unknown engine {name!r}; {hint}")
        try:
            inspect.signature(ENGINES[name]).bind("model", "context", "dtype")
        except TypeError as error:
            raise ValueError(
                f"engine {name}: __init__ must take the model, the context and the dtype ({error})"
            ) from error
    return name


EngineName = Annotated[
    str,
    AfterValidator(_check),
    Field(
        description="generation engine (`auto`: the first of these that is installed and supports the model and the "
        "decoding; "
        + "; ".join(f"`{name}`: {ENGINES.description(name).rstrip('.')}" for name in ENGINES)
        + "; or your own as `module:Class`); not part of a row's identity"
    ),
]
"""The key `engine` of a section."""


def check_installed(name: str, key: str) -> None:
    """Refuse an engine that is named and not installed.

    Raises:
        InputError: it is not installed.
    """
    if name != AUTO and (command := ENGINES[name].not_installed()):
        raise InputError(f"{key} is {name}, which is not installed: {command}")


def choose_engine(name: str, model: Model, beam_search: bool = False) -> type[Engine]:
    """Return the engine for a model; `auto` logs which it takes, and why none before it.

    Args:
        name: `auto`, a name in `ENGINES` or an import path.
        model: the model to sample from.
        beam_search: whether the engine is for beam search.

    Raises:
        InputError: the engine named is not installed or does not support the model.
    """
    if name != AUTO:
        engine = ENGINES[name]
        check_installed(name, "engine")
        if why := engine.unsupported(model):
            raise InputError(f"engine is {name}, which does not support {model.name} ({why}); use engine transformers")
        return engine
    reasons: list[str] = []
    for known in ENGINES:
        engine = ENGINES[known]
        if beam_search and not engine.beam_search:
            reasons.append("beam search")
        elif engine.not_installed():
            reasons.append(f"{known} is not installed")
        elif why := engine.unsupported(model):
            reasons.append(f"{known} does not support {model.name}: {why}")
        else:
            log.info("engine: %s%s", known, f" ({'; '.join(reasons)})" if reasons else "")
            return engine
    raise AssertionError("transformers is always there, and supports everything")
