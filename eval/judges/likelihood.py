"""The judge `likelihood`: which output has the higher log-probability under a model."""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, tokenizer_in
from cpo_pipe.data.store import Store
from cpo_pipe.eval.judges.base import NOISE, Case, JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric
from cpo_pipe.eval.judges.logprobs import Continuations, continuation_logprobs

RULES = 2
"""Version of the scores. Raise it when the same texts get another score."""


class Likelihood(JudgeConfig):
    """Prefer the output with the higher mean log-probability under a model."""

    model: Location = Field(
        description="the model: a training's name, a folder or a hub name, with a tokenizer of its own"
    )

    def models(self) -> list[str]:
        """Return the model."""
        return [self.model]

    def score_metric(self, name: str) -> ScoreMetric:
        """Return the mean log-probability."""
        return ScoreMetric(f"{name} log-prob", "mean log-probability of an output's tokens and of its end, nats per "
                           "token; higher is more likely")  # fmt: skip

    def open(self, name: str, dependencies: JudgeDependencies) -> "LikelihoodJudge":
        """Return the judge."""
        model, store, template = dependencies.models[self.model], dependencies.store, dependencies.template
        tokenizer = tokenizer_in(model.path, store)
        date = chat_date(tokenizer, store) if template == templates.CHAT else None
        executor, metric = dependencies.executor, self.score_metric(name)
        return LikelihoodJudge(name, metric, model, tokenizer, template, store, executor, date)


class LikelihoodJudge(ScoreJudge):
    """Score the mean log-probability of an output's tokens and of its end.

    The end counts, so that an empty output has a score as well; its probability is that of any end token of the model.
    Control tokens in an output or a prompt are encoded as text, in a prompt broken by a space, unless the template
    itself writes control tokens: then those in the rendered prompt are meant.
    """

    noise = NOISE

    def __init__(
        self,
        name: str,
        metric: ScoreMetric,
        model: Model,
        tokenizer: TokenizerFiles,
        template: str,
        store: Store,
        executor: Executor,
        chat_date: str | None = None,
    ):
        """`tokenizer` is the model's own; with the `template` chat its chat template renders the prompts."""
        super().__init__(name, metric)
        self._chat_date = chat_date if template == templates.CHAT else None
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._store, self._executor = store, executor

    def spec(self) -> Spec:
        """Return everything that decides a verdict."""
        ends = self._ends()
        return {"judge": "likelihood", "model": self._model.fingerprint, "tokenizer": self._tokenizer.fingerprint,
                "template": self._template, "rules": RULES,
                **({"end_tokens": list(ends)} if len(ends) > 1 else {}),
                **({"chat_date": self._chat_date} if self._chat_date else {})}  # fmt: skip

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return the mean log-probability of each output's tokens, its end included, in nats.

        Raises:
            InputError: the model's context is too short for a prompt and its output, or its tokenizer has no chat
                template.
        """
        tokenizer, where = self._tokenizer.load(), f"evaluate.judges.{self.name}.model"
        ends = self._ends() or (templates.eos_token_id(tokenizer, where),)
        asked = [Conversation.of_example({"prompt": case.prompt, "messages": case.messages}) for case in cases]
        rendered = [case.rendered for case in cases]
        prompts = templates.encode_prompts_again(self._template, asked, rendered, tokenizer, self._chat_date)
        if empty := next((case for case, ids in zip(cases, prompts, strict=True) if not ids), None):
            raise InputError(
                f"{where} {self._model.name}: its chat template cannot render the messages of example "
                f"{empty.example_id}; name another model"
            )
        encoded = templates.encode_as_text(outputs, tokenizer)
        longest = max((len(x) + len(y) + 1 for x, y in zip(prompts, encoded, strict=True)), default=0)
        context = self._model.context()
        if context is not None and longest > context:
            raise InputError(
                f"{where} {self._model.name}: its context is {context} tokens, but the longest prompt and output "
                f"together have {longest}; name a model with a longer context, or lower evaluate.max_new_tokens"
            )
        requests = [
            Continuations(case.example_id, prompt, [[*ids, end] for end in ends])
            for case, prompt, ids in zip(cases, prompts, encoded, strict=True)
        ]
        sums = continuation_logprobs(self._store, self._executor, self._model, requests)
        return [float(np.logaddexp.reduce(each)) / (len(ids) + 1) for each, ids in zip(sums, encoded, strict=True)]

    def _ends(self) -> tuple[int, ...]:
        return end_tokens(self._model.path, self._tokenizer)
