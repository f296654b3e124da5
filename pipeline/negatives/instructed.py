"""Negatives that an API model is asked for, given the prompt and the target."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.engines.openai import ApiModel

STRATEGY = "instructed"

TEMPLATES = {
    # As the CPO paper asks GPT-3.5 for DPO's one negative, to the letter.
    "unhelpful": (
        "Given the ground truth instruction and response, can you generate a not helpful response?\n"
        " Instruction: {prompt}\nResponse: {target}\nNot helpful response:"
    ),
    # CLAIR (D'Oosterlinck et al. 2024) has a response made better by as few changes as possible, so that a pair differs
    # in what matters alone; here it is the good response that is there, so it is made worse.
    "minimal-edit": (
        "Below are a prompt and a good response to it. Make the response worse: change as few words as you can, so "
        "that it becomes less correct, less clear or less helpful, and keep everything else word for word, with its "
        "length, format and style. The result must still read as an honest attempt.\n\n"
        "Answer with the changed response alone: no introduction, no explanation, no quotation marks around it.\n\n"
        "### Prompt\n{prompt}\n\n### Response\n{target}\n\n### Changed response\n"
    ),
}


@dataclass(frozen=True)
class Message:
    """Puts an example into a template."""

    template: str
    """A name in TEMPLATES, or a text with {prompt} and perhaps {target}."""

    @property
    def text(self) -> str:
        """The template itself."""
        return TEMPLATES.get(self.template, self.template)

    def __call__(self, example: Mapping[str, Any]) -> str:
        """The message for an example (EXAMPLES schema), with its prompt as the source has it."""
        # One pass, and not str.format: braces in the template's or the example's own text are only text.
        return re.sub(r"\{(prompt|target)\}", lambda place: str(example[place[1]]), self.text)


def instructed_spec(rendering: Spec, api: ApiModel, message: Message, sampling: Sampling, seed: int) -> Spec:
    """Whom one asks, what, and how; the template's text, so that another wording makes other negatives."""
    return {
        "strategy": STRATEGY,
        "generator": api.spec(),
        "prompt": rendering,
        "template": message.text,
        "sampling": api.obeyed(sampling).spec(),
        "seed": seed,
    }
