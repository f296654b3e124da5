"""A step of MLE with its sequences packed behind each other, beside the same in padded rows; one thread."""

import statistics
import time

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpo_pipe.trainer.scoring.attention import AttentionBackend
from cpo_pipe.trainer.scoring.batching import micro_batches
from cpo_pipe.trainer.scoring.scorer import Scorer

BATCH, ROUNDS, BUDGET = 32, 5, 8192
MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 1024}  # fmt: skip


def step(
    scorer: Scorer, attention: AttentionBackend, texts: list[tuple[list[int], list[list[int]]]]
) -> tuple[float, int]:
    """CPU seconds of forward and backward pass, and the tokens computed."""
    scorer.set_attention(attention)
    scorer.zero_grad()
    start, tokens = time.process_time(), 0
    for micro in micro_batches(texts, attention, BUDGET)[0]:
        packed = scorer.pack([texts[index] for index in micro])
        tokens += packed.tokens()
        (-scorer(packed).sum() / 1000).backward()
    return time.process_time() - start, tokens


def bench_mle() -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL), dtype=torch.float32).eval()
    scorer = Scorer(model)
    for name, median, spread in (
        ("instructions", 90, 0.8),
        ("short answers", 40, 0.4),
        ("pieces of one length", 128, 0.0),
    ):
        lengths = np.clip(random.lognormal(np.log(median), spread, (BATCH, 2)) / 2, 8, 480).astype(int)
        texts = [
            (random.integers(5, 8000, prompt).tolist(), [random.integers(5, 8000, target).tolist()])
            for prompt, target in lengths.tolist()
        ]
        step(scorer, "packed", texts[:4])
        seconds: dict[AttentionBackend, list[float]] = {"packed": [], "padded": []}
        tokens = {}
        for _ in range(ROUNDS):
            for attention, took in seconds.items():
                spent, tokens[attention] = step(scorer, attention, texts)
                took.append(spent)
        ratios = [padded / packed for packed, padded in zip(seconds["packed"], seconds["padded"], strict=True)]
        print(f"\n{name}: packed {statistics.median(seconds['packed']):.1f} s, {tokens['packed']:,} tokens; in padded "
              f"rows of like length {tokens['padded']:,} tokens, {statistics.median(ratios):.2f} times as long "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
