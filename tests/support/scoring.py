"""Log-probs and gradients of groups, by the scorer and by a loop over single sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cpo_pipe.trainer.scoring.probes import select_probes
from cpo_pipe.trainer.scoring.scorer import Scorer
from tests.support.architectures import group, table

TokenGroup = tuple[list[int], list[list[int]]]

GROUPS = [group(20, 8, 18), group(28, 4, 9, seed=1), group(1, 3, 5, seed=2)]
PROBES = select_probes(table(GROUPS))


def naive(model: PreTrainedModel, texts: TokenGroup) -> list[Tensor]:
    """Log-probs of each candidate's tokens, one sequence at a time."""
    prompt, candidates = texts
    found = []
    for candidate in candidates:
        logits = model(torch.tensor([prompt + candidate]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1)[torch.arange(len(candidate)), torch.tensor(candidate)])
    return found


def gradients(model: PreTrainedModel, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a sum whose terms have weights of their own."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    total = torch.stack([(values * torch.randn(values.shape, generator=generator)).sum() for values in tokens]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(scorer: Scorer, texts: TokenGroup) -> list[Tensor]:
    packed = scorer.pack([texts])
    rows = packed.per_token(scorer(packed))
    return [row[: len(candidate)] for row, candidate in zip(rows, texts[1], strict=True)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    one, other = torch.cat(list(found)), torch.cat(list(expected))
    assert float((one - other).detach().abs().max() / other.detach().abs().max()) < tolerance
