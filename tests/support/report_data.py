"""What a report is made of, small."""

from typing import Any

import pyarrow as pa

from cpo_pipe.data.schemas import EXAMPLES, GROUPS, METRICS
from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.judging import VERDICTS
from cpo_pipe.eval.metrics.differences import COMPARISONS
from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.leaderboard import leaderboards
from cpo_pipe.eval.statistics.agreement import AGREEMENT
from cpo_pipe.pipeline.quality.schema import QUALITY

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'> {{ 7 * 7 }} \x1b[31m\x00 \u202egnihtemos $x$"


def example(number: int, text: str = "") -> dict[str, Any]:
    return {"example_id": f"e{number}", "split": "test", "prompt": f"prompt {number}",
            "rendered": f"prompt {number} {text}", "target": f"target {number} {text}", "prompt_ids": [1],
            "target_ids": [2], "ends": True, "category": None}  # fmt: skip


def figure(system: str, decoding: str, metric: str, value: float, interval: bool = True) -> dict[str, Any]:
    low, high = (value - 0.1, value + 0.1) if interval else (None, None)
    return {"system": system, "decoding": decoding, "metric": metric, "value": value, "ci_low": low, "ci_high": high,
            "n": 7}  # fmt: skip


def verdict(number: int, winner: str, *orders: dict[str, Any], **changes: str) -> dict[str, Any]:
    return {"example_id": f"e{number}", "judge": "similarity", "system": "cpo", "opponent": "mle",
            "decoding": "greedy", "winner": winner, "orders": list(orders), **changes}  # fmt: skip


def said(order: str, winner: str, raw: str = "{}", p_a: float | None = None) -> dict[str, Any]:
    return {"order": order, "winner": winner, "p_a": p_a, "raw": raw}


def group(example_id: str, text: str = "") -> dict[str, Any]:
    def candidate(name: str, strategy: str, similarity: float | None, rank: int) -> dict[str, Any]:
        return {"candidate_id": name, "text": f"{name} {text}", "token_ids": [1], "strategy": strategy,
                "similarity": similarity, "rank": rank}  # fmt: skip

    candidates = [
        candidate("gold", "target", 1.0, 0),
        candidate("farther", "autoregressive", 0.25, 2),
        candidate("nearer", "autoregressive", 0.5, 1),
    ]
    return {"example_id": example_id, "prompt_ids": [1], "candidates": candidates}


def bins(*counts: int) -> list[dict[str, Any]]:
    """A histogram of bins of a quarter."""
    return [{"low": n / 4, "high": (n + 1) / 4, "count": count} for n, count in enumerate(counts, 1)]


def strategy(name: str, **figures: Any) -> dict[str, Any]:
    """Figures of a strategy's negatives; without reference log-probs."""
    measured = {"made": 1200, "kept": 4, "copies": 0.25, "alone": 0.0, "tokens": 12.5, "length_ratio": 0.75,
                "longer": 0.5, "longest": 0.625, "chance": 0.5, "similarity": 0.5, "similarity_p10": 0.125,
                "similarity_p50": 0.5, "similarity_p90": 0.75, "distinct_2": 0.25, "target_distinct_2": 0.5,
                "group_sizes": [1, 2, 0, 1], "length_ratio_histogram": bins(3, 0, 1),
                "similarity_histogram": bins(0, 4)}  # fmt: skip
    return {"strategy": name, **measured, **figures}


def quality_table(*strategies: dict[str, Any]) -> pa.Table:
    target = {"strategy": "target", "made": 3, "kept": 3, "tokens": 20.0, "distinct_2": 0.5}
    return pa.Table.from_pylist([*strategies, strategy("all"), target], schema=QUALITY)


def make_data(text: str = "", count: int = 3, **changes: Any) -> ReportData:
    metrics = [
        figure(GROUND_TRUTH, "-", "rep-4", 0.1),
        figure("mle", "-", "target NLL", 4.125),
        figure("mle", "greedy", "rep-4", 0.5),
        figure("cpo", "greedy", "rep-4", 0.25),
        figure("cpo", "greedy", "MAUVE", 0.75, interval=False),
        figure("cpo", "greedy", "MAUVE sd", 0.015, interval=False),
        figure("cpo", "greedy", "similarity win rate", 0.6),
    ]
    outputs = [
        {"example_id": f"e{number}", "system": system, "decoding": "greedy", "text": f"{system} says {text}"}
        for system in ("mle", "cpo")
        for number in range(count)
    ]
    steps = {"step": [1, 2, 3], "loss": [2.5, 2.0, None], "reward_margin": [0.0, 0.1, 0.3], "learning_rate": [1e-5] * 3}
    table = pa.Table.from_pylist(metrics, schema=METRICS)
    ranked = leaderboards(table, COMPARISONS.empty_table(), "mle", ("similarity win rate", "greedy"), {"MAUVE"})
    settings: dict[str, Any] = {
        "leaderboards": ranked, "identity": "i1", "run": "a-run",
        "created": "2026-11-20 15:00", "versions": {"cpo-pipe": "0.1.0"}, "recipe": f"name: {text}",
        "artifacts": {"examples": "examples/abc"}, "baseline": "mle",
        "metrics": table,
        "comparisons": COMPARISONS.empty_table(), "agreements": AGREEMENT.empty_table(),
        "verdicts": VERDICTS.empty_table(),
        "shared_metrics": {"MAUVE", "similarity win rate"}, "notes": ["a note"],
        "examples": pa.Table.from_pylist([example(number, text) for number in range(count)], schema=EXAMPLES),
        "outputs": pa.Table.from_pylist(outputs), "trainings": {"cpo-run": pa.table(steps)},
        "quality": quality_table(strategy("autoregressive")), "quality_notes": ["autoregressive: too short."],
        "group_examples": pa.Table.from_pylist([example(100, text)], schema=EXAMPLES),
        "groups": pa.Table.from_pylist([group("e100", text)], schema=GROUPS),
    }  # fmt: skip
    return ReportData(**{**settings, **changes})
