"""The judge `longer`: which output has more characters."""

from collections.abc import Sequence

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import Case, JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric


class Longer(JudgeConfig):
    """Prefer the output with more characters: a control for judges that reward length."""

    def score_metric(self, name: str) -> ScoreMetric:
        """Return the mean number of characters."""
        return ScoreMetric(f"{name} characters", "characters of an output")

    def open(self, name: str, dependencies: JudgeDependencies) -> "LongerJudge":
        """Return the judge."""
        return LongerJudge(name, self.score_metric(name))


class LongerJudge(ScoreJudge):
    """Score the number of characters, which needs no tokenizer: systems may have different ones."""

    def spec(self) -> Spec:
        """Return everything that decides a verdict."""
        return {"judge": "longer", "unit": "characters"}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return the number of characters of each output."""
        return [float(len(output)) for output in outputs]
