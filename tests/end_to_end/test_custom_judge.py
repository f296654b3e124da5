"""A judge of the user's own, the one of the guide, from the recipe to the metrics and the report."""

import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cpo_pipe.eval.judges.registry import JUDGES
from tests.support.project import Project

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "custom-judge.md"
KIND = "my_judges:OnTopic"


@pytest.fixture
def own(made: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A finished project with the guide's module beside its recipe."""
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    made.write("my_judges.py", code[1])
    monkeypatch.syspath_prepend(str(made.root))
    monkeypatch.setenv("COLUMNS", "200")  # wide enough for the names of all columns
    return made


def judges(settings: str) -> list[str]:
    return ["tiny.yaml", "--set", f"evaluate.judges={settings}"]


def test_an_own_judge_has_metrics_and_a_place_in_the_report(own: Project) -> None:
    done = own.cli("evaluate", *judges(f"{{topic: {{kind: '{KIND}', min_letters: 2}}, exact: {{}}}}"))
    assert done.status == 0, done.err
    assert "coverage" in done.out, "a column of the table on the terminal, its heading in two lines"
    folder = own.root / "runs" / "tiny" / "latest"
    found = {(row["system"], row["metric"]): row for row in pq.read_table(folder / "metrics.parquet").to_pylist()}
    outputs = json.loads((folder / "model_outputs" / "cpo" / "greedy.json").read_text())
    scores = []
    for output in outputs:
        words = {word for word in output["instruction"].split() if len(word) >= 2}
        scores.append(len(words & {*output["output"].split()}) / max(1, len(words)))
    assert found["cpo", "topic coverage"]["value"] == pytest.approx(sum(scores) / len(scores))
    assert {metric for system, metric in found if system == "cpo" and metric.startswith("topic ")} == {
        "topic coverage", "topic win", "topic tie", "topic loss", "topic win rate"
    }  # fmt: skip
    report = (folder / "report.html").read_text()
    assert "share of the prompt&#39;s words that the output uses" in report
    assert "wins and half of the ties, 0 to 1; above 0.5 is better than the baseline (judge topic)" in report
    resolved = (folder / "recipe.yaml").read_text()
    assert f"kind: {KIND}" in resolved
    assert "ignore shorter words" in resolved, "its settings are described"


INCOMPLETE = '''
from cpo_pipe.eval.judges.base import (
    ApiJudge, ApiJudgeConfig, JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric
)

class NotOpened(JudgeConfig):
    """Open nothing."""

class Unscored(ScoreJudge):
    def spec(self): return {"judge": "unscored"}

class Half(JudgeConfig):
    """Open a judge that is abstract."""
    def open(self, name: str, dependencies: JudgeDependencies) -> Unscored:
        return Unscored(name, ScoreMetric("x", "x"))

class Scored(Unscored):
    def scores(self, cases, outputs): return [0.0 for _ in outputs]

class Unnamed(JudgeConfig):
    """Open a judge of scores, without a metric."""
    def open(self, name: str, dependencies: JudgeDependencies) -> "Scored":
        return Scored(name, self.score_metric(name))

class Asking(ApiJudge):
    def query(self, pair): return pair.output_a
    def spec(self): return {"judge": "asking"}
    def judge(self, pairs): yield []

class Keyless(JudgeConfig):
    """Open a judge that asks an API, without the keys `api` and `max_tokens`."""
    def open(self, name: str, dependencies: JudgeDependencies) -> Asking:
        return Asking(name, next(iter(dependencies.apis.values())), 16)

class Complete(ApiJudgeConfig):
    """Open a judge that asks an API."""
    def open(self, name: str, dependencies: JudgeDependencies) -> Asking:
        return Asking(name, dependencies.apis[self.api], self.max_tokens)
'''


def write_module(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "incomplete_judges.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "incomplete_judges", raising=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NotOpened", "judge incomplete_judges:NotOpened is incomplete; implement open"),
        ("Unnamed", "judge incomplete_judges:Unnamed is incomplete; implement score_metric, as Scored gives scores"),
        (
            "Keyless",
            "judge incomplete_judges:Keyless is incomplete; derive it from ApiJudgeConfig, as Asking asks an API",
        ),
        ("Half", "judge incomplete_judges:Half is incomplete; implement scores in Unscored"),
    ],
)
def test_an_incomplete_judge_is_refused_when_the_recipe_is_read(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subclassed = "class Scored(Unscored)"
    code = INCOMPLETE if kind != "Half" else INCOMPLETE[: INCOMPLETE.index(subclassed)]
    write_module(code, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=re.escape(message)):
        JUDGES.parse({"kind": f"incomplete_judges:{kind}"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            f"{{topic: {{kind: '{KIND}', pattern: '(a)'}}}}",
            "evaluate.judges.topic.pattern is not a known key; known are",
        ),
        (f"{{topic: {{kind: '{KIND}', letters: 3}}}}", "evaluate.judges.topic.letters is not a known key"),
        (f"{{topic: {{kind: '{KIND}', min_letters: 0}}}}", "evaluate.judges.topic.min_letters is 0: input should be"),
        ("{topic: {kind: 'my_judges:Other'}}", "evaluate.judges.topic: judge my_judges:Other cannot be imported"),
        ("{topic: {kind: 'my_judges:OnTopicJudge'}}", "must be a subclass of cpo_pipe.eval.judges.base.JudgeConfig"),
    ],
)
def test_an_own_judge_that_does_not_fit_is_one_line(own: Project, settings: str, message: str) -> None:
    refused = own.cli("evaluate", *judges(settings))
    assert refused.status == 2
    assert message in refused.error()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("max_tokens: 8", "evaluate.judges.ask.api is missing"),
        ("api: mini", "evaluate.judges.ask.max_tokens is missing"),
        ("api: mimi, max_tokens: 8", "evaluate.judges.ask.api 'mimi' is not in `apis`; did you mean mini?"),
    ],
)
def test_a_judge_that_asks_an_api_needs_one_and_a_limit(
    project: Project, settings: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(INCOMPLETE, project.root, monkeypatch)
    api = "apis={mini: {url: 'http://127.0.0.1:9/v1', model: m}}"
    kind = f"{{ask: {{kind: 'incomplete_judges:Complete', {settings}}}}}"
    refused = project.cli("run", *judges(kind), "--set", api)
    assert refused.status == 2
    assert message in refused.error()
    assert not project.made()


UNKNOWN = '''
from cpo_pipe.eval.judges.base import Judge, JudgeConfig

class Secret(JudgeConfig):
    """Ask an API in a way of its own."""
    api: str
    def apis(self): return [self.api]
    def open(self, name, dependencies): return SecretJudge(name)

class SecretJudge(Judge):
    def spec(self): return {"judge": "secret"}
    def judge(self, pairs): yield []
'''


def test_the_estimate_names_judges_whose_requests_it_does_not_know(
    made: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(UNKNOWN, made.root, monkeypatch)
    api = "apis={mini: {url: 'http://127.0.0.1:9/v1', model: m}}"
    dry = made.cli(
        "evaluate", *judges("{ask: {kind: 'incomplete_judges:Secret', api: mini}}"), "--set", api, "--dry-run"
    )
    assert dry.status == 0, dry.err
    assert "judge ask (apis.mini): not estimated; derive the judge from ApiJudge to have it estimated" in dry.out
    assert "nothing that this recipe evaluates costs anything" not in dry.out


SCORING = '''
from cpo_pipe.eval.judges.base import JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric

class Broken(JudgeConfig):
    """Score targets or outputs with a value that is none, or return too few scores."""
    value: str = "0"
    targets: bool = False
    few: bool = False
    def score_metric(self, name): return ScoreMetric(name + " score", "a score")
    def open(self, name: str, dependencies: JudgeDependencies) -> "BrokenJudge":
        return BrokenJudge(name, self)

class BrokenJudge(ScoreJudge):
    def __init__(self, name, config):
        super().__init__(name, config.score_metric(name))
        self.config = config
    def spec(self): return {"judge": "broken"}
    def scores(self, cases, outputs):
        bad = float(self.config.value)
        targets = [output == case.target for case, output in zip(cases, outputs)]
        return [bad if target == self.config.targets else 0.0 for target in targets][self.config.few :]
'''


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("value: nan", r"the score of '.*' for example \w+ is nan; scores must be finite numbers"),
        ("value: inf", r"the score of '.*' for example \w+ is inf; "),
        ("value: '-inf'", r"the score of '.*' for example \w+ is -inf; "),
        ("value: nan, targets: true", r"the score of '.*' for example \w+ is nan; "),
        ("few: true", r"7 scores for 8 outputs; return one for each, so correct the judge"),
    ],
)
def test_scores_that_cannot_be_compared_are_an_error(
    made: Project, settings: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(SCORING, made.root, monkeypatch)
    arguments = judges(f"{{odd: {{kind: 'incomplete_judges:Broken', {settings}}}}}")
    failed = made.cli("evaluate", *arguments, "--set", "evaluate.baseline=ground-truth")
    assert failed.status == 1, failed.err
    assert re.search(f"error: judge odd: {message}", failed.error())
    assert not [*made.store.glob("verdicts/*/shards/*")][1:], "nothing but the verdicts of the finished run is stored"
