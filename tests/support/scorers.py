"""Groups to score, and examples with their negatives in a store."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from cpo_pipe.data.execution.base import Work
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.negatives.generate import Plan
from cpo_pipe.pipeline.negatives.strategy import Job, Source
from cpo_pipe.pipeline.samples import SampleRequest
from cpo_pipe.pipeline.scorers.correct import DropCorrect
from cpo_pipe.pipeline.scorers.scorer import Group


def group(target: str, *negatives: str, prompt: str = "p", example_id: str = "x") -> Group:
    return Group(example_id, prompt, Conversation.of_text(prompt), [target, *negatives])


def plan(
    store: Store, targets: Mapping[str, str], negatives: Mapping[str, Sequence[str]], correct: DropCorrect | None = None
) -> Plan:
    """A plan whose only source, `samples`, has as many negatives for each example; texts are their own token ids."""
    rows = store.rows("negatives", {"strategy": "autoregressive"})
    made = [_negative(name, k, text) for name, texts in negatives.items() for k, text in enumerate(texts)]
    with rows.writer() as writer:
        writer.add(made)
    examples = [_example(name, target) for name, target in targets.items()]
    (count,) = {len(texts) for texts in negatives.values()}
    source = Source("samples", SampleRequest(rows, count))
    return Plan(pa.Table.from_pylist(examples, schema=EXAMPLES), [Job(source, cast(Work, None))], correct)


def _ids(text: str) -> list[int]:
    return [*text.encode(), 0]


def _example(name: str, target: str) -> dict[str, Any]:
    return {"example_id": name, "split": "train", "prompt": f"prompt {name}", "rendered": f"<{name}>",
            "target": target, "prompt_ids": [5, 6], "target_ids": _ids(target), "ends": True}  # fmt: skip


def _negative(name: str, index: int, text: str) -> dict[str, Any]:
    return {"example_id": name, "sample_index": index, "strategy": "autoregressive", "text": text,
            "token_ids": _ids(text), "finish_reason": "stop", "seed": index}  # fmt: skip
