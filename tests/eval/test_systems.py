"""What is compared: models, APIs and the ground truth itself; with a baseline, and any two with each other."""

from collections.abc import Sequence
from typing import Any

import pytest

from cpo_pipe.eval.config import GROUND_TRUTH, Ensemble, Evaluate, System, ensemble_system
from cpo_pipe.eval.evaluate import Evaluation
from cpo_pipe.pipeline import samples
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from tests.support.api_server import Reply, Seen, error, serve, written
from tests.support.evaluation import Bench, figures, no_engine


def texts(result: Evaluation, system: str) -> list[str]:
    """Outputs of a system, or the targets, in the order of the examples."""
    if system == GROUND_TRUTH:
        return result.examples["target"].to_pylist()
    return [row["text"] for row in result.table("outputs").to_pylist() if row["system"] == system]


def longer(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """The win rate that the judge `longer` gives."""
    each = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(ours, theirs, strict=True)]
    return sum(each) / len(each)


# ── against the ground truth, and against each other ─────────────────────────────────────────────────────────────


def test_all_are_compared_with_the_ground_truth(bench: Bench) -> None:
    result = bench.run(baseline=GROUND_TRUTH, judges=["longer"])
    found = figures(result)
    for system in ("one", "two"):
        expected = longer(texts(result, system), texts(result, GROUND_TRUTH))
        assert found[system, "greedy", "longer win rate"]["value"] == pytest.approx(expected)
    assert not [key for key in found if key[0] == GROUND_TRUTH and ("win" in key[2] or key[2] == "target NLL")]
    assert set(result.table("outputs")["system"].to_pylist()) == {"one", "two"}
    assert result.notes == []


def test_a_judge_that_goes_by_the_target_cannot_prefer_anything_to_it(bench: Bench) -> None:
    result = bench.run(baseline=GROUND_TRUTH, judges=["exact", "longer"])
    assert figures(result)["two", "greedy", "exact win"]["value"] == 0
    assert result.notes == ["exact: scores similarity to the target, so no system can beat the ground truth"]


def test_any_two_are_compared(bench: Bench) -> None:
    plain = bench.run(baseline=GROUND_TRUTH, judges=["longer"])
    pairs = [["two", "one"], ["one", "two"]]
    result = bench.run(baseline=GROUND_TRUTH, judges=["longer"], compare=pairs)
    found = figures(result)
    rate = longer(texts(result, "two"), texts(result, "one"))
    assert 0 < rate < 1
    assert found["two", "greedy", "longer win rate against one"]["value"] == pytest.approx(rate)
    assert found["one", "greedy", "longer win rate against two"]["value"] == pytest.approx(1 - rate)
    names = {f"longer {figure} against two" for figure in ("win", "tie", "loss", "win rate")}
    assert {metric for system, _, metric in found if system == "one" and " against " in metric} == names
    assert {key: row for key, row in found.items() if " against " not in key[2]} == figures(plain)


def test_the_ground_truth_may_be_the_other_side(bench: Bench) -> None:
    result = bench.run(judges=["longer"], compare=[["one", GROUND_TRUTH]])
    expected = longer(texts(result, "one"), texts(result, GROUND_TRUTH))
    rate = figures(result)["one", "greedy", "longer win rate against ground-truth"]
    assert rate["value"] == pytest.approx(expected)


def test_no_more_comparisons_are_the_same_comparison(bench: Bench) -> None:
    assert bench.run(compare=[]).artifact.path == bench.run().artifact.path
    assert "compare" not in bench.run().artifact.spec


def test_figures_against_others_are_marked_as_the_rankers_too(bench: Bench) -> None:
    from cpo_pipe.data.models.embedder import locate_embedder

    ranker = locate_embedder("minilm", bench.store).fingerprint
    result = bench.run(ranker=ranker, judges=["similarity"], baseline=GROUND_TRUTH, compare=[["two", "one"]])
    assert {"similarity win rate", "similarity win rate against one"} <= result.shared_metrics
    assert {"similarity win rate against one"} <= {metric for *_, metric in figures(result)}


SETTINGS = {"systems": {"one": {"model": "one"}, "two": {"model": "two"}}, "baseline": "one"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baseline": "gruond-truth"}, "baseline 'gruond-truth' is not among the systems (one, two); did you"),
        ({"compare": [["two", "three"]]}, "compare 'three' is not among the systems (one, two)"),
        ({"compare": [["two", "two"]]}, "compare [two, two]: must be a system and another system or ground-truth"),
        ({"compare": [[GROUND_TRUTH, "two"]]}, "must be a system and another system"),
        ({"compare": [["two", "one"]]}, "compare [two, one]: one is already the baseline; remove the pair"),
        ({"systems": {}, "baseline": GROUND_TRUTH}, "systems is empty; name at least one model"),
        ({"systems": {GROUND_TRUTH: {"model": "one"}}}, "systems: ground-truth is the name of the targets; rename it"),
        ({"ensembles": {"mix": {"of": ["a", "a"], "alphas": [0]}}}, "of names a twice"),
        ({"ensembles": {"mix": {"of": ["a", "b"], "alphas": [0.5, 0.50]}}}, "alphas has 0.5 twice"),
        ({"ensembles": {"mix": {"of": ["a", "b"], "alphas": [1.5]}}}, "less than or equal to 1"),
        ({"ensembles": {"mix": {"of": ["a", "b", "c"], "alphas": [0]}}}, "at most 2 items"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        Evaluate.model_validate(SETTINGS | settings)
    assert said in str(caught.value)


# ── ensembles ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_ensemble_is_a_system_for_each_alpha() -> None:
    ensemble = {"of": ["mle", "cpo"], "alphas": [0, 0.1, 0.9, 1]}
    config = Evaluate.model_validate(SETTINGS | {"ensembles": {"mix": ensemble}, "baseline": "mix@0.1"})
    systems = config.all_systems()
    assert list(systems) == ["one", "two", "mix@0", "mix@0.1", "mix@0.9", "mix@1"]
    assert systems["mix@0"] == System(model="cpo")
    assert systems["mix@1"] == System(model="mle")
    # As a user writes it, not 0.09999999999999998: the weights are identity.
    assert systems["mix@0.9"].merge == {"mle": 0.9, "cpo": 0.1}
    curve = [ensemble_system("mix", alpha) for alpha in config.ensembles["mix"].alphas]
    assert curve == list(systems)[2:], "a chart finds the points of its curve"
    assert Ensemble.model_validate(ensemble).system(0.1).merge == {"mle": 0.1, "cpo": 0.9}


# ── a model behind an API ────────────────────────────────────────────────────────────────────────────────────────


def with_api(bench: Bench, url: str, **settings: Any) -> Bench:
    bench.models = {"one": bench.models["one"], "gpt": ApiModel("mini", Api(url=url, model="mini", **settings))}
    return bench


def test_an_api_is_a_system(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(lambda seen: written(seen, f" dog {seen.prompt}")) as server:
        result = with_api(bench, server.url).run(judges=["longer", "exact"])
        assert sorted(server.prompts()) == sorted(result.examples["prompt"].to_pylist())
        assert len(server.seen) == 12
        # White space before it is the target's own, so that texts can be compared.
        assert texts(result, "gpt") == [f" dog {prompt}" for prompt in result.examples["prompt"].to_pylist()]
        found = figures(result)
        rate = longer(texts(result, "gpt"), texts(result, "one"))
        assert found["gpt", "greedy", "longer win rate"]["value"] == pytest.approx(rate)
        assert ("gpt", "-", "target NLL") not in found, "it says nothing of texts that are not its own"
        assert ("one", "-", "target NLL") in found
        monkeypatch.setattr(samples, "choose_engine", no_engine)
        assert bench.run(judges=["longer", "exact"]).artifact.path == result.artifact.path
        assert bench.run(bootstrap=300, judges=["longer"]).artifact.path != result.artifact.path
        assert len(server.seen) == 12, "nothing answered is asked for twice"


def test_an_api_may_be_the_baseline(bench: Bench) -> None:
    with serve() as server:
        result = with_api(bench, server.url).run(baseline="gpt", judges=["longer"])
    rate = longer(texts(result, "one"), texts(result, "gpt"))
    assert figures(result)["one", "greedy", "longer win rate"]["value"] == pytest.approx(rate)


def test_what_an_api_refuses_counts_as_an_empty_output(bench: Bench) -> None:
    *refused, blank = bench.examples.read("test")["prompt"].to_pylist()[3:6]

    def script(seen: Seen) -> Reply:
        if seen.prompt == refused[0]:
            return error(400, "no", code="content_filter")
        if seen.prompt == refused[1]:
            return written(seen, "this is", finish_reason="content_filter")
        if seen.prompt == blank:
            return written(seen, "   ")  # an answer, though an empty one
        return written(seen, "a very long answer that is longer than six tokens are, whatever they are")

    with serve(script) as server:
        result = with_api(bench, server.url).run(judges=["longer"], max_new_tokens=20)
        asked = len(server.seen)
        bench.run(judges=["longer"], max_new_tokens=20, bootstrap=300)
        assert len(server.seen) == asked
    assert [index for index, text in enumerate(texts(result, "gpt")) if not text] == [3, 4, 5]
    found = figures(result)
    assert found["gpt", "greedy", "longer win rate"]["n"] == 12, "none is left out"
    rate = longer(texts(result, "gpt"), texts(result, "one"))
    assert found["gpt", "greedy", "longer win rate"]["value"] == pytest.approx(rate)
    assert result.notes == [
        "gpt, greedy: the API refused 2 of 12 outputs (content filter 2); each counts as an empty one"
    ]


def test_sampling_an_api_by_another_seed_asks_anew_and_greedy_does_not(bench: Bench) -> None:
    with serve() as server:
        with_api(bench, server.url)
        bench.run(decodings={"warm": {"temperature": 0.7}})
        bench.run(decodings={"warm": {"temperature": 0.7}}, seed=1)
        assert len(server.seen) == 24
        assert {seen.body["temperature"] for seen in server.seen} == {0.7}
        bench.run()
        bench.run(seed=1)
        assert len(server.seen) == 36
