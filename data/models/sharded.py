"""Weights as safetensors, in files of a limited size, with one file in memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_pipe.data.progress import track

if TYPE_CHECKING:
    import torch


def write_sharded(
    folder: Path,
    outlines: "Mapping[str, torch.Tensor]",
    load: "Callable[[str], torch.Tensor]",
    shard_size: str | int,
    label: str,
) -> None:
    """Write tensors to `model.safetensors`, or to several files and their index, as transformers names them.

    Args:
        folder: where the files go.
        outlines: for each tensor's name one of its shape and dtype, without data.
        load: returns a tensor by its name; called file by file.
        shard_size: the largest file, in bytes or such as `2GB`.
        label: of the progress bar.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(dict(outlines), max_shard_size=shard_size)
    with track(label, len(outlines), "tensors") as meter:
        for file, names in plan.filename_to_tensors.items():
            shard: dict[str, torch.Tensor] = {}
            for name in names:
                shard[name] = load(name)
                meter.advance()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
