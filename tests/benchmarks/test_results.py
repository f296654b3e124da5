"""What `just results` says of figures: which of the papers' orderings hold, and the settings that were chosen."""

from pathlib import Path

import pytest
from scipy import stats

from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.recipe.load import builtin_recipes, load_recipe, parse_recipe
from tests.benchmarks import results
from tests.benchmarks.results import ALPHAS, GREEDY, GRIDS, LABELS, METHODS, SAMPLED, SEEDS, VALIDATION_SEEDS, Figures


def figures(seed: int, **win_rates: float) -> Figures:
    """Of one seed: systems win 0.4 of the time but those that are named, which differ from seed to seed by 0.01."""
    systems = ["reference", *(name for name in METHODS if name != "mixnr"), *(f"mixnr@{alpha:g}" for alpha in ALPHAS)]
    noise = 0.01 * (seed - 3)
    found = {(GROUND_TRUTH, "-", results.REPETITION): 0.017}
    for number, system in enumerate(systems):
        for decoding in (GREEDY, SAMPLED):
            for metric in (results.LONGER, results.REPETITION, results.CHRF, results.MAUVE):
                found[system, decoding, metric] = 0.5
            spread = noise if number % 2 else -noise
            found[system, decoding, results.WIN] = win_rates.get(system, 0.4) + spread
        found[system, "-", results.NLL] = 4 + noise
    return found


def scored(method: str, more: float) -> Figures:
    """A run of settings, each 0.1 better than the one before it, greedy outputs as far above as samples are below."""
    return {
        (f"{method}-{number}", decoding, results.WIN): 0.1 * number + more + off
        for number in range(3)
        for decoding, off in ((GREEDY, 0.05), (SAMPLED, -0.05))
    }


def test_orderings_hold_or_not_or_are_open(tmp_path: Path) -> None:
    seeds = [figures(seed, anr=0.9, pss=0.8) for seed in SEEDS]
    tuned = {name: [scored(name, 0.0), scored(name, 0.2)] for name in METHODS}
    text = results.page(tuned, dict.fromkeys(METHODS, 2), seeds, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ") and " > " in line]
    verdicts = {row.split(" | ")[0][2:]: [cell.strip(" |") for cell in row.split(" | ")[3::2]] for row in rows}
    assert verdicts["ANR > MLE continued"] == ["holds"] * 2
    assert verdicts["MLE continued > PSS"] == ["the other way round"] * 2
    assert verdicts["TNR > MNR"] == ["undecided"] * 2
    assert verdicts["ANR > AN"] == ["holds"] * 2
    assert len(verdicts) == len(results.ORDERINGS)
    assert "- greedy, **the other way round** (" in text
    assert "| MixNR | beta 0.1: 0.100, beta 0.3: 0.200, beta 1: 0.300 | beta 1 |" in text
    for name in ("win-rates", "alpha"):
        assert f"(results-{name}.svg)" in text
        assert 'xmlns="http://www.w3.org/2000/svg"' in (tmp_path / f"results-{name}.svg").read_text()


def test_what_one_in_twenty_would_show_is_undecided(tmp_path: Path) -> None:
    """A difference that a t-test alone takes for one: p is 0.024, and there are 18 of them."""
    seeds = [figures(seed, anr=0.45) for seed in SEEDS]
    differences = [of["anr", GREEDY, results.WIN] - of["an", GREEDY, results.WIN] for of in seeds]
    assert results.p_value(differences) == pytest.approx(0.024, abs=1e-3)
    text = results.page({name: [scored(name, 0.0)] for name in METHODS}, dict.fromkeys(METHODS, 2), seeds, tmp_path)
    assert "| ANR > AN | table 2 | +0.0" in text
    row = next(line for line in text.splitlines() if line.startswith("| ANR > AN |"))
    assert row.count("| undecided, leans to it |") == 2


def test_p_values_are_students() -> None:
    values = [0.1, 0.3, 0.2, 0.5, 0.4]
    t = 0.3 / (0.025 / 5) ** 0.5
    assert results.p_value(values) == pytest.approx(2 * stats.t.sf(t, 4))
    assert results.p_value([0.0] * 5) == 1
    assert results.p_value([0.2] * 5) == 0


def chosen_in(page: str) -> dict[str, str]:
    """By label what the page says was chosen."""
    rows = page.partition("## Settings, chosen on validation")[2].splitlines()
    return {row.split("|")[1].strip(): row.split("|")[3].strip() for row in rows if row.count("|") == 4}


@pytest.mark.parametrize("name", sorted(path for path in builtin_recipes() if "small" in load_recipe(path).scales))
def test_small_scales_have_the_settings_that_were_chosen(name: str) -> None:
    chosen = chosen_in((results.ROOT / "docs" / "results.md").read_text())
    assert {LABELS[method] for method in METHODS} <= chosen.keys()
    checked = 0
    for training_name, training in load_recipe(name, scale="small").trainings().items():
        method = {"sft": "mle"}.get(kind := training_name.partition("-")[0], kind)
        if not isinstance(training.init, str):
            continue  # where the others start from
        (setting,) = (of for of in GRIDS[method] if results._setting(of) == chosen[LABELS[method]])
        expected = METHODS[method] | setting
        for field in ("learning_rate", "beta", "mle_weight", "replace"):
            if field in expected:
                assert getattr(training, field) == expected[field], (training_name, field)
                checked += 1
    assert checked >= 4


def test_intervals_are_students() -> None:
    values = [0.1, 0.3, 0.2, 0.5, 0.4]
    mean, low, high = results.interval(values)
    half = stats.t.ppf(0.975, 4) * (0.025 / 5) ** 0.5  # the variance of the five is 0.025
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert results.interval([0.5] * 5) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_its_runs_are_recipes_that_differ_by_the_seed_alone(method: str) -> None:
    tuning = parse_recipe(results.tuning(method, VALIDATION_SEEDS[0]), method)
    assert not set(VALIDATION_SEEDS) & set(SEEDS)
    assert tuning.evaluate is not None
    assert tuning.evaluate.split == "validation"
    assert len(tuning.train) == 1 + len(GRIDS[method])
    one, other = (parse_recipe(results.comparison(seed, dict.fromkeys(METHODS, 1)), str(seed)) for seed in (1, 2))
    assert one.evaluate is not None
    assert one.evaluate.split == "test"
    assert one.data == other.data == tuning.data, "one split for all"
    assert one.train.keys() == {"reference", *METHODS}
    for name, training in one.train.items():
        assert training != other.train[name]
        assert training.model_copy(update={"seed": 2, "init": None}) == other.train[name].model_copy(
            update={"init": None}
        )
