"""The base class of strategies, and what they plan: where a source's negatives are kept and what makes them."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.config import Section
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.samples import SAMPLE_INDICES, SampleRequest


class FindModel(Protocol):
    """Resolve the name of a model in the recipe."""

    def __call__(self, name: str, *, any_tokenizer: bool = False) -> Model | ApiModel:
        """Return the model; `any_tokenizer` also accepts one whose tokenizer is not that of the examples."""
        ...


@dataclass(frozen=True)
class Inputs:
    """The inputs of a strategy's plan for one source."""

    name: str
    """The source's name in the recipe."""
    store: Store
    examples: Examples
    selection: pa.Table
    """The examples that get negatives (EXAMPLES schema)."""
    find: FindModel
    seed: int
    max_tokens: int
    """Length limit of a negative, in tokens, where the source sets none."""

    @property
    def key(self) -> str:
        """The source's key in the recipe, for messages."""
        return f"negatives.sources.{self.name}"

    def rows(self, spec: Spec) -> Rows:
        """Return the artifact of the negatives with this identity (NEGATIVES schema)."""
        return self.store.rows("negatives", spec)

    def refused(self, spec: Spec) -> Rows:
        """Return the artifact of negatives that cannot be made, with the reasons (REJECTED schema)."""
        return self.store.rows("rejected", {"of": spec})

    def source(self, rows: Rows, count: int, refused: Rows | None = None) -> "Source":
        """Return the source of `count` negatives per example that are kept in `rows`."""
        return Source(self.name, SampleRequest(rows, count, refused))


def _no_check() -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Source:
    """The location of a source's negatives, and how many an example gets."""

    label: str
    """The source's name, by which groups and trainings refer to it."""
    request: SampleRequest

    @property
    def rows(self) -> Rows:
        """The artifact with the negatives."""
        return self.request.rows

    @property
    def count(self) -> int:
        """Negatives per example."""
        return self.request.n


@dataclass(frozen=True)
class Job:
    """The work that makes a source's negatives, and how to run it."""

    source: Source
    work: Work
    batch_size: int = 64
    """Examples per call of the work."""
    in_process: bool = False
    """Run the work in this process, whatever the executor is: requests to an API, or work that needs all examples."""
    check_inputs: Callable[[], None] = _no_check
    """Raises InputError for faults that can be found before the first source is made."""
    check_results: Callable[[], None] = _no_check
    """Raises RunError for negatives that could not be made this time."""


class Strategy(Section):
    """Makes the negatives of one source; its fields are the settings of a section of `negatives.sources`.

    A strategy is a subclass in a module of its own with an entry in `STRATEGIES` (registry.py). The first line of its
    docstring describes it.
    """

    kind: ClassVar[str]
    """The strategy's name, as recorded with each row."""

    strategy: str = Field(
        "",
        description="autoregressive, batch, meanfield, truncation, pool, prompted, rejected, or a class of yours as "
        "module:Class (default: the source's name)",
    )
    count: int = Field(1, gt=0, lt=1 << 16, description="negatives per prompt")
    strength: float | None = Field(
        None, description="quality of this source, compared with the others; for a curriculum by strength"
    )

    @abstractmethod
    def plan(self, inputs: Inputs) -> Job:
        """Return where the negatives are kept and what makes them; make none.

        The spec of the rows must contain all that their values depend on, but not how many there are: sample k of an
        example must not depend on `count`.

        Raises:
            InputError: the inputs break a rule, or a model or file is missing.
        """

    @property
    def origin(self) -> str:
        """The origin of the texts, for data cards."""
        return (type(self).__doc__ or self.strategy).strip().partition("\n")[0].rstrip(".")

    def models(self) -> list[str]:
        """Return the names of the models and APIs that the strategy needs."""
        return []

    def check_apis(self, apis: Mapping[str, Api]) -> None:
        """Refuse an API, or a model that is not an API, where the strategy cannot use it.

        Raises:
            ValueError: the message names the setting, what is wrong with it, and what to do.
        """

    def with_generator(self, model: str) -> Self:
        """Return the strategy for a later iteration, with `model` as its generator if it has one."""
        return self

    def with_count(self, count: int) -> Self:
        """Return the strategy with another count.

        Raises:
            pydantic.ValidationError: the settings do not allow so many.
        """
        return type(self).model_validate({**self.model_dump(exclude_unset=True), "count": count})


NegativesOf = Callable[[dict[str, Any], list[int]], Sequence[Mapping[str, Any]]]
"""From an example (EXAMPLES schema) and sample indices to one row per index (NEGATIVES schema)."""


@dataclass(frozen=True)
class ExampleWork(Work):
    """Work that makes the negatives of one example at a time."""

    rows: Rows
    load: Callable[[], NegativesOf]
    """Load what is needed and return what makes an example's negatives. It is pickled for other processes."""

    def open(self) -> Make:
        """Load what is needed."""
        negatives_of = self.load()

        def make(batch: pa.Table) -> Iterator[NewRows]:
            rows = [row for example in batch.to_pylist() for row in negatives_of(example, example[SAMPLE_INDICES])]
            yield NewRows([rows], len(rows))

        return make


def negative(
    example: Mapping[str, Any],
    sample_index: int,
    seed: int,
    *,
    strategy: str,
    text: str,
    token_ids: Sequence[int],
    ends: bool,
    generator: str | None = None,
    engine: str | None = None,
) -> dict[str, Any]:
    """Return a row of the NEGATIVES schema; `ends` says whether the text ends there, with an end token."""
    return {
        "example_id": example["example_id"],
        "sample_index": sample_index,
        "strategy": strategy,
        "text": text,
        "token_ids": token_ids,
        "finish_reason": "stop" if ends else "length",
        "logprob": None,
        "seed": seed,
        "generator": generator,
        "engine": engine,
    }
