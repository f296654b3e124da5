"""Greedy samples of the model in training, in which repetition shows."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch

from cpo_pipe.trainer.groups import Group
from cpo_pipe.trainer.scoring.scorer import Scorer

SAMPLES = 8
SAMPLE_TOKENS = 64
"""How many greedy samples are looked at for repetition, and their length."""


@torch.no_grad()
def greedy_samples(scorer: Scorer, groups: Sequence[Group]) -> list[list[int]]:
    """Return the token ids of greedy continuations of the first prompts.

    Each process makes the same: no weights move between them.
    """
    groups = groups[: SAMPLES * SAMPLES]
    prompts = list(dict.fromkeys(tuple(group.prompt_ids) for group in groups))[:SAMPLES]
    samples: list[list[int]] = []
    with scorer.own_attention() as model:
        eos = model.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        # Those of one length together: padding is not exact for every architecture.
        for length, alike in groupby(sorted(prompts, key=len), key=len):
            room = min(SAMPLE_TOKENS, context - length)
            if room < 1:
                continue
            ids = torch.tensor(list(alike), device=model.device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
                pad_token_id=ends[0] or 0,
            )  # type: ignore[operator]  # fmt: skip
            rows = out[:, length:].tolist()
            samples += [row[: next((at for at, one in enumerate(row, 1) if one in ends), room)] for row in rows]
    return samples
