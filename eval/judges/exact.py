"""The judge `exact`: whether the output's answer equals the target's."""

from collections.abc import Sequence
from typing import ClassVar

from cpo_pipe.data.final_answer import AnswerFinder, Pattern
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import Case, JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric


class Exact(JudgeConfig):
    """Compare each output's answer with the target's answer."""

    pattern: Pattern = None
    compares_to_target: ClassVar[bool] = True

    def score_metric(self, name: str) -> ScoreMetric:
        """Return the share of correct answers."""
        description = "share of the outputs whose answer equals the target's; higher is better"
        return ScoreMetric(f"{name} match", description, is_share=True, on_terminal=True)

    def open(self, name: str, dependencies: JudgeDependencies) -> "ExactJudge":
        """Return the judge."""
        return ExactJudge(name, self.score_metric(name), self.pattern)


class ExactJudge(ScoreJudge):
    """Score 1 if the output's answer equals the target's (`data/final_answer.py`), else 0."""

    def __init__(self, name: str, metric: ScoreMetric, pattern: str | None):
        """`pattern` is the name of one, or a regular expression whose first group is the answer; None: whole texts."""
        super().__init__(name, metric)
        self._finder = AnswerFinder(pattern, f"evaluate.judges.{name}.pattern")

    def spec(self) -> Spec:
        """Return everything that decides a verdict."""
        return {"judge": "exact", **self._finder.spec()}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return 1 for each correct output and 0 for the others. No output is correct if its target has no answer."""
        pairs = zip(cases, outputs, strict=True)
        return [float(self._finder.agree(output, case.target)) for case, output in pairs]

    def check(self, targets: Sequence[str]) -> None:
        """Refuse a pattern that matches no target."""
        self._finder.check(targets)

    def notes(self, targets: Sequence[str]) -> list[str]:
        """Return how many targets the pattern does not match, or matches only in part."""
        notes = self._finder.notes(targets, "every output for these counts as wrong")
        return [f"{self.name}: {note}" for note in notes]
