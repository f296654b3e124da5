"""Print which attention backend is numerically equivalent for which architecture: `just exactness`.

Errors are the largest of any token's log-prob, relative to the largest log-prob, and the norm of the gradient's error,
relative to the gradient's norm, against a loop over single sequences in float32. The group has a prompt of 20 tokens
and 12 candidates of up to 18, among them cuts of the target, EOS alone, one token, an exact double and a late fork.
"""

import warnings
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from cpo_pipe.data.errors import InputError
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.scoring.self_check import BACKENDS, choose_backend
from tests.support.architectures import ARCHITECTURES, make
from tests.support.scoring import GROUPS, PROBES, gradients, naive, ours

Measured = tuple[Tensor, Tensor]
"""Log-probs of all tokens, and the gradient, each in one row."""


def measure(model: transformers.PreTrainedModel, tokens: Sequence[Tensor]) -> Measured:
    """What `tokens` are, and the gradient of their sum with weights."""
    found = gradients(model, tokens)
    return torch.cat(list(tokens)).detach(), torch.cat([found[name].flatten() for name in sorted(found)])


def errors(one: Measured, other: Measured) -> str:
    """Of `one`, as a cell of the table."""
    logprob = (one[0] - other[0]).abs().max() / other[0].abs().max()
    gradient = (one[1] - other[1]).norm() / other[1].norm()
    return f"{logprob:.0e} / {gradient:.0e}"


def row(name: str) -> str:
    """One architecture."""
    model = make(name)
    truth = measure(model, naive(model, GROUPS[0]))
    with torch.autocast("cpu", torch.bfloat16):
        rough = measure(model, naive(model, GROUPS[0]))
    scorer = Scorer(model)
    choice = choose_backend(name, scorer, PROBES)
    cells = []
    for attention in BACKENDS["cpu"][:-1]:
        try:
            choose_backend(name, scorer, PROBES, attention)
            cells.append(errors(measure(model, ours(scorer, GROUPS[0])), truth))
        except InputError as refusal:
            reason = str(refusal).split("this model: ")[1].removesuffix("; use auto")
            cells.append("an error of transformers" if "Error: " in reason else reason)
    scorer.set_attention(choice.attention)
    scorer.dtype = "bfloat16"
    cells += [errors(measure(model, ours(scorer, GROUPS[0])), truth), errors(rough, truth)]
    return f"| {name} | **{choice.attention}** | {' | '.join(cells)} |"


def main() -> None:
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    print("| architecture | auto takes | cascade | split | dense | padded | bfloat16, as auto computes it "
          "| bfloat16, as transformers does |\n|" + " --- |" * 8)  # fmt: skip
    for name in ARCHITECTURES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
