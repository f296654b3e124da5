"""Weight-space ensembles: θ = Σ w_i θ_i, such as α θ_MLE + (1 − α) θ_CPO (Feng et al. 2025, §4).

Computed tensor by tensor from the parts' safetensors, so that no model is in memory as a whole.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import model_fingerprint, read_json, sha256_file
from cpo_pipe.data.models.end_tokens import end_tokens, joined, name_end_tokens, tokenizer_eos
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.sharded import write_sharded
from cpo_pipe.data.models.tokenizer import TokenizerFiles, copy_tokenizer
from cpo_pipe.data.store import Artifact, ArtifactWriter, Store
from cpo_pipe.trainer.train import checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_NOT_COMPUTED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of a config that change nothing in what a model with its weights computes."""

SHARD_SIZE = "2GB"
"""The largest file of an ensemble, which is in memory while it is written."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Tensors in files of old versions of transformers, which its models now compute themselves."""


def ensemble(store: Store, parts: Sequence[tuple[Model, float]], tokenizer: TokenizerFiles) -> Artifact:
    """Return the ensemble of models, made or not."""
    weights = sorted([model.fingerprint, weight] for model, weight in parts)
    ends = _end_tokens(parts, tokenizer)
    return checkpoint(store, {"merge": weights, "tokenizer": tokenizer.fingerprint, "end_tokens": list(ends)})


def _end_tokens(parts: Sequence[tuple[Model, float]], tokenizer: TokenizerFiles) -> tuple[int, ...]:
    """Return the end tokens of all parts: an ensemble ends texts as any of them does."""
    others = [token for model, _ in parts for token in end_tokens(model.path, None)]
    eos = tokenizer_eos(tokenizer)
    return joined([] if eos is None else [eos], others)


def merge(name: str, store: Store, parts: Sequence[tuple[Model, float]], tokenizer: TokenizerFiles) -> Artifact:
    """Return the ensemble of models of one architecture, and make it if it is missing; weights sum to 1.

    Raises:
        InputError: as for `write_merged`.
    """
    artifact = ensemble(store, parts, tokenizer)

    def write(writer: ArtifactWriter) -> None:
        write_merged(name, parts, writer.path, _end_tokens(parts, tokenizer))
        copy_tokenizer(tokenizer.path, writer.path)
        writer.facts["fingerprint"] = model_fingerprint(writer.path, sha256_file)

    if artifact.make(write):
        log.info("system %s: merged into %s", name, artifact.name)
    return artifact


def write_merged(
    system: str,
    parts: Sequence[tuple[Model, float]],
    folder: Path,
    ends: Sequence[int],
    shard_size: str | int = SHARD_SIZE,
) -> None:
    """Write weights and configs of an ensemble, in float32 whatever the parts are.

    Memory holds one shard of the ensemble and one tensor of one part.

    Args:
        system: its name, for messages.
        parts: models with their weights.
        folder: an empty one.
        ends: the tokens that end a text of it.
        shard_size: the largest file, in bytes or such as `2GB`.

    Raises:
        InputError: the parts' tensors differ in name or shape, or in value if they are not floats; one is not finite;
            or a part is quantized.
    """
    with ExitStack() as stack:
        opened = [_Part(system, model, stack) for model, _ in parts]
        weights = [weight for _, weight in parts]
        for one, other in pairwise(opened):
            _check_alike(system, one, other)
        _write_configs(opened, folder, ends)  # before the long part: transformers may refuse them
        names = sorted({name for part in opened for name in part.names})
        outlines = {name: opened[0].outline(name) for name in names}

        def load(name: str) -> "torch.Tensor":
            return _merged(system, name, opened, weights)

        write_sharded(folder, outlines, load, shard_size, f"merge {system}")


def _merged(system: str, name: str, parts: Sequence["_Part"], weights: Sequence[float]) -> "torch.Tensor":
    """Return one tensor of the ensemble."""
    import torch

    first = parts[0].tensor(name)
    if not first.is_floating_point():
        for other in parts[1:]:
            if not torch.equal(first, other.tensor(name)):
                raise InputError(
                    f"system {system}: the tensor {name}, which is not a float, differs between {parts[0].model} and "
                    f"{other.model}; only equal ones can be merged"
                )
        return first
    total = first.to(torch.float32, copy=True).mul_(weights[0])  # what was read is the file itself, mapped
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part.tensor(name).to(torch.float32, copy=True).mul_(weight)
    return total


def _check_alike(system: str, one: "_Part", other: "_Part") -> None:
    """Refuse two parts whose tensors differ in name, shape or kind, or whose configs compute differently.

    So it does not matter whose config the ensemble gets.
    """
    for name in sorted({*one.names, *other.names}):
        mine, theirs = one.described(name), other.described(name)
        if mine != theirs:
            raise InputError(
                f"system {system}: {one.model} and {other.model} are not of one architecture: the tensor {name} is "
                f"{mine} in the one and {theirs} in the other; merge models that began as the same one"
            )
    configs = [_computed(part.skeleton.config.to_dict()) for part in (one, other)]
    for key in sorted({*configs[0], *configs[1]}):
        values = [config.get(key) for config in configs]
        if values[0] != values[1]:
            raise InputError(
                f"system {system}: {one.model} and {other.model} are not of one architecture: {key} is {values[0]!r} "
                f"in the config of the one and {values[1]!r} in that of the other; merge models that began as one"
            )


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config, also of those in it, that change what a model computes."""
    return {
        key: _computed(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_COMPUTED
    }


def _write_configs(parts: Sequence["_Part"], folder: Path, ends: Sequence[int]) -> None:
    """Write the configs of the first part; embeddings are tied only if they are in all parts."""
    skeleton = parts[0].skeleton
    name_end_tokens(skeleton, ends)
    config = skeleton.config
    config.dtype, config.architectures = "float32", [type(skeleton).__name__]
    if not all(part.skeleton.all_tied_weights_keys for part in parts):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(folder)
    skeleton.generation_config.save_pretrained(folder)


class _Part:
    """A model's tensors, read from its files one at a time, under the names that the architecture has for them."""

    def __init__(self, system: str, model: Model, stack: ExitStack):
        """`stack` closes the files."""
        from safetensors import safe_open

        self.system, self.model = system, model.name
        if "quantization_config" in read_json(model.path / "config.json"):
            raise InputError(f"system {system}: {model.name} is quantized; name the model that it was made from")
        model.check_weights()
        self.skeleton = model.skeleton()
        expected, ignored = self.skeleton.state_dict().keys(), _ignored(self.skeleton)
        self._at: dict[str, tuple[Any, str]] = {}
        for path in _weight_files(model.path):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                with_prefix = f"{self.skeleton.base_model_prefix}.{key}"  # files of a body without its head lack it
                name = with_prefix if with_prefix in expected and key not in expected else key
                if name in expected or not ignored.search(name):
                    self._at[name] = file, key
        self.names = list(self._at)
        """Names of the tensors in the files; tied ones that the files lack are not among them."""
        for pair in self.skeleton.all_tied_weights_keys.items():
            for absent, there in (pair, pair[::-1]):
                if absent not in self._at and there in self._at:
                    self._at[absent] = self._at[there]

    def described(self, name: str) -> str:
        """Return kind and shape of a tensor, to compare and to show."""
        if name not in self._at:
            return "absent"
        file, key = self._at[name]
        view = file.get_slice(key)
        kind = "float" if view.get_dtype() in _FLOATS else view.get_dtype()
        return f"{kind} {view.get_shape()}"

    def outline(self, name: str) -> "torch.Tensor":
        """Return a tensor of an ensemble without its content."""
        import torch

        file, key = self._at[name]
        if not self.described(name).startswith("float"):
            return torch.empty_like(self.tensor(name), device="meta")
        return torch.empty(file.get_slice(key).get_shape(), dtype=torch.float32, device="meta")

    def tensor(self, name: str) -> "torch.Tensor":
        """Return a tensor, in its own dtype.

        Raises:
            InputError: it is not finite.
        """
        file, key = self._at[name]
        tensor: torch.Tensor = file.get_tensor(key)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"system {self.system}: the tensor {name} of {self.model} is not finite: the model is broken, train or "
                "download it again"
            )
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read; others may hold other copies of the weights."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def _ignored(skeleton: "PreTrainedModel") -> re.Pattern[str]:
    """Return a pattern of tensors that files may have although the architecture lacks them."""
    return re.compile("|".join([*(skeleton._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]))
