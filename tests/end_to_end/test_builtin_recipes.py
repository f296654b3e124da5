"""The built-in recipes of the papers' tables: each runs at the scale `smoke`, in which only sizes are smaller."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.train_tokenizer import TrainedTokenizer
from cpo_pipe.pipeline.negatives.autoregressive import Sampler
from cpo_pipe.pipeline.negatives.meanfield import MeanField
from cpo_pipe.recipe.load import builtin_recipes, load_recipe
from cpo_pipe.trainer.objectives.preference import PreferenceTraining, ReferenceTraining
from tests.support.api_server import Seen, serve, written
from tests.support.marks import soak_except
from tests.support.project import Project, Result

PAPERS = ["dolly-gpt2-xl", "dolly-openllama-3b", "dolly-decoding", "dolly-strategies", "pairs-curriculum",
          "wiki-openllama-3b"]  # fmt: skip

SIZES = {
    "name", "data.tokenizer", "data.max_rows", "data.test", "data.chunk_tokens", "data.max_prompt_tokens",
    "data.max_target_tokens", "data.max_rejected", "negatives.max_examples",
    "negatives.sources.autoregressive.max_new_tokens", "negatives.sources.unhelpful.max_new_tokens",
    "evaluate.examples", "evaluate.max_new_tokens", "evaluate.bootstrap", "evaluate.mauve_model",
}  # fmt: skip
"""What a scale may change, beside steps and batches of trainings and the model that the first one starts from."""


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value and path not in ("scales", "data.tokenizer"):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


@pytest.mark.parametrize("name", PAPERS)
def test_a_scale_changes_sizes_and_nothing_else(name: str) -> None:
    whole, small = (dict(flat(load_recipe(name, scale=scale).model_dump())) for scale in (None, "smoke"))
    changed = {path for path in whole.keys() | small.keys() if whole.get(path) != small.get(path)}
    models = {path for path in changed if path.startswith("train.") and ".init" in path}
    counts = {path for path in changed if path.startswith("train.") and path.endswith((".max_steps", ".batch_size"))}
    assert changed - models - counts <= SIZES
    assert len({path.split(".")[1] for path in models}) == 1, "the first model, whose name the others start from"
    for path in changed - models:
        if isinstance(whole.get(path), int | float) and isinstance(small[path], int | float):
            assert small[path] < whole[path] or path == "data.max_rejected", path


def rows(count: int) -> list[dict[str, str]]:
    words = ["river", "stone", "cloud", "tree", "house", "road", "light"]
    return [
        {"instruction": f"Say something of the {words[n % 7]} number {n}.", "context": "" if n % 3 else f"It is {n}.",
         "response": f"The {words[n % 7]} number {n} is {words[n % 5]} and {words[n % 3]}.", "category": "qa"}
        for n in range(count)
    ]  # fmt: skip


def data_of(name: str, folder: Path) -> list[str]:
    """What stands for the data of a recipe, which is on the hub: settings."""
    if name.startswith("wiki"):
        text = "".join(f"\n = Title {n} = \n\n" + " ".join(row["response"] for row in rows(60)) for n in range(20))
        (folder / "wiki.txt").write_text(text)
        return ["data.source=wiki.txt", "data.subset=null"]
    if name.startswith("pairs"):
        for level, source in enumerate(("strong", "medium", "weak")):
            lines = [
                {"instruction": row["instruction"], "input": row["context"], "output": row["response"][level * 7 :]}
                for row in rows(140)
            ]
            (folder / f"{source}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return []
    (folder / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(140)))
    return ["data.source=dolly.jsonl"]


def answer(seen: Seen) -> Any:
    return written(seen, "A" if "More helpful:" in str(seen.prompt) or "Better:" in str(seen.prompt) else "Not so.")


@pytest.mark.slow
@pytest.mark.parametrize("name", soak_except(PAPERS, "dolly-strategies", "pairs-curriculum"))
def test_every_recipe_runs_at_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    settings = data_of(name, tmp_path)
    with serve(answer) as server:
        if load_recipe(name).apis:
            settings += [f"apis.gpt.url={server.url}"]
        options = [part for setting in settings for part in ("--set", setting)]
        done: Result = cli("run", name, "--scale", "smoke", *options)
        assert done.status == 0, done.err
        asked = len(server.seen)
        again: Result = cli("run", name, "--scale", "smoke", *options)
        assert again.status == 0, again.err
        assert len(server.seen) == asked
    report = (tmp_path / "runs" / f"{name}-smoke" / "latest" / "report.html").read_text()
    recipe = load_recipe(name)
    assert all(of.source in report for of in recipe.published)
    assert bool(recipe.published) == ("Published results" in report)


# ── the papers' settings and figures, typed from the papers ──────────────────────────────────────────────────────────

MLE, RANKED, SOFTMAX, DPO, PSS = "mle", "cpo-ranked", "cpo", "dpo", "pss"
AN, MIXN = {"autoregressive": 11}, {"batch": 3, "meanfield": 5, "truncation": 3}
UNHELPFUL = {"unhelpful": 1}
SETTINGS: dict[str, dict[str, tuple[str, int, dict[str, int] | None]]] = {
    "dolly-gpt2-xl": {
        "reference": (MLE, 2000, None), "mle": (MLE, 1000, None), "pss": (PSS, 1000, None),
        "dpo": (DPO, 1000, UNHELPFUL), "anr": (RANKED, 1000, AN), "mixnr": (RANKED, 1000, MIXN),
    },
    "dolly-openllama-3b": {
        "reference": (MLE, 2000, None), "mle-1": (MLE, 200, None), "mle-2": (MLE, 1000, None),
        "pss": (PSS, 1000, None), "dpo": (DPO, 1000, UNHELPFUL), "anr": (RANKED, 200, AN), "an": (SOFTMAX, 200, AN),
        "mixnr": (RANKED, 1000, MIXN), "mixn": (SOFTMAX, 1000, MIXN),
    },
    "wiki-openllama-3b": {
        "reference": (MLE, 2000, None), "mle": (MLE, 1000, None), "bnr": (RANKED, 1000, {"batch": 4}),
    },
    "dolly-decoding": {"reference": (MLE, 2000, None), "mle": (MLE, 200, None), "anr": (RANKED, 200, AN)},
    "dolly-strategies": {
        "reference": (MLE, 1000, None), "mle": (MLE, 200, None),
        "anr": (RANKED, 200, {"autoregressive": 4}), "bnr": (RANKED, 200, {"batch": 4}),
        "mnr": (RANKED, 200, {"meanfield": 4}), "tnr": (RANKED, 200, {"truncation": 4}),
    },
}  # fmt: skip
"""By recipe and training: the objective, its steps, and how many negatives of which kind a prompt has."""

TABLES: dict[str, list[tuple[str, dict[str, float]]]] = {
    "dolly-gpt2-xl": [(
        "table 1",
        {"mle": 0.471, "pss": 0.086, "dpo": 0.383, "anr": 0.506,
         "mixnr@0": 0.476, "mixnr@0.5": 0.479, "mixnr@0.7": 0.487, "mixnr@0.9": 0.485},
    )],
    "dolly-openllama-3b": [(
        "table 2",
        {"mle-1": 0.505, "pss": 0.270, "dpo": 0.555, "anr": 0.643, "an": 0.56, "mle-2": 0.522, "mixnr@0": 0.608,
         "mixnr@0.1": 0.620, "mixnr@0.3": 0.614, "mixnr@0.5": 0.610, "mixnr@0.7": 0.601, "mixnr@0.9": 0.550,
         "mixn": 0.576},
    )],
    "wiki-openllama-3b": [
        ("table 3", {"mle": 0.508, "bnr@0": 0.455, "bnr@0.5": 0.505, "bnr@0.7": 0.5, "bnr@0.9": 0.538}),
        ("table 4", {"mle": 0.524, "bnr@0": 0.610, "bnr@0.1": 0.627, "bnr@0.3": 0.673, "bnr@0.5": 0.645,
                     "bnr@0.7": 0.651, "bnr@0.9": 0.668}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_trainings_are_those_of_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.negatives is not None
    counts = {name: source.count for name, source in recipe.negatives.sources.items()}
    found = {}
    for training_name, training in recipe.train.items():
        negatives = (training.negatives or counts) if isinstance(training, PreferenceTraining) else None
        found[training_name] = (training.objective, training.max_steps, negatives)
        assert (training.learning_rate, training.weight_decay, training.batch_size) == (1e-5, 0.05, 64)
        assert (training.lr_scheduler_type, training.warmup_steps, training.max_grad_norm) == ("constant", 0, None)
        assert training.init == ("reference" if training_name != "reference" else recipe.train["reference"].init)
        if isinstance(training, ReferenceTraining):
            assert (training.mle_weight, training.beta, training.reference) == (0, 5.0, "reference")
        if training.objective == PSS:
            assert (training.sequences, training.replace) == (3, 0.5)
    assert found == SETTINGS[name]
    for source in recipe.negatives.sources.values():
        if isinstance(source, Sampler):
            assert (source.top_k, source.temperature) == (50, 1.0)
        if isinstance(source, MeanField):
            assert source.corruption_rate == 0.15
    assert recipe.evaluate is not None
    assert (recipe.evaluate.baseline, recipe.evaluate.examples) == ("ground-truth", 1000)
    assert recipe.evaluate.judges["gpt"].template == ("wiki" if name.startswith("wiki") else "dolly")
    assert recipe.apis["gpt"].model == "gpt-3.5-turbo"
    if name.startswith("wiki"):
        assert recipe.data.prompt_fraction == 0.15


@pytest.mark.parametrize("name", PAPERS)
def test_published_figures_are_those_of_the_papers_tables(name: str) -> None:
    recipe = load_recipe(name)
    assert [(of.source, of.values) for of in recipe.published] == [
        (f"Feng et al. 2025, {table}", values) for table, values in TABLES.get(name, [])
    ]
    assert [of.metric for of in recipe.published] == {"wiki-openllama-3b": ["gpt win rate", "MAUVE"]}.get(
        name, ["gpt win rate"] * len(recipe.published)
    )
    assert recipe.note is not None


@pytest.mark.parametrize("of", ["{source: s, metric: MUAVE, values: {cpo: 0.5}}",
                                "{source: s, metric: rep-4, decoding: gredy, values: {cpo: 0.5}}"])  # fmt: skip
def test_published_figures_of_what_is_not_measured_are_warned_of(made: Project, of: str) -> None:
    done = made.cli("evaluate", "tiny.yaml", "--set", f"published=[{of}]")
    assert done.status == 0, done.err
    assert "published: cpo in s: " in done.err
    assert "is not measured by this run" in done.err


@pytest.mark.slow
def test_published_figures_that_no_decoding_changes_are_found(made: Project) -> None:
    figures = "{source: s, metric: target NLL, values: {cpo: 0.5}}"
    done = made.cli("evaluate", "tiny.yaml", "--set", f"published=[{figures}]")
    assert done.status == 0, done.err
    assert "is not measured by this run" not in done.err


def test_step_counts_at_small_are_those_of_the_table_made_smaller() -> None:
    small, whole = load_recipe("dolly-openllama-3b", scale="small").train, load_recipe("dolly-openllama-3b").train
    compared = {
        name: training.max_steps / whole[name].max_steps for name, training in small.items() if name != "reference"
    }
    assert set(compared.values()) == {0.2}


@pytest.mark.parametrize("name", PAPERS)
def test_small_needs_nothing_from_outside(name: str) -> None:
    recipe, whole = load_recipe(name, scale="small"), load_recipe(name)
    assert recipe.data.preset == "python-docs"
    assert isinstance(recipe.data.tokenizer, TrainedTokenizer)
    assert not recipe.apis
    trainings = recipe.trainings()
    for training_name, training in trainings.items():
        assert not isinstance(training.init, str) or training.init in trainings
        assert getattr(training, "reference", None) in (None, *trainings)
        if training_name in whole.train:
            assert training.objective == whole.train[training_name].objective
            assert training.max_steps < whole.train[training_name].max_steps
            assert training.curriculum == whole.train[training_name].curriculum
            assert getattr(training, "pairs", None) == getattr(whole.train[training_name], "pairs", None)
    assert recipe.evaluate is not None
    assert whole.evaluate is not None
    assert recipe.evaluate.systems == whole.evaluate.systems
    assert recipe.evaluate.ensembles == whole.evaluate.ensembles
    assert {judge.kind for judge in recipe.evaluate.judges.values()} == {"similarity", "longer"}
    assert recipe.evaluate.baseline in recipe.evaluate.systems, "similarity knows no win against the ground truth"
    assert recipe.evaluate.mauve_model is None
    assert recipe.negatives is not None
    assert all(model in trainings for model in recipe.negatives.models())


@pytest.mark.slow
def test_pools_at_small_are_written_by_models_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["train.medium.max_steps=2", "train.weak.max_steps=2", "negatives.max_examples=16", "data.max_rows=60",
                "data.validation=50", "data.test=50"]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    for command in (["prepare"], ["train", "medium", "weak"], ["generate-negatives"], ["rank"]):
        done: Result = cli(command[0], "pairs-curriculum", *command[1:], "--scale", "small", *options)
        assert done.status == 0, done.err
    assert "groups: 16" in done.err
    assert "K 3.00 on average" in done.err


def test_a_scale_that_is_not_there_is_named() -> None:
    with pytest.raises(
        InputError, match="--scale smok: the recipe dolly-gpt2-xl has no such scale; did you mean smoke"
    ):
        load_recipe("dolly-gpt2-xl", scale="smok")
    with pytest.raises(InputError, match="--scale large: the recipe pairs has no such scale; there are smoke"):
        load_recipe("pairs", scale="large")


def test_what_stands_in_several_places_is_changed_in_one(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "data: {source: x.jsonl, tokenizer: t, test: 1}\n"
        "train:\n  a: &a {init: m, objective: mle, lora: {r: 4}}\n  b: *a\n"
        "scales: {small: {'train.*.lora': {r: 2}, 'negatives.sources.*.count': 3}}\n"
    )
    for scale, other in ((None, 4), ("small", 2)):
        recipe = load_recipe(str(path), ["train.a.lora.r=9"], scale)
        assert [training.lora.r for training in recipe.train.values() if training.lora] == [9, other]
    path.write_text(path.read_text().replace("small: {'train.*.lora'", "10: {1"))
    with pytest.raises(InputError, match="line 5, column 15: the key 1 is not text; put it in quotes"):
        load_recipe(str(path), scale="10")


def test_overrides_come_after_the_scale() -> None:
    recipe = load_recipe("dolly-gpt2-xl", ["train.mle.max_steps=7"], "smoke")
    assert (recipe.train["mle"].max_steps, recipe.train["anr"].max_steps) == (7, 2)
    assert {*PAPERS} < builtin_recipes().keys()
