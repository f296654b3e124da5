"""The candidates of a group: the target and the negatives that are not dropped."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.embedder import EQUAL
from cpo_pipe.data.models.end_tokens import without_end
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.negatives.config import TARGET
from cpo_pipe.pipeline.negatives.strategy import Source
from cpo_pipe.pipeline.scorers.scorer import Group, ScoreGroups, Scores

COPY = "copy of the target"
DUPLICATE = "duplicate of another negative"

SOURCE = "source"
"""The key of a negative's `source` in the REJECTED schema, which is no column of the groups."""


@dataclass(frozen=True)
class CorrectFilter:
    """Finds negatives that are correct."""

    score: ScoreGroups
    least: float
    """The lowest score of a correct negative."""
    reason: str
    """Why they are dropped."""

    def drop(
        self, examples: Sequence[dict[str, Any]], groups: Sequence[list[dict[str, Any]]]
    ) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
        """Return the groups without correct negatives, and the rows of those that were dropped."""
        kept: list[list[dict[str, Any]]] = []
        dropped: list[dict[str, Any]] = []
        found = checked_scores(self.score, examples, groups, "negatives.drop_correct.by")
        for example, (target, *negatives), scores in zip(examples, groups, found, strict=True):
            kept.append([target])
            for candidate, score in zip(negatives, scores.similarity[1:], strict=True):
                if score > self.least - EQUAL:
                    dropped.append(_dropped(candidate[SOURCE], example["example_id"], self.reason, candidate["text"]))
                else:
                    kept[-1].append(candidate)
        return kept, dropped


def collect_candidates(
    examples: Sequence[dict[str, Any]], sources: Sequence[Source], drop_duplicates: bool
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return the unranked candidates of each example, target first, and the rows of the negatives that were dropped.

    Candidates are compared without their end tokens: a copy of the target that ends otherwise is still a copy. Those
    that end do so in the token that ends the target, so that no end token tells a negative from its target.
    """
    negatives: dict[str, list[dict[str, Any]]] = {example["example_id"]: [] for example in examples}
    for source in sources:
        columns = ["example_id", "sample_index", "text", "token_ids", "finish_reason"]
        table = source.rows.read(list(negatives), columns, refresh=False)  # all were there when this began
        for row in table.filter(pc.less(table["sample_index"], source.count)).to_pylist():
            negatives[row["example_id"]].append({**row, "strategy": source.label})
    kept: list[list[dict[str, Any]]] = []
    dropped: list[dict[str, Any]] = []
    for example in examples:
        prompt_ids, target = example["prompt_ids"], tuple(without_end(example["target_ids"], example["ends"]))
        candidates = [_candidate(prompt_ids, example["target"], example["target_ids"], TARGET)]
        seen = {target}
        for row in negatives[example["example_id"]]:
            place, ended = f"{row['strategy']}:{row['sample_index']}", row["finish_reason"] == "stop"
            ids = tuple(without_end(row["token_ids"], ended))
            if drop_duplicates and ids in seen:
                reason = COPY if ids == target else DUPLICATE
                dropped.append(_dropped(place, row["example_id"], reason, row["text"]))
                continue
            seen.add(ids)
            token_ids = row["token_ids"]
            if ended and example["ends"]:
                token_ids = [*ids, example["target_ids"][-1]]
            candidate = _candidate(prompt_ids, row["text"], token_ids, row["strategy"])
            candidates.append({**candidate, SOURCE: place})
        kept.append(candidates)
    return kept, dropped


def _candidate(prompt_ids: list[int], text: str, token_ids: list[int], strategy: str) -> dict[str, Any]:
    identity = candidate_id(prompt_ids, token_ids)
    return {"candidate_id": identity, "text": text, "token_ids": token_ids, "strategy": strategy,
            "similarity": None, "truncated": None, "rank": None}  # fmt: skip


def _dropped(source: str, example_id: str, reason: str, text: str) -> dict[str, Any]:
    """Return a row of the REJECTED schema."""
    return {"source": source, "example_id": example_id, "reason": reason, "detail": text[:200]}


def checked_scores(
    score: ScoreGroups, examples: Sequence[dict[str, Any]], groups: Sequence[list[dict[str, Any]]], key: str
) -> Sequence[Scores]:
    """Return the scores of the candidates of groups; `key` names the scorer in the recipe, for messages.

    Raises:
        InputError: the scorer did not return one finite number for each candidate, or flags of another number of texts.
    """
    asked = [
        Group(
            example["example_id"],
            example["prompt"],
            Conversation.of_example(example),
            [candidate["text"] for candidate in group],
        )
        for example, group in zip(examples, groups, strict=True)
    ]
    scores = score(asked)
    if len(scores) != len(groups):
        raise InputError(f"{key}: the scorer returned {len(scores)} Scores for {len(groups)} groups; correct it")
    for group, of_group in zip(groups, scores, strict=True):
        if len(of_group.similarity) != len(group) or not np.isfinite(of_group.similarity).all():
            raise InputError(f"{key}: the scorer must give one finite number for each text of a group; correct it")
        if of_group.truncated is not None and len(of_group.truncated) != len(group):
            raise InputError(f"{key}: the scorer must set `truncated` for each text of a group or not at all")
    return scores


def add_ranks(groups: Sequence[list[dict[str, Any]]], scores: Sequence[Scores]) -> None:
    """Set `similarity`, `truncated` and `rank` in place: target first, then by falling score, ties by candidate id."""
    for group, of_group in zip(groups, scores, strict=True):
        for place, candidate in enumerate(group):
            candidate["similarity"] = float(of_group.similarity[place])
            if of_group.truncated is not None:
                candidate["truncated"] = bool(of_group.truncated[place])
        negatives = sorted(group[1:], key=lambda candidate: (-candidate["similarity"], candidate["candidate_id"]))
        for position, candidate in enumerate([group[0], *negatives]):
            candidate["rank"] = position


def unrecorded(rows: Sequence[dict[str, Any]], dropped: Rows) -> list[dict[str, Any]]:
    """Return the rows that are not in `dropped`; a run that was killed may have recorded some without their groups."""
    recorded = dropped.contains(pa.Table.from_pylist(list(rows), schema=dropped.schema))
    return [row for row, is_there in zip(rows, recorded, strict=True) if not is_there]


def dropped_reasons(dropped: Rows, example_ids: Sequence[str]) -> Counter[str]:
    """Count the dropped negatives of these examples by reason."""
    reasons: Counter[str] = Counter()
    for table in dropped.batches(example_ids, columns=["reason"]):
        reasons.update(table["reason"].to_pylist())
    return reasons
