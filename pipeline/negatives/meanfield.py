"""Mean-field negatives (MN): the target with some tokens drawn again from the model, given the true ones before (§3).

Shapes: L tokens of the target without its end token, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cpo_pipe.data.executor import Made, Make
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.missing import SAMPLE_INDICES
from cpo_pipe.pipeline.negatives.rows import negative

if TYPE_CHECKING:  # torch is imported only when there is something to make
    from torch import Tensor
    from transformers import PreTrainedModel

STRATEGY = "meanfield"
LOGITS = 1 << 27
"""Logits in memory at once."""


def meanfield_spec(rendering: Spec, generator: str, share: float, stop_ids: Sequence[int], seed: int) -> Spec:
    """The model's distribution, which tokens it may not draw, how many are drawn, and the seed."""
    return {"strategy": STRATEGY, "prompt": rendering, "generator": generator, "share": share,
            "stop_ids": sorted(stop_ids), "seed": seed}  # fmt: skip


def target_logits(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> "list[Tensor]":
    """For each target the logits of its positions, each given the true tokens before it: (L, V), float32, on the CPU.

    One teacher-forced forward pass over right-padded rows.
    """
    import torch

    rows = [[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    return [
        logits[number, len(prompt) - 1 : len(prompt) - 1 + len(target)].float().cpu()
        for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
    ]


def redraw(target: Sequence[int], logits_LV: "Tensor", share: float, stop_ids: Sequence[int], seed: int) -> list[int]:
    """One sample: `share` of the positions (one at least), each with one draw from the full softmax without end tokens.

    A draw may be the token that was there; a sample that changed nothing is dropped by rank as a copy of the target.
    """
    rng = np.random.default_rng(seed)
    count = max(1, round(share * len(target)))
    places = np.sort(rng.choice(len(target), size=count, replace=False))
    chances = logits_LV[places].double()
    chances[:, list(stop_ids)] = -np.inf
    cumulative = chances.softmax(-1).cumsum(-1).numpy()
    drawn = list(target)
    for place, row, uniform in zip(places, cumulative, rng.random(count), strict=True):
        drawn[place] = int(np.searchsorted(row, uniform * row[-1], side="right"))
    return drawn


@dataclass(frozen=True)
class Redrawn:
    """Work that draws tokens of the targets of examples again."""

    rows: Rows
    model: Model
    tokenizer: TokenizerFiles
    stop_ids: Sequence[int]
    share: float
    seed: int
    at_once: bool = False

    @property
    def outputs(self) -> list[Rows]:
        """The negatives."""
        return [self.rows]

    def open(self) -> Make:
        """Load the model and the tokenizer."""
        import torch

        network: PreTrainedModel = self.model.load(torch.float32).train(False)
        network.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        tokenizer = self.tokenizer.load()
        engine = f"transformers {version('transformers')}, float32"

        def negatives_of(example: dict[str, Any], whole: list[int], logits_LV: "Tensor | None") -> Iterator[Any]:
            first_seed = row_seed(self.seed, example["example_id"])
            for k in example[SAMPLE_INDICES]:
                ids: list[int] = []  # of an empty target
                if logits_LV is not None:
                    ids = redraw(whole, logits_LV, self.share, self.stop_ids, first_seed + k)
                yield negative(
                    example,
                    k,
                    first_seed + k,
                    strategy=STRATEGY,
                    text=str(tokenizer.decode(ids, skip_special_tokens=True)),
                    token_ids=[*ids, *example["target_ids"][len(whole) :]],
                    ends=example["ends"],
                    generator=self.model.fingerprint,
                    engine=engine,
                )

        def make(batch: pa.Table) -> Iterator[Made]:
            examples = batch.to_pylist()
            wholes = [e["target_ids"][:-1] if e["ends"] else e["target_ids"] for e in examples]
            for numbers in _passes([len(e["prompt_ids"]) + len(e["target_ids"]) for e in examples], network):
                full = [number for number in numbers if wholes[number]]
                prompts, targets = [examples[n]["prompt_ids"] for n in full], [wholes[n] for n in full]
                logits = dict(zip(full, target_logits(network, prompts, targets), strict=True)) if full else {}
                rows = [row for n in numbers for row in negatives_of(examples[n], wholes[n], logits.get(n))]
                yield Made([rows], len(rows))

        return make


def _passes(lengths: Sequence[int], model: "PreTrainedModel") -> list[list[int]]:
    """Rows (by their numbers, like lengths side by side) whose logits fit into memory together."""
    budget = max(LOGITS // model.config.get_text_config().vocab_size, 1)
    plan: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if plan and lengths[row] * (len(plan[-1]) + 1) <= budget:
            plan[-1].append(row)
        else:
            plan.append([row])
    return plan
