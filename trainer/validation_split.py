"""Which groups a training measures instead of training on them."""

import hashlib
import heapq

import numpy as np
import pyarrow as pa

from cpo_pipe.data.errors import InputError
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.objectives.preference import PreferenceTraining
from cpo_pipe.trainer.scoring.group_table import Ints, Lengths


def split_validation(name: str, config: Training, groups: pa.Table) -> tuple[Ints, Ints]:
    """Return which groups are trained on, and which are only measured.

    These have the smallest hash of their example id, so that additional rows move few groups.

    Raises:
        InputError: too few groups are left to train on, or to measure.
    """
    if config.validation >= groups.num_rows:
        raise InputError(f"train.{name}.validation is {config.validation}, but there are only {groups.num_rows} groups")
    several = Lengths.of(groups).size_G > (1 if isinstance(config, PreferenceTraining) else 0)
    ids = (example_id for chunk in groups["example_id"].chunks for example_id in chunk.to_pylist())
    hashes = (
        (hashlib.sha256(f"held out {example_id}".encode()).digest(), row)
        for row, example_id in enumerate(ids)
        if several[row]
    )
    chosen = np.array(sorted(row for _, row in heapq.nsmallest(config.validation, hashes)), np.int64)
    pairs = config.pairs if isinstance(config, PreferenceTraining) else None
    if pairs and config.validation:  # no pair is trained on whose prompt is in the validation set
        prompts = (tuple(ids) for chunk in groups["prompt_ids"].chunks for ids in chunk.to_pylist())
        held = {tuple(ids) for ids in groups["prompt_ids"].take(pa.array(chosen)).to_pylist()}
        chosen = np.array([row for row, prompt in enumerate(prompts) if prompt in held], np.int64)
    if len(chosen) < config.validation:
        raise InputError(
            f"train.{name}.validation is {config.validation}, but only {len(chosen)} groups have a negative"
        )
    trained = np.setdiff1d(np.arange(groups.num_rows), chosen)
    if not several[trained].any():
        raise InputError(f"train.{name}: no group with a negative is left to train on; lower train.{name}.validation")
    staged = config.curriculum is not None and config.curriculum.order == "staged"
    if staged and config.curriculum is not None and len(trained) < config.curriculum.stages:
        raise InputError(
            f"train.{name}.curriculum.stages is {config.curriculum.stages}, but there are only {len(trained)} groups "
            "to train on; lower it"
        )
    return trained, chosen
