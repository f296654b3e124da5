"""Pickled weights (`pytorch_model.bin`) as safetensors.

A pickle is a program. It is read by an interpreter that knows tensors and nothing else (`weights_only`).
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import read_json
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.sharded import write_sharded

if TYPE_CHECKING:
    import torch

_PICKLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """A pickled tensor without its content."""

    file: Path
    tensor: "torch.Tensor"
    """On the meta device."""
    storage: tuple[Any, ...]
    """Where its content was in memory, while its pickle was open. Equal for tensors of a pickle that share it."""


@dataclass(frozen=True)
class PickledWeights:
    """The pickles of a model."""

    name: str
    """The model's name, for messages."""
    files: list[Path]

    @classmethod
    def find(cls, name: str, folder: Path) -> "PickledWeights":
        """Return the pickles in a model's folder.

        Raises:
            InputError: the model has none, or the index does not name them.
        """
        if not (folder / "config.json").is_file():
            raise InputError(f"model {name}: has no config.json; give a model folder or a hub name")
        if any(folder.glob("*.safetensors")):
            raise InputError(f"model {name}: is safetensors already; use it without converting")
        if (folder / _PICKLE).is_file():
            return cls(name, [folder / _PICKLE])
        if not (folder / _INDEX).is_file():
            raise InputError(f"model {name}: has neither {_PICKLE} nor {_INDEX}; nothing to convert")
        weight_map = read_json(folder / _INDEX).get("weight_map", {})
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise InputError(f"model {name}: {_INDEX} names no files; download it again")
        files = [folder / file for file in sorted(set(weight_map.values()))]
        for file in files:
            # The index is untrusted: it may name only files in the folder.
            if file.parent != folder or not file.is_file():
                raise InputError(f"model {name}: {file.name} is missing, which {_INDEX} names; download it again")
        return cls(name, files)

    def load(self, file: Path) -> "dict[str, torch.Tensor]":
        """Return the tensors of a pickle: mapped into memory, and read when they are used.

        Raises:
            InputError: it wants to run code, is damaged, or contains something else.
        """
        import torch

        try:
            # The format before PyTorch 1.6 is no zip file, and cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # a damaged pickle fails in any of an interpreter's ways
            wanted = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
            if wanted:
                raise InputError(
                    f"model {self.name}: {file.name} runs code when it is loaded ({wanted[1].rstrip('.')}), which "
                    "weights need not do, so it is not loaded; get the model from elsewhere"
                ) from error
            raise InputError(
                f"model {self.name}: {file.name} is damaged or contains no tensors ({file.stat().st_size:,} bytes); "
                "download it again"
            ) from error
        if (
            not isinstance(content, Mapping)
            or not content
            or not all(_is_named_tensor(*item) for item in content.items())
        ):
            raise InputError(f"model {self.name}: {file.name} contains something other than tensors by name")
        return dict(content)

    def tensors(self) -> dict[str, TensorInfo]:
        """Return all tensors by name, without their content."""

        def info(file: Path, tensor: "torch.Tensor") -> TensorInfo:
            storage = file, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            return TensorInfo(file, tensor.to("meta"), storage)

        found: dict[str, TensorInfo] = {}
        for file in self.files:  # keep no tensor's content: one pickle is in memory at a time
            found |= {key: info(file, tensor) for key, tensor in self.load(file).items()}
        return found


def write_weights(pickles: PickledWeights, folder: Path, shard_size: str | int) -> None:
    """Write the tensors of pickles as safetensors, one shard at a time."""
    import torch

    tensors = pickles.tensors()
    for key in [*_tied_copies(pickles, tensors, folder)]:
        del tensors[key]
    opened: Path | None = None
    content: dict[str, torch.Tensor] = {}

    def read(key: str) -> torch.Tensor:
        nonlocal opened, content
        if opened != tensors[key].file:
            content = {}  # one is closed before the next is opened
            opened, content = tensors[key].file, pickles.load(tensors[key].file)
        # A copy: what is mapped may share memory with another tensor, which safetensors refuses.
        return content[key].clone(memory_format=torch.contiguous_format)

    write_sharded(folder, {key: info.tensor for key, info in tensors.items()}, read, shard_size, "convert")


def _tied_copies(pickles: PickledWeights, tensors: Mapping[str, TensorInfo], folder: Path) -> Iterator[str]:
    """Yield the names of tensors that the config ties to another one and that equal it: transformers restores them."""
    import torch

    tied: Mapping[str, str] = Model(pickles.name, folder, "").skeleton().all_tied_weights_keys
    for key, source in tied.items():
        if key in tensors and source in tensors:
            copy, original = tensors[key], tensors[source]
            if copy.storage == original.storage or torch.equal(
                pickles.load(copy.file)[key], pickles.load(original.file)[source]
            ):
                yield key


def _is_named_tensor(key: object, value: object) -> bool:
    """Return whether these are a name and a dense tensor with its content."""
    import torch

    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta
