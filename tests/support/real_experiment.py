"""The experiment of `just results-real`: tasks, methods, the settings tried for each, and the recipe of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNING_SEED = 101
GREEDY, SAMPLED = "greedy", "top-k"

STEPS, BATCH = 24, 8
ENGINE, DTYPE = "vllm", "bfloat16"
"""Of all negatives and outputs; of all training and sampling."""
JUDGED = 60
"""Prompts on which the worth of the model as a judge is measured."""

PROMPTS = STEPS * BATCH
"""With negatives; so every method sees as many, each once."""

START = {"init": "reference", "max_steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-5, "warmup_steps": 3}
CONTRAST = {**START, "reference": "reference", "mle_weight": 1.0, "beta": 0.1}
MIXTURE = {"batch": 1, "meanfield": 1, "truncation": 1}
ALPHAS = [0.25, 0.5, 0.75]
"""The part of MLE continued in a merge with the best contrastive method."""

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
VARIED = METHODS["an"] | {"beta": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "an, no MLE loss": {"mle_weight": 0.0},
    "an, β 5, mean log-probs": {"beta": 5.0, "length_normalize": True},
    "an, whole distribution": {"negatives": {"whole": 3}},
}
"""On validation with the tuning seed; where answers can be compared also WITHOUT_CORRECT."""
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
    test_data: Mapping[str, Any] | None = None
    """Where the test rows are, if not in `data`."""

    @property
    def test_rows(self) -> int:
        """Their number."""
        return int((self.test_data or self.data)["test"])


def tasks(model: Path, text: Path, test_text: Path, questions: Path, test_questions: Path) -> dict[str, Task]:
    """The two tasks on given files."""
    sizes = {"tokenizer": str(model), "validation": 150, "test": 200}
    pieces = {"preset": "text", "chunk_tokens": 48, "prompt_fraction": 0.333, **sizes}
    return {
        "text": Task(
            {**pieces, "source": str(text)}, 32, ("chrF", GREEDY),
            {GREEDY: [("rep-4", 3), ("chrF", 1), ("length", 1)],
             SAMPLED: [("distinct-2", 3), ("chrF", 1), ("MAUVE", 3), ("length", 1)]}, {},
            {**pieces, "source": str(test_text), "validation": 0, "test": 300},
        ),
        "questions": Task(
            {"source": str(questions), "test_source": str(test_questions), "template": "chat",
             "columns": {"prompt": "question", "target": "answer"}, "train": 1500, "max_target_tokens": 120,
             "max_rejected": 1.0, **sizes, "validation": 100},
            120, ("chrF", GREEDY),
            {GREEDY: [("exact match", 3), ("chrF", 1), ("rep-4", 3), ("length", 1)],
             SAMPLED: [("exact match", 3), ("chrF", 1), ("distinct-2", 3), ("length", 1)]},
            {"exact": {"pattern": "gsm8k"}},
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
    sampling = {"max_new_tokens": task.max_new_tokens, "engine": ENGINE, "dtype": DTYPE}
    sampled = {"model": "reference", "count": 3, **sampling}
    sources = {
        "autoregressive": {**sampled, "top_k": 50},
        "whole": {"strategy": "autoregressive", **sampled, "top_k": 0},
        "batch": {"count": 3},
        "meanfield": {"model": "reference", "count": 1},
        "truncation": {"count": 1},
    }
    used = {source for training in trainings.values() for source in training.get("negatives", {})}
    reference = {"init": str(model), "objective": "mle", "max_steps": 60, "batch_size": BATCH,
                 "learning_rate": 3e-5, "warmup_steps": 6, "dtype": DTYPE}  # fmt: skip
    negatives = {"seed": seed, "max_examples": PROMPTS, "sources": {name: sources[name] for name in sorted(used)}}
    if drop_correct is not None:
        negatives["drop_correct"] = dict(drop_correct)
    metric, decoding = task.chosen_by
    has_mauve = any(measure == "MAUVE" for measures in task.measures.values() for measure, _ in measures)
    return {
        "name": name,
        "data": dict(task.data),
        "train": {
            "reference": reference,
            **{key: {**of, "seed": seed, "dtype": DTYPE} for key, of in trainings.items()},
        },
        **({"negatives": negatives} if used else {}),
        "evaluate": {
            "systems": {key: {"model": key} for key in ("reference", *trainings)},
            "baseline": "mle" if "mle" in trainings else "reference",
            "headline": {"metric": metric, "decoding": decoding},
            "split": split,
            "decodings": {GREEDY: {"temperature": 0}, SAMPLED: {"top_k": 50}},
            "judges": task.judges or {"similarity": {}},
            **({"mauve_model": str(model)} if has_mauve else {"mauve_model": None, "mauve_seeds": 0}),
            "seed": seed,
            **sampling,
        },
    }
