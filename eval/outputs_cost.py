"""What systems that are APIs would still be asked for outputs, before they are."""

from collections.abc import Sequence

import pyarrow as pa

from cpo_pipe.eval.judges.cost import Cost, tokens_of
from cpo_pipe.pipeline.engines.openai import ApiModel, Tokens, prompt_of


def outputs_cost(api: ApiModel, examples: pa.Table, missing: Sequence[int], max_new_tokens: int) -> Cost:
    """What asking an API for outputs takes; prompts are estimated as those of judges.

    Args:
        api: the system.
        examples: the selection (EXAMPLES schema).
        missing: how many outputs of each are not there yet. A vLLM server gives all of them in one call.
        max_new_tokens: the longest output, in tokens.
    """
    if api.config.endpoint == "completions":
        prompts = examples["rendered"].to_pylist()
    else:
        prompts = [
            (api.config.system or "") + prompt_of(example) for example in examples.select(["prompt"]).to_pylist()
        ]
    calls = [min(count, 1) if api.config.server == "vllm" else count for count in missing]
    read = sum(count * tokens_of(prompt) for prompt, count in zip(prompts, calls, strict=True))
    return Cost(sum(calls), Tokens(read, sum(missing) * max_new_tokens))
