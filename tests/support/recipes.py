"""Small recipes, as a file's content and as a file, and the messages with which they are refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cpo_pipe.data.errors import InputError
from cpo_pipe.recipe.load import parse_recipe

DATA = {"source": "pairs.jsonl", "tokenizer": "folder", "train": 8, "test": 2}
MLE = {"init": "folder", "objective": "mle"}
CPO = {"init": "base", "objective": "cpo", "reference": "base"}
NEGATIVES = {"sources": {"autoregressive": {"model": "base"}}}
SYSTEMS = {"base": {"model": "base"}}
API = {"url": "http://127.0.0.1:1/v1", "model": "m"}


def content(**sections: Any) -> dict[str, Any]:
    """Return a valid recipe's content with the given sections in place of its own."""
    whole = {"name": "r", "data": DATA, "train": {"base": MLE, "cpo": CPO}, "negatives": NEGATIVES}
    return {**whole, **sections}


def evaluation(**settings: Any) -> dict[str, Any]:
    """Return the section `evaluate` with the given settings."""
    return {"evaluate": {"systems": SYSTEMS, "baseline": "base", **settings}}


def written(folder: Path, **sections: Any) -> str:
    """Write a recipe to a folder and return its path."""
    (folder / "r.yaml").write_text(yaml.safe_dump(content(**sections)))
    return str(folder / "r.yaml")


def refusal(**sections: Any) -> str:
    """Return the message with which a recipe is refused, without the recipe's name."""
    with pytest.raises(InputError) as caught:
        parse_recipe(content(**sections), "r.yaml")
    message = str(caught.value)
    assert message.startswith("recipe r.yaml: ")
    assert "\n" not in message
    return message.removeprefix("recipe r.yaml: ")
