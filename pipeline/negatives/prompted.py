"""Negatives that an API model writes on request, given the prompt and the target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator

from cpo_pipe.data.models.templates import fill
from cpo_pipe.data.text import listed, nearest, one_line
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.negatives.autoregressive import Sampler, sampled_spec
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job

TEMPLATES = {
    # Word for word the CPO paper's request to GPT-3.5 for DPO's one negative.
    "unhelpful": (
        "Given the ground truth instruction and response, can you generate a not helpful response?\n"
        " Instruction: {prompt}\nResponse: {target}\nNot helpful response:"
    ),
    # CLAIR (D'Oosterlinck et al. 2024) improves a response with as few changes as possible, so that a pair differs only
    # in what matters. Here the good response exists, so it is made worse.
    "minimal-edit": (
        "Below are a prompt and a good response to it. Make the response worse: change as few words as you can, so "
        "that it becomes less correct, less clear or less helpful, and keep everything else word for word, with its "
        "length, format and style. The result must still read as an honest attempt.\n\n"
        "Answer with the changed response alone: no introduction, no explanation, no quotation marks around it.\n\n"
        "### Prompt\n{prompt}\n\n### Response\n{target}\n\n### Changed response\n"
    ),
}


class Prompted(Sampler):
    """Continuations that an API model writes on request, given the prompt and the target."""

    kind: ClassVar[str] = "prompted"

    model: str = Field(description="an API of `apis` with the endpoint chat")
    template: str = Field(
        description="`unhelpful` (the paper's, for DPO), `minimal-edit` (the target, made worse by as few changes as "
        "possible; after CLAIR), or a text with {prompt} and {target}"
    )

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template not in TEMPLATES and "{prompt}" not in template:
            raise ValueError("must be unhelpful, minimal-edit or a text with {prompt} and {target}")
        return template

    def plan(self, inputs: Inputs) -> Job:
        """Plan the API's answers to the template's message about each example."""
        api, message = inputs.find(self.model), Message(self.template)
        assert isinstance(api, ApiModel)
        sampling = api.obeyed(self.sampling(inputs))
        # The template's text, not its name, so that a changed wording invalidates the negatives.
        spec = sampled_spec(
            inputs.examples.rendering, api.spec(), sampling, inputs.seed, self.kind, template=message.text
        )
        return self.plan_api(inputs, api, message, spec)

    @property
    def origin(self) -> str:
        """Model and template."""
        return f"Asked of {self.model} ({one_line(self.template, 100)})"

    def models(self) -> list[str]:
        """Return the API."""
        return [self.model]

    def check_apis(self, apis: Mapping[str, Api]) -> None:
        """Refuse a model that is not an API with the endpoint chat."""
        if self.model not in apis:
            hint = nearest(self.model, apis) or f"there are {listed(apis)}"
            raise ValueError(f"model {self.model!r} is not among `apis`; {hint}")
        if apis[self.model].endpoint != "chat":
            raise ValueError(f"model {self.model} must be an API with the endpoint chat")


@dataclass(frozen=True)
class Message:
    """Fills in a template from an example."""

    template: str
    """A name in TEMPLATES, or a text with {prompt} and perhaps {target}."""

    @property
    def text(self) -> str:
        """The template itself."""
        return TEMPLATES.get(self.template, self.template)

    def __call__(self, example: Mapping[str, Any]) -> str:
        """Return the message for an example (EXAMPLES schema), with its prompt as in the source."""
        return fill(self.text, prompt=example["prompt"], target=example["target"])
