"""Models whose weights are pickles (`pytorch_model.bin`) as safetensors, which is all that the other commands read.

A pickle is a program. It is read by an interpreter that knows tensors and nothing else (`weights_only`).
"""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, read_json
from cpo_pipe.data.models import PICKLES, Model, TokenizerFiles, copy_tokenizer, fetch_folder
from cpo_pipe.data.progress import track
from cpo_pipe.pipeline.folders import check_new, new_folder
from cpo_pipe.pipeline.sentencepiece import write_tokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SHARD_SIZE = "2GB"
"""The largest file that is written, which is what is in memory of it."""

_PICKLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_KEPT = ("config.json", "generation_config.json", "README.md")


def convert(name: str, out: Path, shard_size: str | int = SHARD_SIZE) -> None:
    """Write a model of pickles to a folder of its own as safetensors, with config and tokenizer.

    In memory are one shard of what is written and, of a pickle in the format of PyTorch before 1.6, that pickle.

    Args:
        name: a folder or hub name.
        out: a folder that is new or empty.
        shard_size: the largest file, in bytes or such as `2GB`.

    Raises:
        InputError: there are no pickles, one wants to run code or is damaged, the tensors are not those of the config,
            or `out` has something in it.
    """
    check_new(out)
    folder = fetch_folder(name, "model", weights=PICKLES)
    pickles = _Pickles.of(name, folder)
    Model(name, folder, "").skeleton()
    with new_folder(out) as scratch:
        for file in _KEPT:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, scratch / file)
        copy_tokenizer(folder, scratch)
        write_tokenizer(scratch)  # what cannot be done is said before the long part
        if any((scratch / file).is_file() for file in TOKENIZER_FILES):
            _warn_of_tokenizer(name, scratch)
        _write_weights(pickles, scratch, shard_size)
        _check(name, scratch)
    log.info("model %s: written to %s", name, out)


@dataclass(frozen=True)
class _Outline:
    """A tensor without its content, and where in memory that was while its pickle was open."""

    file: Path
    tensor: "torch.Tensor"
    """On the meta device."""
    place: tuple[Any, ...]
    """Equal for tensors of one pickle that are one."""


@dataclass(frozen=True)
class _Pickles:
    """The pickles of a model."""

    name: str
    """The model's; for messages only."""
    files: list[Path]

    @classmethod
    def of(cls, name: str, folder: Path) -> "_Pickles":
        if not (folder / "config.json").is_file():
            raise InputError(f"model {name}: no config.json there; give a model folder or a hub name")
        if any(folder.glob("*.safetensors")):
            raise InputError(f"model {name}: is safetensors already; name it as it is")
        if (folder / _PICKLE).is_file():
            return cls(name, [folder / _PICKLE])
        if not (folder / _INDEX).is_file():
            raise InputError(f"model {name}: no {_PICKLE} there, nor {_INDEX}: there is nothing to convert")
        weight_map = read_json(folder / _INDEX).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise InputError(f"model {name}: {_INDEX} names no files; download it again")
        files = [folder / file for file in sorted(set(weight_map.values()))]
        for file in files:
            # The index is the model's author's: it names neighbours, and nothing elsewhere.
            if file.parent != folder or not file.is_file():
                raise InputError(f"model {name}: {file.name} is not there, which {_INDEX} names; download it again")
        if not files:
            raise InputError(f"model {name}: {_INDEX} names no file; download it again")
        return cls(name, files)

    def load(self, file: Path) -> "dict[str, torch.Tensor]":
        """The tensors of a pickle: mapped into memory, and read when they are used.

        Raises:
            InputError: it wants to run code, is damaged, or has something else in it.
        """
        import torch

        try:
            # The format before PyTorch 1.6 is no zip file, and cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # a damaged pickle fails in any of an interpreter's ways
            wanted = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
            if wanted:
                raise InputError(
                    f"model {self.name}: {file.name} wants to run code when it is loaded ({wanted[1].rstrip('.')}), "
                    "which weights need not: it is not loaded, take the model from elsewhere"
                ) from error
            raise InputError(
                f"model {self.name}: {file.name} is damaged or no file of tensors ({file.stat().st_size:,} bytes); "
                "download it again"
            ) from error
        if not isinstance(content, Mapping) or not content or not all(_plain(*item) for item in content.items()):
            raise InputError(f"model {self.name}: {file.name} has something else in it than tensors by name")
        return dict(content)

    def outlines(self) -> dict[str, _Outline]:
        """Of all tensors, by name."""
        found: dict[str, _Outline] = {}
        for file in self.files:
            found |= self._outlines(file)
        return found

    def _outlines(self, file: Path) -> dict[str, _Outline]:
        def place(tensor: "torch.Tensor") -> tuple[Any, ...]:
            return file, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

        return {key: _Outline(file, value.to("meta"), place(value)) for key, value in self.load(file).items()}


def _write_weights(pickles: _Pickles, folder: Path, shard_size: str | int) -> None:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    outlines = pickles.outlines()
    for key in _copies(pickles, outlines, _tied(pickles.name, folder)):
        del outlines[key]
    plan = split_torch_state_dict_into_shards(
        {key: outline.tensor for key, outline in outlines.items()}, max_shard_size=shard_size
    )
    opened: tuple[Path | None, dict[str, torch.Tensor]] = None, {}
    with track("convert", len(outlines)) as meter:
        for file, held in plan.filename_to_tensors.items():
            shard: dict[str, torch.Tensor] = {}
            for key in held:
                if opened[0] != outlines[key].file:
                    opened = None, {}  # one is closed before the next is opened
                    opened = outlines[key].file, pickles.load(outlines[key].file)
                # A copy: what is mapped may be one with another tensor, or a part of it, which safetensors refuses.
                shard[key] = opened[1][key].clone(memory_format=torch.contiguous_format)
                meter.advance()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _tied(name: str, folder: Path) -> dict[str, str]:
    """Names of tensors that the config makes one with another one, and that one's."""
    return dict(Model(name, folder, "").skeleton().all_tied_weights_keys)


def _copies(pickles: _Pickles, outlines: Mapping[str, _Outline], tied: Mapping[str, str]) -> Iterator[str]:
    """Names of tensors that are another one by the config, and equal it: transformers makes them from that one."""
    import torch

    for key, source in tied.items():
        if key in outlines and source in outlines:
            one, other = outlines[key], outlines[source]
            if one.place == other.place or torch.equal(pickles.load(one.file)[key], pickles.load(other.file)[source]):
                yield key


def _plain(key: object, value: object) -> bool:
    """Whether it is a name and a tensor whose content is there as it is."""
    import torch

    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _warn_of_tokenizer(name: str, folder: Path) -> None:
    """The weights are of use without it: another one may be given in its place."""
    try:
        TokenizerFiles(folder, "").load()
    except InputError as error:
        reason = str(error).partition(": ")[2]
        log.warning("model %s: its tokenizer does not load: %s; the weights are converted", name, reason)


def _check(name: str, folder: Path) -> None:
    """Refuse tensors that are not those of the config: transformers loads them as it would, but for their content."""
    from transformers import AutoModelForCausalLM

    # With the loading info comes a pair, which transformers' types do not say.
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    report = pair[1]
    if report["mismatched_keys"]:
        key, there, wanted = min(report["mismatched_keys"])
        raise InputError(
            f"model {name}: the tensor {key} has the shape {list(there)}, where config.json means {list(wanted)}; "
            "give the config of these weights"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"model {name}: its weights lack {len(missing)} tensors of its architecture, such as {missing[0]}"
        )
