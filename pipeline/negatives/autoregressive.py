"""Autoregressive negatives (AN): continuations sampled from a model given the prompt, top-k with k = 50 (§3).

`Sampler` and `EngineSampler` are the settings and plans that it shares with other strategies that sample.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import Field

from cpo_pipe.data.config import Location, Positive
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.api.client import Question
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.api.work import ApiWork, prompt_of
from cpo_pipe.pipeline.engines.base import Sampling, SamplingDtype, check_context
from cpo_pipe.pipeline.engines.registry import AUTO, EngineName
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job, Strategy
from cpo_pipe.pipeline.samples import WINDOW, EngineWork, LazyEngine


def sampled_spec(
    rendering: Spec,
    generator: str | Spec,
    sampling: Sampling,
    seed: int,
    strategy: str = "autoregressive",
    **more: Any,
) -> Spec:
    """Return the identity of samples: distribution and seed, but not how many there are.

    Args:
        rendering: how the prompt is written and tokenized.
        generator: a model's fingerprint, or an API's spec.
        sampling: the distribution.
        seed: of all samples.
        strategy: the strategy's kind; samples of equal distributions are shared by strategies that leave the default.
        more: what else decides the samples.
    """
    return {
        "strategy": strategy,
        "generator": generator,
        "prompt": rendering,
        "sampling": sampling.spec(),
        "seed": seed,
        **more,
    }


class Sampler(Strategy):
    """Samples continuations. The defaults are the paper's settings."""

    top_k: int = Field(50, ge=0, description="sample among the k likeliest tokens (0: all)")
    temperature: float = Field(1.0, gt=0, description="softmax temperature")
    max_new_tokens: Positive | None = Field(
        None, description="longest negative, in tokens (default: data.max_target_tokens)"
    )

    def sampling(self, inputs: Inputs, stop_ids: tuple[int, ...] = ()) -> Sampling:
        """Return the distribution; `stop_ids` are the token ids that end a continuation."""
        limit = self.max_new_tokens or inputs.max_tokens
        return Sampling(temperature=self.temperature, top_k=self.top_k, max_new_tokens=limit, stop_ids=stop_ids)

    def plan_api(
        self,
        inputs: Inputs,
        api: ApiModel,
        message: Callable[[Mapping[str, Any]], Question] = prompt_of,
        spec: Spec | None = None,
    ) -> Job:
        """Plan samples of an API.

        Args:
            inputs: what to plan with.
            api: the API.
            message: from an example (EXAMPLES schema) to the user's message of a chat, or its messages.
            spec: identity of the rows; needed where `message` is not the prompt.
        """
        sampling = self.sampling(inputs)
        spec = spec or sampled_spec(inputs.examples.rendering, api.spec(), api.obeyed(sampling), inputs.seed)
        rows, refused = inputs.rows(spec), inputs.refused(spec)
        columns = {"strategy": self.kind, "generator": api.fingerprint}
        examples = inputs.examples
        work = ApiWork(rows, refused, api, sampling, inputs.seed, examples.tokenizer, examples.rendering, message,
                       columns)  # fmt: skip
        # Requests wait for their server, not for a core: one process sends them all, which also enforces the caps.
        return Job(inputs.source(rows, self.count, refused), work, WINDOW, in_process=True,
                      check_inputs=api.check_client, check_results=api.check_answered)  # fmt: skip


class EngineSampler(Sampler):
    """Samples continuations with a local engine."""

    engine: EngineName = AUTO
    dtype: SamplingDtype = "auto"
    batch_size: Positive = Field(256, description="prompts per engine call; does not change the distribution")

    def plan_model(self, inputs: Inputs, model: Model) -> Job:
        """Plan samples of a model that has the examples' tokenizer.

        Raises:
            InputError: a prompt leaves the model no room for `max_new_tokens`.
        """
        tokenizer = inputs.examples.tokenizer
        sampling = self.sampling(inputs, end_tokens(model.path, tokenizer, inputs.examples.end_tokens))
        context = check_context(inputs.selection, model, sampling.max_new_tokens, f"{inputs.key}.max_new_tokens")
        rows = inputs.rows(sampled_spec(inputs.examples.rendering, model.fingerprint, sampling, inputs.seed))
        columns = {"strategy": self.kind, "generator": model.fingerprint}
        work = EngineWork(
            rows, LazyEngine(self.engine, model, context, self.dtype), sampling, inputs.seed, tokenizer, columns
        )
        return Job(inputs.source(rows, self.count), work, self.batch_size)


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
        return f"Sampled from {self.model}"

    def models(self) -> list[str]:
        """Return the generator."""
        return [self.model]

    def with_generator(self, model: str) -> Self:
        """Return the strategy with another generator."""
        return self.model_copy(update={"model": model})
