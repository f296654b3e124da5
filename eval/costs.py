"""Estimate the requests to APIs that an evaluation still needs, for systems and for judges, without sending any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.chat import Conversation, content_of
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.text import say
from cpo_pipe.eval.config import GROUND_TRUTH, Evaluate
from cpo_pipe.eval.evaluate import plan_evaluation
from cpo_pipe.eval.generate import SystemModel, read_outputs
from cpo_pipe.eval.judges.base import ApiJudge, Case, Pair
from cpo_pipe.eval.judging import read_cases, unjudged
from cpo_pipe.pipeline.api.model import ApiModel, Tokens

TOKEN_BYTES = 4
"""Bytes of UTF-8 that count as a token: the average of English text with the tokenizers of large models."""

Draft = tuple[Case, str | None, str | None]
"""A case and its two outputs; None for one that is not generated yet."""


@dataclass(frozen=True)
class Cost:
    """Requests to an API that are still to be made."""

    calls: int
    tokens: Tokens
    """Estimated tokens of the prompts, and the maximum of generated tokens."""


def evaluation_costs(
    config: Evaluate,
    store: Store,
    examples: Examples,
    systems: Mapping[str, SystemModel | None],
    *,
    max_new_tokens: int,
    models: Mapping[str, Model],
    apis: Mapping[str, ApiModel],
) -> tuple[list[tuple[str, ApiModel, Cost | None]], dict[tuple[str, str], int]]:
    """Return the cost of the missing API requests, of systems and then of judges; send, generate and load nothing.

    Args:
        config: the recipe's section.
        store: where artifacts are.
        examples: the prepared examples.
        systems: the models, by system; None if a model is not available yet.
        max_new_tokens: longest output, in tokens; a missing output counts as this many.
        models: the models that the settings of API judges name, by name.
        apis: the recipe's `apis`, by name.

    Returns:
        Each role (`judge gpt`; `system gpt, greedy`) with its API and cost, None for a judge that asks an API but is
        no `ApiJudge`, which nothing is known about; and, if judges ask APIs, the number of
        missing outputs by system and decoding.
    """
    asking = {name: judge for name, judge in config.judges.items() if judge.apis()}
    config = config.model_copy(update={"judges": asking, "mauve_seeds": 0, "mauve_model": None, "annotations": None})
    available = {name: model for name, model in systems.items() if model is not None}
    plan = plan_evaluation(
        config,
        store,
        examples,
        available,
        max_new_tokens=max_new_tokens,
        models=models,
        apis=apis,
        executor=LocalExecutor(),
    )
    cases, ids = read_cases(plan.selection), plan.selection["example_id"]
    texts: dict[tuple[str, str], list[str | None]] = {
        (name, decoding): [None] * len(cases) for name in systems for decoding in config.decodings
    }
    texts |= {(GROUND_TRUTH, decoding): [case.target for case in cases] for decoding in config.decodings}
    costs: list[tuple[str, ApiModel, Cost | None]] = []
    counted: dict[str, Cost] = {}

    def add(role: str, api: ApiModel, rows: Rows, cost: Cost) -> None:
        """Add the cost of a role; of requests that several roles share, each counts for the first role only."""
        before = counted.get(rows.name, Cost(0, Tokens()))
        most = Cost(
            max(cost.calls, before.calls),
            Tokens(max(cost.tokens.prompt, before.tokens.prompt), max(cost.tokens.written, before.tokens.written)),
        )
        counted[rows.name] = most
        costs.append((role, api, Cost(most.calls - before.calls, most.tokens - before.tokens)))

    for generation in plan.generations:
        system, decoding = generation.system, generation.decoding
        missing_EN = generation.request.missing(ids)
        found = zip(missing_EN[:, 0], read_outputs(generation.rows, ids.to_pylist()).texts, strict=True)
        texts[system, decoding] = [None if missing else text for missing, text in found]
        if isinstance(api := systems[system], ApiModel):
            cost = outputs_cost(api, plan.selection, missing_EN.sum(axis=1).tolist(), max_new_tokens)
            add(f"system {system}, {decoding}", api, generation.rows, cost)
    drafts = [
        draft
        for system in systems
        for opponent in plan.opponents(system)
        for decoding in config.decodings
        for draft in zip(cases, texts[system, decoding], texts[opponent, decoding], strict=True)
    ]
    for judge in plan.judges:
        if isinstance(judge, ApiJudge):
            rows = store.rows("verdicts", judge.spec())
            add(f"judge {judge.name}", judge.api, rows, judge_cost(judge, drafts, max_new_tokens, rows))
        else:
            costs += [(f"judge {judge.name}", apis[api], None) for api in asking[judge.name].apis()]
    return costs, {key: missing for key, written in texts.items() if asking and (missing := written.count(None))}


def print_costs(
    costs: Sequence[tuple[str, ApiModel, Cost | None]], missing: Mapping[tuple[str, str], int], max_new_tokens: int
) -> None:
    """Print the result of `evaluation_costs`, with prices where the recipe gives them."""
    if not costs:
        say("nothing that this recipe evaluates costs anything")
        return
    for what, api, cost in costs:
        if cost is None:
            say(f"{what} (apis.{api.name}): not estimated; derive the judge from ApiJudge to have it estimated")
            continue
        price = api.price(cost.tokens)
        dollars = f": about {price:.4g} US dollars" if price is not None else ""
        say(
            f"{what} (apis.{api.name}): {cost.calls:,} calls to be made, about "
            f"{cost.tokens.prompt:,} prompt tokens, at most {cost.tokens.written:,} written{dollars}"
        )
    say(f"prompt tokens are estimated: one for every {TOKEN_BYTES} bytes of UTF-8")
    for (name, decoding), count in missing.items():
        say(
            f"{name}, {decoding}: {count:,} outputs are not generated yet; in queries to judges each counts as "
            f"{max_new_tokens} tokens, the longest allowed"
        )


def outputs_cost(api: ApiModel, examples: pa.Table, missing: Sequence[int], max_new_tokens: int) -> Cost:
    """Return the cost of asking an API for outputs.

    Args:
        api: the system.
        examples: the selection (EXAMPLES schema).
        missing: the number of missing samples of each example. A vLLM server gives all of them in one call.
        max_new_tokens: the longest output, in tokens.
    """
    if api.config.endpoint == "completions":
        prompts = examples["rendered"].to_pylist()
    else:
        asked = [Conversation.of_example(example) for example in examples.select(["prompt", "messages"]).to_pylist()]
        prompts = [(api.config.system or "") + "".join(map(content_of, one.messages)) for one in asked]
    calls = [min(count, 1) if api.config.server == "vllm" else count for count in missing]
    read = sum(count * count_tokens(prompt) for prompt, count in zip(prompts, calls, strict=True))
    return Cost(sum(calls), Tokens(read, sum(missing) * max_new_tokens))


def judge_cost(judge: ApiJudge, drafts: Sequence[Draft], max_new_tokens: int, rows: Rows) -> Cost:
    """Return the cost of the missing verdicts; a missing output counts as `max_new_tokens` tokens."""
    system_prompt = judge.api.config.system or ""
    tokens, pairs = [], []
    for case, output_a, output_b in drafts:
        missing = [output_a, output_b].count(None)
        pair = Pair(case, output_a or "", output_b or "")
        if missing:
            length = count_tokens(system_prompt + judge.query(pair)) + missing * max_new_tokens
            tokens += [length] * len(judge.orders)
        else:
            pairs.append(pair)
    tokens += [count_tokens(system_prompt + judge.query(shown)) for shown in unjudged(judge, pairs, rows).values()]
    return Cost(len(tokens), Tokens(sum(tokens), len(tokens) * judge.max_tokens))


def count_tokens(text: str) -> int:
    """Return the estimated number of tokens of a text."""
    return -(-len(text.encode()) // TOKEN_BYTES)
