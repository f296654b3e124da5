"""Autoregressive negatives (AN): continuations sampled from a model given the prompt, top-k with k = 50 (§3)."""

from typing import ClassVar, Self

from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.negatives.sampler import EngineSampler
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job


class Autoregressive(EngineSampler):
    """Continuations sampled from a model given the prompt."""

    kind: ClassVar[str] = "autoregressive"

    model: Location = Field(
        description="the generator: a training's name, an API of `apis`, a folder or a hub name; in a later iteration "
        "the model of the iteration before"
    )

    def plan(self, inputs: Inputs) -> Job:
        """Plan samples of the generator."""
        model = inputs.find(self.model)
        return self.plan_api(inputs, model) if isinstance(model, ApiModel) else self.plan_model(inputs, model)

    @property
    def origin(self) -> str:
        """The generator."""
        return f"sampled from {self.model}"

    def models(self) -> list[str]:
        """Return the generator."""
        return [self.model]

    def with_generator(self, model: str) -> Self:
        """Return the strategy with another generator."""
        return self.model_copy(update={"model": model})
