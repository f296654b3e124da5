"""A causal language model on disk: its identity, its weights and its network."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from cpo_pipe.data.config import Section, Seed
from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import check_unchanged, read_json
from cpo_pipe.data.models.remote_code import kernel_fault
from cpo_pipe.data.store import Artifact, Rows, Store
from cpo_pipe.data.text import nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


AUTOMATIC = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")
"""Keys of a scratch model's config that the tokenizer decides."""


class ScratchModel(Section):
    """A model made on the spot with random weights, of any causal architecture in transformers."""

    architecture: str = Field(description="model type in transformers, such as llama or gpt2")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="config of the architecture; vocabulary size and special tokens are set automatically",
    )
    seed: Seed = Field(0, description="seed of the random weights")

    @field_validator("config")
    @classmethod
    def _check_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        if fault := kernel_fault(config):
            raise ValueError(fault)
        return config

    def context(self) -> int | None:
        """Return how many positions the config gives, in tokens; None where it leaves that to the architecture."""
        return _context(self.config)

    def check_keys(self, where: str = "init") -> None:
        """Refuse an architecture that transformers does not know, and keys that its config does not have.

        transformers keeps unknown keys without a word, so that a misspelled size would leave the default.

        Args:
            where: the key of the recipe that holds it, for messages.

        Raises:
            InputError: the architecture or a key is unknown.
        """
        from transformers import CONFIG_MAPPING

        if self.architecture not in CONFIG_MAPPING:
            hint = nearest(self.architecture, CONFIG_MAPPING) or "name a model type of transformers, such as llama"
            raise InputError(f"{where}.architecture: {self.architecture} is not known to transformers; {hint}")
        kind = CONFIG_MAPPING[self.architecture]
        known = {*kind().to_dict(), *kind.attribute_map, *inspect.signature(kind).parameters}
        for key in self.config:
            if key in AUTOMATIC:
                raise InputError(f"{where}.config.{key}: is taken from the tokenizer; remove it")
            if key not in known:
                hint = nearest(key, known) or f"see transformers' {kind.__name__}"
                raise InputError(f"{where}.config.{key}: not a key of the architecture {self.architecture}; {hint}")


@dataclass(frozen=True)
class Model:
    """A causal language model on disk."""

    name: str
    """As the recipe calls it; for messages only."""
    path: Path
    """Folder with config.json, *.safetensors and, where it has one, its tokenizer."""
    fingerprint: str
    """Hash of weights and architecture."""
    weights: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """SHA-256 of each file of weights, by name, as the fingerprint has them."""

    def check_weights(self) -> None:
        """Verify the weights before use: what is loaded must match the fingerprint.

        A process reads each file once.

        Raises:
            RunError: a file is damaged.
        """
        for name, recorded in self.weights.items():
            check_unchanged(self.path / name, recorded)

    def context(self) -> int | None:
        """Return how many positions the model can attend to, in tokens; None where its config names no limit."""
        return _context(self._text_config())

    def vocabulary(self) -> int | None:
        """Return how many token ids the model knows; None where its config does not say."""
        size = self._text_config().get("vocab_size")
        return size if isinstance(size, int) else None

    def _text_config(self) -> Mapping[str, Any]:
        """Return the config of the language model, which a model that also sees images nests in its own (Gemma 3)."""
        config: dict[str, Any] = read_json(self.path / "config.json")
        nested = config.get("text_config")
        return config | nested if isinstance(nested, dict) else config

    def load(self, dtype: "torch.dtype", auto: Any = None) -> "PreTrainedModel":
        """Return the network, on the CPU.

        Args:
            dtype: of the weights.
            auto: transformers' class that loads the network; None: AutoModelForCausalLM.

        Raises:
            InputError: transformers does not know the architecture, the weights lack some of its tensors, or their
                quantization needs a package that is not installed.
            RunError: the weights are damaged.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.check_weights()

        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            # With the loading info comes a pair, which transformers' types do not say.
            pair: Any = (auto or AutoModelForCausalLM).from_pretrained(
                self.path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=own_attention(config),
                trust_remote_code=False,
            )
        except (ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(f"model {self.name}: cannot be loaded ({cause(error)}){self._quantized()}") from error
        network: PreTrainedModel = pair[0]
        lacking = sorted(pair[1]["missing_keys"])
        if lacking:  # transformers would fill them with random numbers
            raise InputError(
                f"model {self.name}: its weights lack {len(lacking)} tensors of its architecture, such as {lacking[0]}"
            )
        return network

    def _quantized(self) -> str:
        """Return the advice for quantized weights, for a message; empty for other weights."""
        settings = read_json(self.path / "config.json").get("quantization_config")
        if not isinstance(settings, dict):
            return ""
        method = settings.get("quant_method", "unknown method")
        return (
            f"; its weights are quantized ({method}): install the package that transformers needs for them, or name a "
            "model whose weights are not quantized"
        )

    def skeleton(self) -> "PreTrainedModel":
        """Return the network without weights: the names and shapes of its tensors, and which of them are one.

        Raises:
            InputError: transformers does not know the architecture, or not these settings.
        """
        import torch
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            with torch.device("meta"):
                network = new_network(config)
        except Exception as error:  # a config's faults show in any of an architecture's ways
            raise InputError(f"model {self.name}: config.json makes no model ({cause(error)})") from error
        return network


def made_from(scratch: ScratchModel, error: Exception) -> InputError:
    """Return the error of a scratch model that transformers does not make."""
    made = f"a {scratch.architecture} model cannot be made from config {scratch.config}"
    return InputError(f"init: {made} ({cause(error)})")


def _context(config: Mapping[str, Any]) -> int | None:
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def new_network(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return a network of this architecture, in float32, that computes as `Model.load` will compute its checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    network: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, attn_implementation=own_attention(config), trust_remote_code=False
    )
    return network


def own_attention(config: "PreTrainedConfig") -> str | None:
    """Return the attention that computes all of this architecture; None means transformers' default.

    The default, sdpa, silently ignores the soft-cap of attention scores (Gemma 2, VaultGemma).
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def checkpoint_model(name: str, artifact: Artifact) -> Model:
    """Return a complete checkpoint as a model."""
    manifest = artifact.manifest
    weights = {file: sha256 for file, sha256 in manifest["files"].items() if file.endswith(".safetensors")}
    return Model(name, artifact.path, manifest["fingerprint"], weights)


def logprob_rows(store: Store, model: Model, dtype: str) -> Rows:
    """Return the table of a frozen model's log-probs; the dtype is identity, because it changes the values."""
    return store.rows("reference-logprobs", {"model": model.fingerprint, "dtype": dtype})


def check_weights(folder: Path) -> None:
    """Refuse weights that are cut short, incomplete or something else (such as a Git LFS pointer), by their headers.

    Raises:
        InputError: a file is damaged, not a safetensors file, or missing.
    """
    from safetensors import SafetensorError, safe_open

    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        try:  # safetensors refuses a header that is invalid, or does not describe the whole file
            with safe_open(file, framework="np") as opened:
                valid = bool(opened.keys())
        except SafetensorError:
            valid = False
        if not valid:
            raise InputError(
                f"model {folder}: {file.name} is damaged or no safetensors file ({file.stat().st_size:,} bytes); "
                "download or save the model again"
            )
    for index in folder.glob("*.safetensors.index.json"):
        listed = read_json(index).get("weight_map", {})
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise InputError(f"{index}: its weight_map does not name files; download or save the model again")
        absent = set(listed.values()) - {file.name for file in weights}
        if absent:
            raise InputError(f"model {folder}: {min(absent)} is missing, but {index.name} lists it; download it again")
