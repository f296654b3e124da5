"""The judge `likelihood`: which output another model finds the likelier text after the prompt."""

from collections.abc import Sequence

import numpy as np

from cpo_pipe.data import templates
from cpo_pipe.data.end_tokens import end_tokens
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.eval.judges.base import NOISE, Case
from cpo_pipe.eval.judges.logprobs import Logprobs, Scored, summed
from cpo_pipe.eval.judges.scores import ScoreJudge

RULES = 2
"""Raise when the same texts come to have other log-probs."""


class LikelihoodJudge(ScoreJudge):
    """The output with the higher mean log-prob of its tokens and of its end, under one model.

    The end counts, so that an empty output has a score as well; its probability is that of any token that ends a text.
    Control tokens in an output or a prompt are text to the model, of a prompt broken by a space, unless the template
    itself writes any: then all in what it renders are meant.
    """

    noise = NOISE

    def __init__(
        self,
        name: str,
        model: Model,
        tokenizer: TokenizerFiles,
        template: str,
        logprobs: Logprobs,
        chat_date: str | None = None,
    ):
        """`tokenizer` is the model's own; with the `template` chat its chat template renders the prompts."""
        super().__init__(name, f"{name} log-prob")
        self._chat_date = chat_date if template == templates.CHAT else None
        self._model, self._tokenizer, self._template, self._logprobs = model, tokenizer, template, logprobs

    def spec(self) -> Spec:
        """What decides its verdicts."""
        ends = self._ends()
        return {"judge": "likelihood", "model": self._model.fingerprint, "tokenizer": self._tokenizer.fingerprint,
                "template": self._template, "rules": RULES,
                **({"end_tokens": list(ends)} if len(ends) > 1 else {}),
                **({"chat_date": self._chat_date} if self._chat_date else {})}  # fmt: skip

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Mean log-prob of each output's tokens, its end included, in nats.

        Raises:
            InputError: the model has no room for a prompt and its output, or its tokenizer no chat template.
        """
        tokenizer = self._tokenizer.load()
        ends = self._ends() or (templates.eos_token_id(tokenizer, f"evaluate.judges.{self.name}.model"),)
        texts, rendered = [case.prompt for case in cases], [case.rendered for case in cases]
        prompts = templates.encode_prompts_again(self._template, texts, rendered, tokenizer, self._chat_date)
        written = templates.encode_as_text(outputs, tokenizer)
        self._check_context(max((len(x) + len(y) + 1 for x, y in zip(prompts, written, strict=True)), default=0))
        wanted = [
            Scored(case.example_id, prompt, [[*ids, end] for end in ends])
            for case, prompt, ids in zip(cases, prompts, written, strict=True)
        ]
        sums = summed(self._logprobs, self._model, wanted)
        return [float(np.logaddexp.reduce(each)) / (len(ids) + 1) for each, ids in zip(sums, written, strict=True)]

    def _ends(self) -> tuple[int, ...]:
        return end_tokens(self._model.path, self._tokenizer)

    def _check_context(self, longest: int) -> None:
        context = self._model.context()
        if context is not None and longest > context:
            raise InputError(
                f"evaluate.judges.{self.name}.model {self._model.name}: its context is {context} tokens, but the "
                f"longest prompt and output together have {longest}: name a model with a longer context, or lower "
                "evaluate.max_new_tokens"
            )
