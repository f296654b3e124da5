"""The judge `openai`: a model behind any OpenAI-compatible server says which output is the better."""

import logging
from collections.abc import Iterator, Sequence

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import AB, BA, Pair, Verdict, unparseable
from cpo_pipe.eval.judges.query import KEPT, Query, verdict_of
from cpo_pipe.pipeline.engines.openai import ApiClient, ApiModel, Failed, Refused, answers

log = logging.getLogger(__name__)


class OpenAiJudge:
    """Asks for A, B or a tie. An answer that is none of these, or a refusal, counts as a tie."""

    sees_order = True

    def __init__(
        self, name: str, api: ApiModel, query: Query, both_orders: bool, max_tokens: int, temperature: float | None
    ):
        """`max_tokens` is the longest answer; with the temperature None the server takes its own."""
        self.name, self.api, self.query = name, api, query
        self.max_tokens, self._temperature = max_tokens, temperature
        self.orders: Sequence[str] = (AB, BA) if both_orders else (AB,)

    def spec(self) -> Spec:
        """Whom one asks, and what; the template's text, so that another wording makes other verdicts."""
        spec: Spec = {"judge": "openai", "api": self.api.spec(), "template": self.query.text,
                      "max_tokens": self.max_tokens}  # fmt: skip
        return spec if self._temperature == 0 else spec | {"temperature": self._temperature}

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Verdicts as they are answered; requests that failed have none, and the API's ledger counts them.

        Raises:
            InputError: the server's client is not installed, or the server takes no such request.
            RunError: a cap is reached, or the server stopped answering.
        """
        self.api.check_client()
        try:
            for came in answers(self.api, enumerate(pairs), self._ask):
                if found := [(place, verdict) for place, verdict in came if verdict is not None]:
                    yield found
        finally:
            log.info("apis.%s: %s by this command so far", self.api.name, self.api.spent())

    async def _ask(self, client: ApiClient, asked: tuple[int, Pair]) -> tuple[int, Verdict | None]:
        place, pair = asked
        parameters = self.api.neutral()
        if self._temperature is not None:
            parameters["temperature"] = self._temperature
        try:
            answer = await client.say(self.query(pair), self.max_tokens, **parameters)
        except Refused as refused:
            return place, unparseable(refused.reason, detail=refused.detail)
        except Failed:
            return place, None
        (choice,) = answer.choices
        served = answer.model or self.api.config.model
        if choice.refusal is not None:
            return place, unparseable(choice.refusal.reason, detail=choice.refusal.detail[:KEPT], model=served)
        written = choice.written or ""
        if choice.cut and ("think>" in written or (choice.reasoned and not written)):
            return place, unparseable("cut in its thoughts", answer=written[:KEPT], model=served)
        return place, verdict_of(written, model=served)
