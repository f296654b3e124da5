"""Base classes of judges and of their settings, the dependencies they are opened with, and their verdicts."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

from pydantic import Field, model_validator

from cpo_pipe.data.config import Positive, Section
from cpo_pipe.data.errors import RunError
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.embedder import Embedder, EmbeddingCache
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Store
from cpo_pipe.data.text import abridged
from cpo_pipe.pipeline.api.model import ApiModel

Winner = Literal["a", "b", "tie"]

AB, BA = "ab", "ba"
"""The orders of a pair: output A is shown first, or output B."""

NOISE = 1e-6
"""Cosines, log-probabilities and probabilities that differ by less are a tie: they depend on how texts are batched."""

SWAPPED: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
"""The same verdict with the two outputs swapped."""


@dataclass(frozen=True)
class Case:
    """A prompt with its target."""

    example_id: str
    prompt: str
    """As in the source."""
    rendered: str
    """As the systems receive it."""
    target: str
    messages: str | None = None
    """The column `messages` of the EXAMPLES schema."""


@dataclass(frozen=True)
class Pair:
    """Two outputs for one prompt; a judge that sees an order is shown output A first."""

    case: Case
    output_a: str
    output_b: str

    def swapped(self) -> "Pair":
        """Return the pair with the two outputs swapped."""
        return Pair(self.case, self.output_b, self.output_a)


@dataclass(frozen=True)
class Verdict:
    """One judgement of one pair in one order."""

    winner: Winner
    p_a: float | None
    """The judge's probability that A is better, if it gives one."""
    raw: Mapping[str, Any]
    """The judge's answer or measurements, plain JSON values; `unparseable` holds the reason if it is no verdict."""

    @property
    def parsed(self) -> bool:
        """Whether the answer was a verdict. An unparseable answer counts as a tie."""
        return "unparseable" not in self.raw

    def swapped(self) -> "Verdict":
        """Return the verdict about the pair with the two outputs swapped; `raw` does not change."""
        return Verdict(SWAPPED[self.winner], None if self.p_a is None else 1 - self.p_a, self.raw)


def unparseable(reason: str, **answer: Any) -> Verdict:
    """Return the tie that replaces an unparseable answer. It is stored like other answers."""
    return Verdict("tie", None, {"unparseable": reason, **answer})


@dataclass(frozen=True)
class Judgement:
    """A judge's verdicts on one pair, in each order in which it was asked.

    As in MT-bench (Zheng et al. 2023, §3.4) a win needs the same winner in both orders; everything else is a tie. If
    the judge gives probabilities, their mean over both orders decides.
    """

    by_order: Mapping[str, Verdict]
    """By AB and BA; empty for equal outputs, which are a tie without asking."""

    @property
    def p_a(self) -> float | None:
        """The judge's probability that A is better, mean of the orders, if it gives one."""
        each = [verdict.p_a for verdict in self.by_order.values() if verdict.p_a is not None]
        return sum(each) / len(each) if each and len(each) == len(self.by_order) else None

    @property
    def winner(self) -> Winner:
        """The better output."""
        if self.p_a is not None:
            return higher(self.p_a, 0.5, NOISE)
        winners = {verdict.winner for verdict in self.by_order.values()}
        return winners.pop() if len(winners) == 1 else "tie"

    def swapped(self) -> "Judgement":
        """Return the judgement of the pair with the two outputs swapped."""
        return Judgement({order[::-1]: verdict.swapped() for order, verdict in self.by_order.items()})

    @property
    def for_first(self) -> tuple[int, int]:
        """The number of verdicts for the output shown first, and of verdicts that name a winner."""
        first = [order[0] == verdict.winner for order, verdict in self.by_order.items() if verdict.winner != "tie"]
        return sum(first), len(first)

    @property
    def flipped(self) -> bool | None:
        """Whether the verdict changes with the order; None unless both orders gave a verdict."""
        verdicts = [verdict.winner for verdict in self.by_order.values() if verdict.parsed]
        return len(set(verdicts)) > 1 if len(verdicts) == 2 else None

    @property
    def unparseable(self) -> float | None:
        """Share of the answers that are no verdict; None if the judge was not asked."""
        verdicts = self.by_order.values()
        return sum(not verdict.parsed for verdict in verdicts) / len(verdicts) if verdicts else None


def higher(a: float, b: float, noise: float) -> Winner:
    """Return which of two scores is higher; a tie if they differ by at most `noise`."""
    if abs(a - b) <= noise:
        return "tie"
    return "a" if a > b else "b"


class Judge(ABC):
    """Compares two outputs for the same prompt.

    Args:
        name: the judge's name in the recipe. It names the metrics and does not identify verdicts.
    """

    sees_order: bool = False
    """Whether it is shown one output before the other. If so, position bias and flip rate are measured."""
    orders: Sequence[str] = (AB,)
    """The orders it is asked in: AB, or AB and BA."""

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def spec(self) -> Spec:
        """Return everything that decides a verdict, as plain JSON values. Stored verdicts are found by it."""

    @abstractmethod
    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Yield the index and verdict of each pair, in any order; each list is stored as it comes.

        A pair without an answer is left out.
        """

    def check(self, targets: Sequence[str]) -> None:  # noqa: B027  # most judges have nothing to check
        """Raise InputError if the settings cannot work with these targets; called before outputs are generated."""

    def notes(self, targets: Sequence[str]) -> list[str]:
        """Return what a reader of the metrics should know about the judge, one sentence each."""
        return []


@dataclass(frozen=True)
class ScoreMetric:
    """The metric that is the mean of a judge's scores."""

    name: str
    description: str
    is_share: bool = False
    """Whether every score is 0 or 1. Its interval is Wilson's."""
    on_terminal: bool = False
    """Whether the table on the terminal shows it, not only the report."""


class ScoreJudge(Judge):
    """The output with the higher score wins; equal scores are a tie.

    Args:
        name: the judge's name in the recipe.
        metric: the mean score of a system's outputs, reported beside its win rate.
    """

    noise = 0.0
    """Scores that differ by at most this are equal."""

    def __init__(self, name: str, metric: ScoreMetric):
        super().__init__(name)
        self.metric = metric

    @abstractmethod
    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return the score of each output for the case at the same index."""

    def checked_scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return the score of each output.

        Raises:
            RunError: the number of scores is not that of the outputs, or a score is not finite.
        """
        scores = self.scores(cases, outputs)
        if len(scores) != len(outputs):
            raise RunError(
                f"judge {self.name}: {len(scores)} scores for {len(outputs)} outputs; return one for each, so correct "
                "the judge"
            )
        for case, output, score in zip(cases, outputs, scores, strict=True):
            if not math.isfinite(score):
                raise RunError(
                    f"judge {self.name}: the score of {abridged(repr(output))} for example {case.example_id} is "
                    f"{score}; scores must be finite numbers, so correct the judge"
                )
        return scores

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Yield all verdicts together; `raw` holds both scores."""
        cases = [pair.case for pair in pairs]
        a = self.checked_scores(cases, [pair.output_a for pair in pairs])
        b = self.checked_scores(cases, [pair.output_b for pair in pairs])
        yield [
            (index, Verdict(higher(x, y, self.noise), None, {"a": x, "b": y}))
            for index, (x, y) in enumerate(zip(a, b, strict=True))
        ]


class ApiJudge(Judge):
    """A judge that asks an API; `evaluate --dry-run` estimates the cost. An `ApiJudgeConfig` opens it.

    Args:
        name: the judge's name in the recipe.
        api: the API.
        max_tokens: the longest answer, in tokens.
    """

    def __init__(self, name: str, api: ApiModel, max_tokens: int):
        super().__init__(name)
        self.api, self.max_tokens = api, max_tokens

    @abstractmethod
    def query(self, pair: Pair) -> str:
        """Return the message that asks for one verdict, output A first."""


@dataclass(frozen=True)
class JudgeDependencies:
    """What judges may need to open."""

    store: Store
    executor: Executor
    """Runs the forward passes of local models."""
    template: str
    """The template of the examples' prompts (`data.template`)."""
    apis: Mapping[str, ApiModel]
    """The recipe's `apis`, by name."""
    models: Mapping[str, Model]
    """The models that the judges' settings name, by name."""
    embedder: Embedder | None = None
    """The model of `evaluate.embedder`; None unless a judge uses embeddings."""
    embeddings: EmbeddingCache | None = None
    """The embedder's vectors of outputs and targets."""


class JudgeConfig(Section):
    """Settings of a judge. The first line of a subclass's docstring describes it in help and recipes."""

    kind: str = Field("", description="kind of judge, or your own class as module:Class (default: the judge's name)")

    uses_embeddings: ClassVar[bool] = False
    """Whether it needs the model of `evaluate.embedder`."""
    compares_to_target: ClassVar[bool] = False
    """Whether it scores similarity to the target, so that no system can beat the ground truth."""

    @model_validator(mode="after")
    def _check_opened(self) -> "JudgeConfig":
        """Refuse an incomplete class of judges when the recipe is read: `open` declares it as its return type."""
        try:
            opened = get_type_hints(type(self).open).get("return")
        except NameError:  # an annotation that only type checkers can resolve
            return self
        if not inspect.isclass(opened):
            return self
        missing = sorted(getattr(opened, "__abstractmethods__", ()))
        if missing and not opened.__subclasses__():
            raise ValueError(f"judge {self.kind} is incomplete; implement {', '.join(missing)} in {opened.__name__}")
        if issubclass(opened, ScoreJudge) and self.score_metric("name") is None:
            raise ValueError(
                f"judge {self.kind} is incomplete; implement score_metric, as {opened.__name__} gives scores"
            )
        if issubclass(opened, ApiJudge) and not isinstance(self, ApiJudgeConfig):
            raise ValueError(
                f"judge {self.kind} is incomplete; derive it from ApiJudgeConfig, as {opened.__name__} asks an API"
            )
        return self

    @abstractmethod
    def open(self, name: str, dependencies: JudgeDependencies) -> Judge:
        """Return the judge called `name` in the recipe; load nothing heavy.

        Raises:
            InputError: a model cannot be used.
        """

    def models(self) -> list[str]:
        """Return the names of the models whose weights it needs."""
        return []

    def apis(self) -> list[str]:
        """Return the names of the APIs it asks."""
        return []

    def score_metric(self, name: str) -> ScoreMetric | None:
        """Return the metric of its scores; None unless it is a `ScoreJudge`."""
        return None


class ApiJudgeConfig(JudgeConfig):
    """Settings of an `ApiJudge`."""

    api: str = Field(description="the API, one of `apis`")
    max_tokens: Positive = Field(description="longest answer, in tokens")

    def apis(self) -> list[str]:
        """Return the API."""
        return [self.api]
