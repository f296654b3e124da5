"""Work that requests samples from an API and makes rows of its answers."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.answers import AnswerEncoder, end_token
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.control_tokens import finder, special_tokens
from cpo_pipe.data.models.end_tokens import without_end
from cpo_pipe.data.models.templates import eos_token_id
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.api.answers import Answer, Choice, Failed, Refused
from cpo_pipe.pipeline.api.client import ApiClient, Question, ask_all
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.engines.base import Request, Sampling
from cpo_pipe.pipeline.samples import refused_source, requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiWork(Work):
    """Work that requests continuations from an API model.

    With `server: vllm` one request covers all samples of an example: vLLM samples the k-th with the seed plus k, like
    the local engine. Other servers do not document how a seed applies to several samples, so each sample is a request
    of its own and does not depend on how many others there are.
    """

    rows: Rows
    refused: Rows
    """Samples that the API will never return (REJECTED schema)."""
    api: ApiModel
    sampling: Sampling
    seed: int
    tokenizer: TokenizerFiles
    """Of the examples."""
    rendering: Spec
    """Of the examples."""
    message: Callable[[Mapping[str, Any]], Question]
    """From an example (EXAMPLES schema) to the messages of a chat; completions continue `rendered`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns with the same value in all rows."""
    flush_each: ClassVar[bool] = True

    def open(self) -> Make:
        """Check the client and the key, and load the tokenizer.

        Raises:
            InputError: the extra `openai` is not installed, or the environment variable that the recipe names is not
                set or invalid.
        """
        self.api.check_client()
        top_k, told = self.sampling.top_k, self.api.ledger.unused_top_k
        if top_k and not self.api.obeyed(self.sampling).top_k and top_k not in told:
            told.add(top_k)
            log.info("apis.%s: top_k %d is not used; only server: vllm takes it", self.api.name, top_k)
        return _RowMaker(self)


def prompt_of(example: Mapping[str, Any]) -> Question:
    """Return the example's prompt, as the message of a chat, or its messages."""
    return str(example["prompt"]) if example["messages"] is None else Conversation.of_example(example).messages


@dataclass(frozen=True)
class _Request:
    """Samples of one example, in one request."""

    example: Mapping[str, Any]
    first: int
    """Sample index."""
    request: Request


class _RowMaker:
    """Makes the rows of a batch."""

    def __init__(self, work: ApiWork):
        self._work, self._config = work, work.api.config
        self._tokenizer: PreTrainedTokenizerBase = work.tokenizer.load()
        self._eos = eos_token_id(self._tokenizer)
        self._encoder = AnswerEncoder(self._tokenizer, work.rendering)
        self._by_ids = self._config.server == "vllm" and self._config.endpoint == "completions"
        self._is_control, self._control = finder(special_tokens(self._tokenizer)), 0

    def __call__(self, batch: pa.Table) -> Iterator[NewRows]:
        api = self._work.api
        try:
            for outcomes in ask_all(api, self._requests(batch), self._ask):
                yield self._new_rows(outcomes)
        finally:
            if self._control:
                log.warning("apis.%s: %d answers have special tokens in their text; they are text", api.name,
                            self._control)  # fmt: skip
                self._control = 0

    def _requests(self, batch: pa.Table) -> Iterator[_Request]:
        examples = {example["example_id"]: example for example in batch.to_pylist()}
        for example_id, first, request in requests(batch, self._work.seed):
            each = request.n if self._config.server == "vllm" else 1
            for k in range(0, request.n, each):
                yield _Request(examples[example_id], first + k, Request(request.prompt_ids, each, request.seed + k))

    async def _ask(self, client: ApiClient, item: _Request) -> tuple[_Request, Answer | Refused | Failed]:
        request, example = item.request, item.example
        parameters = {"max_tokens": self._work.sampling.max_new_tokens, "n": request.n, **self._parameters(item)}
        try:
            if self._by_ids:
                return item, await client.complete(request.prompt_ids, **parameters)
            completed = self._config.endpoint == "completions"
            if not completed and example["messages"] is not None and json.loads(example["messages"])["tools"]:
                return item, Refused("tools", "the example has tools, which are not sent to an API")
            question = example["rendered"] if completed else self._work.message(example)
            return item, await client.say(question, **parameters)
        except (Refused, Failed) as why:
            return item, why

    def _parameters(self, item: _Request) -> dict[str, Any]:
        sampling, request = self._work.sampling, item.request
        parameters: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.temperature:
            parameters["seed"] = self._seed(request.seed)
        if self._config.server == "vllm":
            parameters |= {**self._work.api.neutral(), "top_k": sampling.top_k, "top_p": sampling.top_p}
        elif sampling.top_p < 1:
            parameters["top_p"] = sampling.top_p
        if self._by_ids:
            end = end_token(item.example, self._eos)
            parameters |= {"return_token_ids": True, "stop_token_ids": [end], "logprobs": 0}
        return parameters

    def _seed(self, seed: int) -> int:
        """Return the seed to send: some servers round those above 2^53, which would make neighbours equal."""
        return seed if self._config.server == "vllm" else seed % (1 << 31)

    def _new_rows(self, outcomes: Sequence[tuple[_Request, Answer | Refused | Failed]]) -> NewRows:
        rows: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        for item, outcome in outcomes:
            if isinstance(outcome, Failed):
                continue
            for k in range(item.request.n):
                result = outcome if isinstance(outcome, Refused) else self._row(item, k, outcome)
                if isinstance(result, Refused):
                    refused.append({
                        "source": refused_source(item.first + k), "example_id": item.example["example_id"],
                        "reason": result.reason, "detail": result.detail,
                    })  # fmt: skip
                else:
                    rows.append(result)
        return NewRows([refused, rows], len(rows) + len(refused))

    def _row(self, item: _Request, k: int, answer: Answer) -> dict[str, Any] | Refused:
        """Return the row of sample k of an answer (NEGATIVES schema), or the reason why it is refused."""
        choice = answer.choices[k]
        if choice.refusal is not None:
            return choice.refusal
        text, token_ids, ends = self._written(choice, item.example)
        if not token_ids:
            return Refused("empty", "the limit of tokens was reached before any text was written")
        behind = f", {answer.system_fingerprint}" if answer.system_fingerprint else ""
        return {
            **self._work.columns,
            "example_id": item.example["example_id"],
            "sample_index": item.first + k,
            "text": text,
            "token_ids": token_ids,
            "finish_reason": "stop" if ends else "length",
            "logprob": _logprob(choice.logprobs) if self._by_ids else None,
            "seed": self._seed(item.request.seed) + k,
            "engine": f"API, {answer.model or self._config.model}{behind}",
        }

    def _written(self, choice: Choice, example: Mapping[str, Any]) -> tuple[str, list[int], bool]:
        """Return the text, its token ids, and whether it ends there.

        A chat model's text does not continue the prompt directly: leading white space is replaced by the target's, and
        trailing white space is removed. A completion is kept unchanged.
        """
        ends = not choice.cut
        if self._by_ids:
            return self._decoded(choice), choice.token_ids or [], ends
        text = choice.written or ""
        if self._config.endpoint == "chat":
            target, text = example["target"], text.strip()
            text = target[: len(target) - len(target.lstrip())] + text if text else ""
        (answer,) = self._encoder.encode([example], [text], self._work.sampling.max_new_tokens, [ends])
        self._control += self._is_control(answer.text)
        return answer.text, answer.token_ids, answer.ends

    def _decoded(self, choice: Choice) -> str:
        """Return the text of a choice's token ids.

        Raises:
            InputError: the server gives no token ids, or they are not those of the examples' tokenizer.
        """
        ids, api = choice.token_ids, f"apis.{self._work.api.name}"
        if ids is None:
            raise InputError(f"{api}.server is vllm, but the server gives no token ids; set it to openai")
        written = str(self._tokenizer.decode(without_end(ids, not choice.cut), skip_special_tokens=True))
        if _bare(written) != _bare(choice.text or ""):
            raise InputError(
                f"{api}: the server's tokenizer is not that of the examples; serve a model that has it, or set "
                f"{api}.endpoint to chat, or {api}.server to openai"
            )
        return written


def _bare(text: str) -> str:
    """Remove what may differ between two decodings of the same tokens: spaces and broken characters."""
    return re.sub(r"[\s\ufffd]", "", text)


def _logprob(logprobs: Any) -> float | None:
    """Return the summed log-prob of a completion's tokens, in nats; None where the server does not report it."""
    each = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return float(sum(each)) if each and None not in each else None
