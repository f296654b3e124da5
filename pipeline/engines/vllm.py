"""Sampling with vLLM, in process. Import this only where vLLM is installed."""

import logging
import os
import warnings
import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.engines.base import Request, Sample, Sampling

# Read by vLLM when it is imported: one process (starts twice as fast), quiet, and no usage report to anyone.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # likewise read by torch
# Its messages before it has configured its logging, and Python's warnings about it.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _import() -> None:
    from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams, TokensPrompt  # noqa: F401


# Something in the import keeps the stack that it was called from, and an engine in a frame of that stack would never be
# freed: whoever imports this module is about to open one. A thread has a stack of its own.
with ThreadPoolExecutor(1) as thread:
    thread.submit(_import).result()

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams, TokensPrompt, __version__  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

CPU_CACHE_BYTES = 1 << 30
"""Memory of the KV cache on a CPU; vLLM would take most of the machine's. Samples that do not fit wait."""


def unsupported(model: Model) -> str | None:
    """Return why vLLM does not run this model on this machine; None if it does."""
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    architectures = config.architectures or ["unknown"]
    if not any(name in ModelRegistry.get_supported_archs() for name in architectures):
        return f"architecture {', '.join(architectures)}"
    if not torch.cuda.is_available():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            return "layers without attention on a CPU"
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if size not in CPUAttentionBackend.get_supported_head_sizes():
            return f"attention heads of {size} dimensions on a CPU"
    return None


class VllmEngine:
    """Samples with vLLM; sample k of a request uses seed + k (vLLM's own rule), and prompts are token ids."""

    searches = False

    def __init__(self, model: Model, context: int | None = None):
        """Load the model.

        Args:
            model: the model.
            context: tokens of the longest prompt and its continuation together. None: as many as the model's context
                and the memory of the cache allow, for which vLLM reserves buffers.
        """
        model.check_weights()
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {
            "model": str(model.path),
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "generation_config": "vllm",
            "dtype": "bfloat16" if on_gpu else "float32",
            # A model's own context may need more memory for a single row than there is for the cache.
            "max_model_len": -1 if context is None else context,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if not on_gpu:
            # Chunked prefill fails on a seeded prompt that it splits; 32 is the smallest block, and only whole blocks
            # of a prompt are shared by its samples; compiling costs more than it gives here.
            settings |= {"enable_chunked_prefill": False, "enforce_eager": True, "block_size": 32,
                         "kv_cache_memory_bytes": CPU_CACHE_BYTES}  # fmt: skip
        set_num_threads = torch.set_num_threads
        self._llm = LLM(**settings)
        torch.set_num_threads = set_num_threads  # vLLM puts one there that does nothing, for the whole process
        # Without it weights and cache stay in memory, and torch.distributed initialized, when the engine is dropped.
        weakref.finalize(self, self._llm.llm_engine.engine_core.shutdown)
        self.description = f"vllm {__version__}, {settings['dtype']}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the samples of each request, as they are ready."""
        assert sampling.beams == 1
        greedy = sampling.temperature == 0
        parameters = [
            SamplingParams(
                n=request.n,
                seed=None if greedy else request.seed,
                temperature=sampling.temperature,
                top_k=0 if greedy else sampling.top_k,
                top_p=1.0 if greedy else sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_ids),
                ignore_eos=True,  # only `stop_ids` end a text, not the end tokens of the model's config
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for request in requests
        ]
        prompts = [request.prompt_ids for request in requests]
        with closing(self._answers(prompts, parameters)) as answers:
            for place, answer in answers:
                samples = [
                    Sample(list(one.token_ids), one.finish_reason, float(one.cumulative_logprob))
                    for one in answer.outputs
                ]
                yield place, samples

    def next_logprobs(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield the index of each prompt, as they are ready, and the log-probs of its `tokens`, each as its next token.

        The log-probs are those of the raw model (temperature 1, all tokens), in nats.
        """
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0,
                logprob_token_ids=list(token_ids),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for token_ids in tokens
        ]
        with closing(self._answers(prompts, parameters)) as answers:
            for place, answer in answers:
                (found,) = answer.outputs[0].logprobs
                yield place, [float(found[token].logprob) for token in tokens[place]]

    def _answers(
        self, prompts: Sequence[Sequence[int]], parameters: Sequence[SamplingParams]
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Yield the index and answer of each prompt, as they are ready; LLM.generate would wait for the last."""
        engine = self._llm.llm_engine
        ids = [
            engine.add_request(str(place), TokensPrompt(prompt_token_ids=list(prompt)), chosen)
            for place, (prompt, chosen) in enumerate(zip(prompts, parameters, strict=True))
        ]
        try:
            while engine.has_unfinished_requests():
                for answer in engine.step():
                    yield int(answer.request_id), answer
        finally:
            engine.abort_request(ids, internal=True)
