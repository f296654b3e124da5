"""What the papers compare, compared at the scale `small` over several seeds: `just results` writes docs/results.md.

Each method's settings are chosen on the validation split (`GRIDS`, by similarity to the targets, over
`VALIDATION_SEEDS`). With them it is trained anew for each of `SEEDS` (other initial weights, negatives and orders of
the data) and measured on the test split. What is in the store is not made again, so a run that was stopped goes on.
"""

import argparse
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
import yaml
from scipy import stats

from cpo_pipe.data.progress import track
from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.figures import ANY_DECODING
from cpo_pipe.eval.report.charts import Bar, alpha_curves, win_rates
from cpo_pipe.eval.statistics.significance import holm
from cpo_pipe.recipe.load import load_recipe
from tests.support.results_page import write_part

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3, 4, 5)
VALIDATION_SEEDS = (101, 102)
ALPHAS = [0, 0.1, 0.3, 0.5, 0.7, 0.9]
GREEDY, SAMPLED = "greedy", "top-k"

STEPS, BATCH = 100, 8
EXAMPLES = STEPS * BATCH
"""Prompts with negatives. So every method sees as many pieces, each once: MLE and PSS draw theirs from all."""

BASE: dict[str, Any] = {"init": "reference", "max_steps": STEPS, "batch_size": BATCH, "learning_rate": 2e-4}
COUNTS: dict[str, dict[str, int]] = {
    "an": {"autoregressive": 4},
    "bn": {"batch": 4},
    "mn": {"meanfield": 4},
    "tn": {"truncation": 4},
    "mixn": {"batch": 1, "meanfield": 2, "truncation": 1},
}
# Padded rows: for a model of this size one large forward pass is faster than a group's shared tokens once.
CONTRAST = {**BASE, "reference": "reference", "mle_weight": 1.0, "attention": "padded"}
METHODS: dict[str, dict[str, Any]] = {
    "mle": {**BASE, "objective": "mle"},
    "pss": {**BASE, "objective": "pss"},
    "dpo": {**CONTRAST, "objective": "dpo", "negatives": {"autoregressive": 1}},
    "slic": {**BASE, "objective": "slic", "attention": "padded", "negatives": {"autoregressive": 1}},
    **{name: {**CONTRAST, "objective": "cpo", "negatives": counts} for name, counts in COUNTS.items()},
    **{f"{name}r": {**CONTRAST, "objective": "cpo-ranked", "negatives": counts} for name, counts in COUNTS.items()},
}
BETAS = [{"beta": beta} for beta in (0.1, 0.3, 1.0)]
GRIDS: dict[str, list[dict[str, float]]] = dict.fromkeys(METHODS, BETAS) | {
    "mle": [{"learning_rate": learning_rate} for learning_rate in (5e-5, 2e-4, 8e-4)],
    "pss": [{"replace": share} for share in (0.1, 0.25, 0.5)],
    "slic": [{"mle_weight": weight} for weight in (1.0, 10.0, 100.0)],
}

LABELS = {"mle": "MLE continued", "an": "AN", "anr": "ANR", "bn": "BN", "bnr": "BNR", "mn": "MN", "mnr": "MNR",
          "tn": "TN", "tnr": "TNR", "mixn": "MixN", "mixnr": "MixNR", "dpo": "DPO", "slic": "SLiC",
          "pss": "PSS"}  # fmt: skip
WIN, LONGER = "similarity win rate", "longer win rate"
REPETITION, CHRF, MAUVE, NLL = "rep-4", "chrF", "MAUVE", "target NLL"


@dataclass(frozen=True)
class Ordering:
    """A system that Feng et al. 2025 has above another, and where."""

    above: str
    below: str
    source: str
    metric: str = WIN


ORDERINGS = [
    Ordering("anr", "mle", "tables 1, 2"),
    Ordering("an", "mle", "table 2"),
    Ordering("mixnr@0", "mle", "tables 1, 2"),
    Ordering("mixn", "mle", "table 2"),
    Ordering("dpo", "mle", "table 2"),
    Ordering("mle", "dpo", "table 1"),
    Ordering("mle", "pss", "tables 1, 2"),
    Ordering("anr", "an", "table 2"),
    Ordering("mixnr@0", "mixn", "table 2"),
    Ordering("anr", "mixnr@0", "tables 1, 2"),
    Ordering("anr", "dpo", "tables 1, 2"),
    Ordering("mixnr@0.1", "mixnr@0", "table 2"),
    Ordering("mixnr@0.7", "mixnr@0", "table 1"),
    Ordering("mixnr@0", "mixnr@0.9", "table 2"),
    Ordering("bnr", "mnr", "§5.1, figure 1"),
    Ordering("tnr", "mnr", "§5.1, figure 1"),
    Ordering("mle", "bnr", "table 3"),
    Ordering("bnr", "mle", "table 4", MAUVE),
]


def recipe(
    name: str, trainings: Mapping[str, Mapping[str, Any]], seed: int, evaluate: Mapping[str, Any]
) -> dict[str, Any]:
    """A run at the scale `small` with these trainings; all but the split of the data follows the seed."""
    small = load_recipe("dolly-openllama-3b", scale="small").model_dump(exclude_unset=True)
    reference = small["train"]["reference"]
    reference["init"]["seed"] = seed
    train = {"reference": reference} | {name: dict(training) for name, training in trainings.items()}
    sources = {
        "autoregressive": {"model": "reference", "count": 4, "top_k": 50, "engine": "transformers"},
        "batch": {"count": 4},
        "meanfield": {"model": "reference", "count": 4},
        "truncation": {"count": 4},
    }
    negatives = {"seed": seed, "max_examples": EXAMPLES, "sources": sources}
    return {
        "name": name,
        "data": small["data"],
        "train": {name: training | {"seed": seed} for name, training in train.items()},
        **({"negatives": negatives} if any("negatives" in training for training in train.values()) else {}),
        "evaluate": {
            "decodings": {GREEDY: {"temperature": 0}, SAMPLED: {"top_k": 50}},
            "seed": seed,
            "engine": "transformers",
            **evaluate,
        },
    }


def tuning(method: str, seed: int) -> dict[str, Any]:
    """A run that helps to choose a method's settings: a training for each, against the reference on validation."""
    trainings = {f"{method}-{number}": METHODS[method] | settings for number, settings in enumerate(GRIDS[method])}
    systems = {name: {"model": name} for name in trainings} | {"reference": {"model": "reference"}}
    evaluate = {"systems": systems, "baseline": "reference", "split": "validation", "mauve_seeds": 0}
    return recipe(f"tune-{method}-{seed}", trainings, seed, evaluate)


def comparison(seed: int, chosen: Mapping[str, int]) -> dict[str, Any]:
    """The run that compares all methods, with the settings chosen, on the test split."""
    trainings = {name: METHODS[name] | GRIDS[name][number] for name, number in chosen.items()}
    systems = {name: {"model": name} for name in ("reference", *trainings) if name != "mixnr"}
    ensembles = {"mixnr": {"of": ["mle", "mixnr"], "alphas": ALPHAS}}
    evaluate = {"systems": systems, "ensembles": ensembles, "baseline": "mle", "split": "test", "mauve_seeds": 2,
                "judges": ["similarity", "longer"]}  # fmt: skip
    return recipe(f"compare-{seed}", trainings, seed, evaluate)


Figures = dict[tuple[str, str, str], float]
"""By system, decoding and metric."""


def run(work: Path, recipes: Iterable[Mapping[str, Any]], label: str, jobs: int) -> list[Figures]:
    """Run recipes, `jobs` at a time with a thread each; what each wrote to its log stands beside it."""
    contents = list(recipes)
    with ThreadPoolExecutor(jobs) as pool, track(label, len(contents)) as meter:
        waiting = [pool.submit(_run, work, content) for content in contents]
        try:
            for done in as_completed(waiting):
                done.result()
                meter.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [_figures(work, content["name"]) for content in contents]


def _run(work: Path, content: Mapping[str, Any]) -> None:
    path = work / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    with path.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "cpo_pipe", "run", path.name]
        done = subprocess.run(command, cwd=work, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}; see {log.name}")


def _figures(work: Path, name: str) -> Figures:
    rows = pq.read_table(work / "runs" / name / "latest" / "metrics.parquet").to_pylist()
    return {(row["system"], row["decoding"], row["metric"]): row["value"] for row in rows}


def score(tuned: Sequence[Figures], system: str) -> float:
    """What settings are chosen by: the mean win rate against the reference over seeds and both decodings."""
    rates = [figures[system, decoding, WIN] for figures in tuned for decoding in (GREEDY, SAMPLED)]
    return sum(rates) / len(rates)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95% interval, of Student's t; values that are all alike have none but themselves."""
    mean = sum(values) / len(values)
    if max(values) == min(values):
        return mean, mean, mean
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return mean, float(low), float(high)


def p_value(differences: list[float]) -> float:
    """Of Student's t-test over seeds, under "there is no difference"; 1 where none was seen."""
    if max(differences) == min(differences):
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def _value(figures: Figures, system: str, decoding: str, metric: str) -> float:
    if metric == WIN and system == "mle":
        return 0.5  # against itself
    return figures[system, decoding, metric]


def _shown(values: list[float], digits: int) -> str:
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def page(tuned: Mapping[str, Sequence[Figures]], chosen: Mapping[str, int], seeds: list[Figures], folder: Path) -> str:
    """docs/results.md; writes its pictures beside it."""
    systems = ["reference", *(name for name in METHODS if name != "mixnr"), *(f"mixnr@{alpha:g}" for alpha in ALPHAS)]

    def over(system: str, decoding: str, metric: str) -> list[float]:
        return [_value(figures, system, decoding, metric) for figures in seeds]

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}  # fmt: skip
    lines = [_INTRODUCTION.format(seeds=len(seeds), **versions)]
    panels = {}
    for decoding in (GREEDY, SAMPLED):
        compared = [system for system in systems if system != "mle"]
        intervals = {system: interval(over(system, decoding, WIN)) for system in compared}
        panels[decoding] = [Bar(_label(system), *intervals[system]) for system in compared]
    curves = [
        (decoding, [(alpha, *interval(over(f"mixnr@{alpha:g}", decoding, WIN))) for alpha in ALPHAS])
        for decoding in (GREEDY, SAMPLED)
    ]
    pictures = {"win-rates": win_rates("Win rates over seeds", "MLE continued", panels),
                "alpha": alpha_curves("Win rate of MLE and MixNR merged", curves)}  # fmt: skip
    for name, chart in pictures.items():
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        (folder / f"results-{name}.svg").write_text(chart.svg.replace("<svg", f"<svg {namespaces}", 1) + "\n")
    lines += ["", "## Which orderings of the paper hold", "", _READING, "", *_orderings(over)]
    lines += ["", "## Against MLE continued", "", f"![{pictures['win-rates'].text}](results-win-rates.svg)"]
    for decoding, metrics in ((GREEDY, {WIN: 3, LONGER: 3, REPETITION: 3, CHRF: 1}),
                              (SAMPLED, {WIN: 3, LONGER: 3, MAUVE: 3, CHRF: 1})):  # fmt: skip
        lines += ["", f"### {decoding}", "", f"| | {' | '.join(metrics)} |", f"| --- |{' --- |' * len(metrics)}"]
        if REPETITION in metrics:
            lines.append(f"| ground truth |  |  | {over(GROUND_TRUTH, ANY_DECODING, REPETITION)[0]:.3f} |  |")
        for system in systems:
            shown = [
                _shown(over(system, decoding, metric), digits) if system != "mle" or metric not in (WIN, LONGER) else ""
                for metric, digits in metrics.items()
            ]
            lines.append(f"| {_label(system)} | {' | '.join(shown)} |")
    lines += ["", "### Likelihood of the targets, in nats a token", ""]
    lines += ["| | target NLL | minus that of MLE continued |", "| --- | --- | --- |"]
    for system in systems:
        nll, base = over(system, ANY_DECODING, NLL), over("mle", ANY_DECODING, NLL)
        more = _shown([one - other for one, other in zip(nll, base, strict=True)], 3) if system != "mle" else ""
        lines.append(f"| {_label(system)} | {_shown(nll, 3)} | {more} |")
    lines += ["", "## The ensemble's α", "", f"![{pictures['alpha'].text}](results-alpha.svg)"]
    lines += [
        "",
        "## Settings, chosen on validation",
        "",
        _SETTINGS.format(seeds=len(VALIDATION_SEEDS)),
        "",
        "| | settings: score | chosen |",
        "| --- | --- | --- |",
    ]
    for name, number in chosen.items():
        scores = [f"{_setting(settings)}: {score(tuned[name], f'{name}-{at}'):.3f}"
                  for at, settings in enumerate(GRIDS[name])]  # fmt: skip
        lines.append(f"| {LABELS[name]} | {', '.join(scores)} | {_setting(GRIDS[name][number])} |")
    return "\n".join(lines) + "\n"


def _orderings(over: Any) -> list[str]:
    """What became of the paper's orderings under each decoding: in a sentence each, and as a table."""
    rows = [f"| the paper has | where | {GREEDY} | | {SAMPLED} | |", "| --- | --- | --- | --- | --- | --- |"]
    said, cells = [], []
    names = [f"{_label(of.above)} > {_label(of.below)}" + (f" ({of.metric})" * (of.metric != WIN)) for of in ORDERINGS]
    for decoding in (GREEDY, SAMPLED):
        differences = [_differences(over, of, decoding) for of in ORDERINGS]
        adjusted = holm([p_value(of) for of in differences])
        verdicts = [_verdict(*found) for found in zip(differences, adjusted, strict=True)]
        cells.append([
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) | {verdict}"
            for (mean, low, high), verdict in zip(map(interval, differences), verdicts, strict=True)
        ])  # fmt: skip
        for verdict in (HOLDS, LEANS, OPEN, LEANS_AGAINST, REVERSED):
            which = [name for name, found in zip(names, verdicts, strict=True) if found == verdict]
            said.append(f"- {decoding}, **{verdict}** ({len(which)} of {len(names)}): {'; '.join(which) or 'none'}.")
    rows += [
        f"| {name} | {of.source} | {greedy} | {sampled} |"
        for name, of, greedy, sampled in zip(names, ORDERINGS, *cells, strict=True)
    ]
    return [*said, "", *rows]


HOLDS, REVERSED, OPEN = "holds", "the other way round", "undecided"
LEANS, LEANS_AGAINST = "undecided, leans to it", "undecided, leans against it"


def _differences(over: Any, of: Ordering, decoding: str) -> list[float]:
    """By how much the upper system of an ordering is above the other, seed by seed."""
    above, below = (over(system, decoding, of.metric) for system in (of.above, of.below))
    return [one - other for one, other in zip(above, below, strict=True)]


def _verdict(differences: list[float], adjusted_p: float) -> str:
    if p_value(differences) >= 0.05:
        return OPEN
    decided = adjusted_p < 0.05
    if sum(differences) > 0:
        return HOLDS if decided else LEANS
    return REVERSED if decided else LEANS_AGAINST


def _label(system: str) -> str:
    name, separator, alpha = system.partition("@")
    return f"{LABELS[name]}, α = {alpha}" if separator else LABELS.get(system, system)


def _setting(settings: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


_INTRODUCTION = """\
# Results on a tiny model: the papers' comparisons

Made by `just results`; nothing below is written by hand. Python {python}, torch {torch}, transformers {transformers},
on CPUs.

The task is that of the scale `small` of the built-in recipes: continue chunks of the documentation that every Python
carries (48 tokens of a 2,048-entry BPE; 12 are the prompt). The reference is a Llama of 0.86 million parameters,
trained on the chunks for 500 steps of 32. From it each method goes on for 100 steps of 8, which are 800 chunks, each
once; with 4 negatives a prompt (MixN: 1 BN, 2 MN, 1 TN; DPO and SLiC: 1 AN) and the MLE loss beside its own. The
paper's DPO had for its negative what GPT-3.5 was asked for; here it is a sample of the reference.

A win is the output whose embedding is nearer to the target's (all-MiniLM-L6-v2, which also ranks the negatives);
`longer` is the share of longer outputs. Figures are means over {seeds} seeds on the 400 test chunks, with 95%
intervals of Student's t. A seed changes initial weights, negatives, samples and orders of the data. The split is one
for all; settings were chosen on its validation part, with other seeds. The intervals are of the seeds: they leave
out that other test chunks might say otherwise.

A model of this size writes no sense. What is compared is how training moves it, not whether the papers are right
about models a thousand times larger and judges that read."""

_READING = """\
From Feng et al. 2025, whose win rates are of greedy outputs against the ground truth; here they are against MLE
continued. An ordering holds, or is the other way round, where Student's t-test of the difference, seed by seed, says so
at 5% after Holm's adjustment for the number of orderings under a decoding; with five seeds that takes a t of about 7.
It leans where only the test of the one difference says so, whose 95% interval is shown: of 18 differences that are
none, about one would. Orderings that contradict each other (MLE and DPO) are of the paper's two models."""

_SETTINGS = """\
{seeds} trainings of each setting, seeds other than those above, on 400 validation chunks: the score is the win rate
against the reference, its mean over seeds and both decodings. All else is alike: learning rate 2e-4 unless it is the
setting, constant, AdamW with weight decay 0.05, `mle_weight` 1 unless it is the setting."""


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "results", help="folder of store and runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, with a thread each")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.work.mkdir(parents=True, exist_ok=True)
    each = [(name, seed) for seed in VALIDATION_SEEDS for name in METHODS]
    found = run(arguments.work, (tuning(*of) for of in each), "settings", arguments.jobs)
    tuned = {name: [figures for of, figures in zip(each, found, strict=True) if of[0] == name] for name in METHODS}
    chosen = {
        name: max(range(len(GRIDS[name])), key=lambda number: score(tuned[name], f"{name}-{number}"))
        for name in METHODS
    }
    seeds = run(arguments.work, (comparison(seed, chosen) for seed in SEEDS), "seeds", arguments.jobs)
    write_part(ROOT / "docs" / "results.md", "tiny model", page(tuned, chosen, seeds, ROOT / "docs"))


if __name__ == "__main__":
    main()
