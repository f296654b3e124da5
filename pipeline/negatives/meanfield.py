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

from cpo_pipe.data.batching import batches_by_length
from cpo_pipe.data.config import Location
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.models.end_tokens import end_tokens, without_end
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job, Strategy, negative
from cpo_pipe.pipeline.samples import SAMPLE_INDICES
from cpo_pipe.trainer.scoring.group_table import Lengths, targets
from cpo_pipe.trainer.scoring.probes import Probes, select_probes

if TYPE_CHECKING:  # torch is imported only when there is something to make
    from torch import Tensor

    from cpo_pipe.trainer.scoring.attention import AttentionBackend

LOGITS = 1 << 27
"""The most logits in memory at a time."""
BACKENDS: "tuple[AttentionBackend, ...]" = ("padded", "plain")
"""The attention backends that may be used: those whose logits come from the model's own forward pass."""


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
        groups = targets(inputs.selection)
        context, longest = model.context(), int(Lengths.of(groups).longest_G().max())
        if context is not None and longest > context:
            raise InputError(
                f"{inputs.key}.model: the longest prompt and target together have {longest} tokens, but the context of "
                f"{model.name} is {context} tokens; lower data.max_prompt_tokens and data.max_target_tokens (of cut "
                "text data.chunk_tokens), or name a model with a longer context"
            )
        ends = end_tokens(model.path, tokenizer, inputs.examples.end_tokens)
        spec: Spec = {"strategy": self.kind, "prompt": inputs.examples.rendering, "generator": model.fingerprint,
                      "share": self.corruption_rate, "stop_ids": sorted(ends), "seed": inputs.seed}  # fmt: skip
        rows = inputs.rows(spec)
        probes = select_probes(groups)
        work = MeanFieldWork(rows, model, tokenizer, ends, self.corruption_rate, inputs.seed, probes)
        return Job(inputs.source(rows, self.count), work)

    @property
    def origin(self) -> str:
        """The target and the model."""
        return f"The ground truth, partly redrawn by {self.model}"

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


def redraw(target: Sequence[int], logits_LV: "Tensor", share: float, stop_ids: Sequence[int], seed: int) -> list[int]:
    """Redraw `share` of the positions (at least one), each from the full softmax without end tokens.

    A draw may be the original token; rank drops a sample without changes as a copy of the target.
    """
    if not target:
        return []
    import torch

    from cpo_pipe.trainer.scoring.head import draw

    rng = np.random.default_rng(seed)
    count = max(1, round(share * len(target)))
    places = np.sort(rng.choice(len(target), size=count, replace=False))
    chances = logits_LV[places].cpu().double()
    chances[:, list(stop_ids)] = -torch.inf
    drawn = list(target)
    for place, (token,) in zip(places, draw(chances, torch.from_numpy(rng.random((count, 1)))).tolist(), strict=True):
        drawn[place] = token
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
    probes: Probes
    """Probes of all targets, so that every process chooses the same attention backend."""

    def open(self) -> Make:
        """Load the model and the tokenizer."""
        from cpo_pipe.trainer.scoring.logprobs import load_scorer

        scorer = load_scorer(self.model, "float32", self.probes, BACKENDS)
        budget = LOGITS // scorer.model.config.get_text_config().vocab_size
        tokenizer = self.tokenizer.load()
        engine = f"transformers {version('transformers')}, float32"

        def negatives_of(example: dict[str, Any], whole: list[int], logits_LV: "Tensor") -> Iterator[dict[str, Any]]:
            first_seed = row_seed(self.seed, example["example_id"])
            for k in example[SAMPLE_INDICES]:
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
            lengths = np.array([len(e["prompt_ids"]) + len(e["target_ids"]) for e in examples])
            for numbers in batches_by_length(lengths, budget):
                chosen = [examples[number] for number in numbers]
                wholes = [without_end(e["target_ids"], e["ends"]) for e in chosen]
                # A target may be its end token alone, which is not redrawn.
                groups = [(e["prompt_ids"], [ids or e["target_ids"]]) for e, ids in zip(chosen, wholes, strict=True)]
                logits = scorer.logits(scorer.pack(groups))
                rows = [row for each in zip(chosen, wholes, logits, strict=True) for row in negatives_of(*each)]
                yield NewRows([rows], len(rows))

        return make
