"""Mean-field negatives (MN): the target with some tokens redrawn by a model, given the true tokens before them (§3).

Shapes: L tokens of the target without its end token, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job, Strategy, negative
from cpo_pipe.pipeline.samples import SAMPLE_INDICES

if TYPE_CHECKING:  # torch is imported only when there is something to make
    from torch import Tensor
    from transformers import PreTrainedModel

LOGITS = 1 << 27
"""Most logits in memory at once."""


class MeanField(Strategy):
    """The target with some tokens redrawn by a model, each given the true tokens before it."""

    kind: ClassVar[str] = "meanfield"

    model: Location = Field(
        description="the model that redraws the tokens: a training's name, a folder or a hub name; in a later "
        "iteration the model of the iteration before"
    )
    corruption_rate: float = Field(0.15, gt=0, le=1, description="share of the target's tokens that are redrawn")

    def plan(self, inputs: Inputs) -> Job:
        """Plan the draws."""
        model, tokenizer = inputs.find(self.model), inputs.examples.tokenizer
        assert isinstance(model, Model)
        ends = end_tokens(model.path, tokenizer, inputs.examples.end_tokens)
        spec = meanfield_spec(inputs.examples.rendering, model.fingerprint, self.corruption_rate, ends, inputs.seed)
        rows = inputs.rows(spec)
        work = MeanFieldWork(rows, model, tokenizer, ends, self.corruption_rate, inputs.seed)
        return Job(inputs.source(rows, self.count), work)

    @property
    def origin(self) -> str:
        """The target and the model."""
        return f"the ground truth, partly redrawn by {self.model}"

    def models(self) -> list[str]:
        """Return the model."""
        return [self.model]

    def check_apis(self, apis: Mapping[str, Api]) -> None:
        """Refuse an API."""
        if self.model in apis:
            raise ValueError(f"model {self.model} is an API, which returns no distributions; name a model with weights")

    def with_generator(self, model: str) -> Self:
        """Return the strategy with another model."""
        return self.model_copy(update={"model": model})


def meanfield_spec(rendering: Spec, generator: str, share: float, stop_ids: Sequence[int], seed: int) -> Spec:
    """Return the identity of the draws: model, tokens that it may not draw, share of tokens drawn, and seed."""
    return {"strategy": MeanField.kind, "prompt": rendering, "generator": generator, "share": share,
            "stop_ids": sorted(stop_ids), "seed": seed}  # fmt: skip


def target_logits(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> "list[Tensor]":
    """Return each target's logits, given the true tokens before each position: (L, V), float32, on the CPU.

    Computes one teacher-forced forward pass over right-padded rows.
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
    """Redraw `share` of the positions (at least one), each from the full softmax without end tokens.

    A draw may be the original token; rank drops a sample without changes as a copy of the target.
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
class MeanFieldWork(Work):
    """Work that redraws tokens of the examples' targets."""

    rows: Rows
    model: Model
    tokenizer: TokenizerFiles
    stop_ids: Sequence[int]
    share: float
    seed: int

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
                    strategy=MeanField.kind,
                    text=str(tokenizer.decode(ids, skip_special_tokens=True)),
                    token_ids=[*ids, *example["target_ids"][len(whole) :]],
                    ends=example["ends"],
                    generator=self.model.fingerprint,
                    engine=engine,
                )

        def make(batch: pa.Table) -> Iterator[NewRows]:
            examples = batch.to_pylist()
            wholes = [e["target_ids"][:-1] if e["ends"] else e["target_ids"] for e in examples]
            for numbers in _passes([len(e["prompt_ids"]) + len(e["target_ids"]) for e in examples], network):
                full = [number for number in numbers if wholes[number]]
                prompts, targets = [examples[n]["prompt_ids"] for n in full], [wholes[n] for n in full]
                logits = dict(zip(full, target_logits(network, prompts, targets), strict=True)) if full else {}
                rows = [row for n in numbers for row in negatives_of(examples[n], wholes[n], logits.get(n))]
                yield NewRows([rows], len(rows))

        return make


def _passes(lengths: Sequence[int], model: "PreTrainedModel") -> list[list[int]]:
    """Return batches of rows, by their numbers, of similar length, whose logits fit into memory together."""
    budget = max(LOGITS // model.config.get_text_config().vocab_size, 1)
    plan: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if plan and lengths[row] * (len(plan[-1]) + 1) <= budget:
            plan[-1].append(row)
        else:
            plan.append([row])
    return plan
