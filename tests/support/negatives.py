"""The section `negatives` of a recipe with one source for each strategy."""

from collections.abc import Mapping
from typing import Any

from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.registry import STRATEGIES


def negatives_section(counts: Mapping[str, int], **settings: Any) -> dict[str, Any]:
    """Return the section; a setting goes to the section or to all strategies that have it."""
    section = {key: value for key, value in settings.items() if key in Negatives.model_fields}
    sources = {
        name: {
            "count": count,
            **{key: value for key, value in settings.items() if key in STRATEGIES[name].model_fields},
        }
        for name, count in counts.items()
    }
    return {**section, "sources": sources}
