"""Sampling with vLLM, in process."""

import os
from collections.abc import Sequence
from typing import Any

from cpo_pipe.data.models import Model
from cpo_pipe.pipeline.engines.base import Request, Sample, Sampling

# Read by vLLM when it is imported: one process (starts twice as fast), quiet, and no usage report to anyone.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")

CPU_CACHE_BYTES = 1 << 30


def unsupported(model: Model) -> str | None:
    """Why vLLM does not run this model on this machine, or None if it does."""
    import torch
    from transformers import AutoConfig
    from vllm import ModelRegistry

    config = AutoConfig.from_pretrained(model.path)
    architectures = config.architectures or ["unknown"]
    if not any(name in ModelRegistry.get_supported_archs() for name in architectures):
        return f"architecture {', '.join(architectures)}"
    if not torch.cuda.is_available():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size not in CPUAttentionBackend.get_supported_head_sizes():
            return f"attention heads of {size} dimensions on a CPU"
    return None


class VllmEngine:
    """Child k of a request uses seed + k (vLLM's own rule); prompts go in as token ids."""

    def __init__(self, model: Model):
        import torch
        import vllm

        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {
            "model": str(model.path),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": "bfloat16" if on_gpu else "float32",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if not on_gpu:
            # Chunked prefill kills the CPU engine on a seeded prompt that it splits; small blocks make short prompts
            # hit the prefix cache; compiling costs more than it gives here.
            settings |= {"enable_chunked_prefill": False, "enforce_eager": True, "block_size": 32,
                         "kv_cache_memory_bytes": CPU_CACHE_BYTES}  # fmt: skip
        self._vllm = vllm
        self._llm = vllm.LLM(**settings)
        self.description = f"vllm {vllm.__version__}, {settings['dtype']}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """For each request its `n` samples, in order."""
        greedy = sampling.temperature == 0
        parameters = [
            self._vllm.SamplingParams(
                n=request.n,
                seed=None if greedy else request.seed,
                temperature=sampling.temperature,
                top_k=0 if greedy else sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_ids),
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        answers = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [
            [Sample(list(one.token_ids), one.finish_reason, float(one.cumulative_logprob)) for one in answer.outputs]
            for answer in answers
        ]
