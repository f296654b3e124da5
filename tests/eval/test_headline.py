"""What ranks the systems: win rates by default, or what `headline` names."""

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import ttest_1samp

from cpo_pipe.eval.config import Evaluate
from cpo_pipe.eval.metrics.text import distinct_n
from cpo_pipe.run_report import rankings
from tests.support.evaluation import DECODINGS, Bench


def config(**settings: object) -> Evaluate:
    return Evaluate.model_validate({"systems": {"mle": {"model": "m"}}, "baseline": "mle", **settings})


def test_by_default_it_is_the_first_judges_win_rate_under_the_first_decoding() -> None:
    decodings = {"top-k": {"top_k": 5}, "greedy": {"temperature": 0}}
    assert config().ranked_by() == ("similarity win rate", "greedy")
    assert config(judges=["longer", "similarity"], decodings=decodings).ranked_by() == ("longer win rate", "top-k")
    assert config(judges=[], decodings=decodings).ranked_by() == ("chrF", "top-k")
    headline = {"metric": "chrF", "decoding": "greedy"}
    assert config(headline=headline, decodings=decodings).ranked_by() == ("chrF", "greedy")
    assert config(headline={"metric": "cosine to target"}).ranked_by() == ("cosine to target", "greedy")


@pytest.mark.parametrize(
    ("headline", "said"),
    [
        ({"metric": "chrf"}, "headline.metric 'chrf': not measured; did you mean chrF?"),
        ({"metric": "longer win rate"}, "headline.metric 'longer win rate': not measured"),
        ({"metric": "chrF", "decoding": "gredy"}, "headline.decoding 'gredy': not measured; did you mean greedy?"),
    ],
)
def test_what_is_not_measured_is_refused(headline: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace("?", r"\?")):
        config(headline=headline)


def test_a_metric_with_values_per_example_is_compared_by_these(bench: Bench) -> None:
    result = bench.run(headline={"metric": "chrF", "decoding": "top-k"}, judges=["similarity"], decodings=DECODINGS)
    values = result.table("values").to_pylist()
    of = {
        system: [row["value"] for row in values if (row["system"], row["decoding"], row["metric"]) == key]
        for system, key in ((name, (name, "top-k", "chrF")) for name in bench.models)
    }
    baseline = result.baseline
    (other,) = (name for name in of if name != baseline)
    (row,) = (row for row in result.table("comparisons").to_pylist() if row["metric"] == "chrF")
    differences = np.subtract(of[other], of[baseline])
    assert (row["system_a"], row["system_b"], row["decoding"]) == (other, baseline, "top-k")
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["ci_low"] < differences.mean() < row["ci_high"]
    assert row["p"] == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.08), "as a t-test, roughly"
    assert row["n_needed"] is None
    boards, answer = rankings(result)
    assert answer is not None
    assert (answer.system, answer.metric, answer.truth) == (other, "chrF", None)
    assert answer.value == pytest.approx(np.mean(of[other]))
    assert boards[0].decoding == "top-k"
    assert [column.metric for column in boards[0].columns][:2] == ["chrF", "similarity win rate"]


def test_diversity_is_compared_with_the_ground_truths(bench: Bench) -> None:
    result = bench.run(headline={"metric": "distinct-2"}, judges=["similarity"])
    _, answer = rankings(result)
    assert answer is not None
    targets = bench.examples.read("test")["target_ids"].to_pylist()
    assert answer.truth == pytest.approx(distinct_n([ids[:-1] for ids in targets], 2))
    gain = abs(answer.baseline_value - answer.truth) - abs(answer.value - answer.truth)
    assert answer.difference == pytest.approx(gain)
    assert f"the ground truth has {answer.truth:#.3g}; nearer by {gain:+.2g}" in answer.sentence
