"""The judge `openai`: a model behind an OpenAI-compatible server is asked which output is better."""

from collections.abc import Iterator, Sequence

from pydantic import Field

from cpo_pipe.data.config import Positive
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import AB, BA, ApiJudge, ApiJudgeConfig, JudgeDependencies, Pair, Verdict, unparseable
from cpo_pipe.eval.judges.query import BothOrders, Query, Template, verdict_of
from cpo_pipe.pipeline.api.client import ApiClient, ask_all
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.api.question import ask


class OpenAi(ApiJudgeConfig):
    """Ask a model behind an OpenAI-compatible API which output is better."""

    template: Template = "strict"
    both_orders: BothOrders = True
    max_tokens: Positive = Field(
        16, description="longest answer, in tokens; a model that reasons before it answers needs thousands"
    )
    temperature: float | None = Field(
        0.0, ge=0, description="sampling temperature; null sends none, for models that do not accept one"
    )

    def open(self, name: str, dependencies: JudgeDependencies) -> "OpenAiJudge":
        """Return the judge."""
        api, query = dependencies.apis[self.api], Query(self.template)
        return OpenAiJudge(name, api, query, self.both_orders, self.max_tokens, self.temperature)


class OpenAiJudge(ApiJudge):
    """Ask for A, B or a tie. Any other answer, or a refusal, counts as a tie."""

    sees_order = True

    def __init__(
        self, name: str, api: ApiModel, query: Query, both_orders: bool, max_tokens: int, temperature: float | None
    ):
        """`max_tokens` is the longest answer; with the temperature None the server uses its own."""
        super().__init__(name, api, max_tokens)
        self._query, self._temperature = query, temperature
        self.orders: Sequence[str] = (AB, BA) if both_orders else (AB,)

    def query(self, pair: Pair) -> str:
        """Return the message that asks for one verdict, output A first."""
        return self._query(pair)

    def spec(self) -> Spec:
        """Return everything that decides a verdict; of the template its text, so that another wording asks again."""
        spec: Spec = {"judge": "openai", "api": self.api.spec(), "template": self._query.text,
                      "max_tokens": self.max_tokens}  # fmt: skip
        return spec if self._temperature == 0 else spec | {"temperature": self._temperature}

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Yield verdicts as they are answered. Failed requests have none; the API's ledger counts them.

        Raises:
            InputError: the client is not installed, or the server rejects the request.
            RunError: a cap is reached, or the server stopped answering.
        """
        for answers in ask_all(self.api, enumerate(pairs), self._ask):
            if found := [(place, verdict) for place, verdict in answers if verdict is not None]:
                yield found

    async def _ask(self, client: ApiClient, asked: tuple[int, Pair]) -> tuple[int, Verdict | None]:
        place, pair = asked
        reply = await ask(client, self.api, self.query(pair), self.max_tokens, self._temperature)
        if reply is None:
            return place, None
        if reply.fault:
            return place, unparseable(reply.fault, **reply.details)
        return place, verdict_of(reply.text, **reply.details)
