"""The section `negatives` of a recipe."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from cpo_pipe.data.config import Name, Positive, Section, Seed
from cpo_pipe.pipeline.negatives.registry import STRATEGIES
from cpo_pipe.pipeline.negatives.strategy import Strategy
from cpo_pipe.pipeline.scorers import FILTERS
from cpo_pipe.pipeline.scorers.correct import DropCorrect

TARGET = "target"
"""The label of a group's ground truth."""
RESERVED = (TARGET, "all")
"""Names that no source may have: the label of the targets, and of all negatives together in the quality table."""


class Negatives(Section):
    """The negatives of a group."""

    seed: Seed = Field(0, description="seed of all samples")
    max_examples: Positive | None = Field(
        None, description="make groups for the first N training examples only (default: all)"
    )
    target_strength: float | None = Field(
        None, description="quality of the targets, on the scale of the sources' strength; for a curriculum by strength"
    )
    drop_correct: Annotated[DropCorrect, FILTERS] | None = Field(
        None, description="remove negatives that are correct answers from the groups (default: keep them)"
    )
    sources: dict[Name, Annotated[Strategy, STRATEGIES]] = Field(
        description="sources of negatives, by name; of equal negatives the first source's is kept"
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _name_strategies(cls, sources: Any) -> Any:
        """Use a source's name as its strategy where it names none."""
        if not isinstance(sources, dict):
            return sources
        if not sources:
            raise ValueError("no source; add one, such as batch: {count: 1}")
        for name in RESERVED:
            if name in sources:
                raise ValueError(f"{name!r} cannot be the name of a source; choose another name")
        return {
            name: {STRATEGIES.key: name, **source} if isinstance(source, dict) else source
            for name, source in sources.items()
        }

    def labels(self) -> list[str]:
        """Return the labels of a group's candidates: `target` and the sources' names."""
        return [TARGET, *self.sources]

    def only(self, counts: Mapping[str, int]) -> "Negatives":
        """Return the section with so many negatives of each of these sources per prompt, and no others.

        Raises:
            pydantic.ValidationError: a source's settings do not allow so many.
        """
        return self.model_copy(
            update={
                "sources": {
                    name: source.with_count(counts[name]) for name, source in self.sources.items() if name in counts
                }
            }
        )

    def with_generator(self, model: str) -> "Negatives":
        """Return the section for a later iteration, where `model` is the generator."""
        return self.model_copy(
            update={"sources": {name: source.with_generator(model) for name, source in self.sources.items()}}
        )

    def strengths(self) -> dict[str, float]:
        """Return the strength of each label that has one."""
        strengths = {name: source.strength for name, source in self.sources.items()}
        return {
            label: strength
            for label, strength in {TARGET: self.target_strength, **strengths}.items()
            if strength is not None
        }

    def models(self) -> list[str]:
        """Return the names of the models and APIs that the sources need."""
        return [model for source in self.sources.values() for model in source.models()]
