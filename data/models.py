"""Models by content: where a name leads, and what the weights and the tokenizer there are."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data import adapters, remote_code
from cpo_pipe.data.errors import InputError, MissingInput, cause
from cpo_pipe.data.fingerprint import (
    TOKENIZER_FILES,
    check_unchanged,
    hash_weights,
    model_fingerprint,
    read_json,
    tokenizer_fingerprint,
)
from cpo_pipe.data.store import Product, Rows, Store

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "README.md")
_OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*"]
"""Copies of the same weights that some hub repositories carry."""


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
        """Positions the model can attend to, in tokens; None where its config names no limit."""
        config = read_json(self.path / "config.json")
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(config.get(key), int):
                return int(config[key])
        return None

    def vocabulary(self) -> int | None:
        """Token ids the model knows, from 0; None where its config does not say."""
        size = read_json(self.path / "config.json").get("vocab_size")
        return size if isinstance(size, int) else None

    def load(self, dtype: "torch.dtype") -> "PreTrainedModel":
        """The network itself, on the CPU.

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
            pair: Any = AutoModelForCausalLM.from_pretrained(
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
        """Return what helps where the weights are quantized, for a message; nothing where they are not."""
        settings = read_json(self.path / "config.json").get("quantization_config")
        if not isinstance(settings, dict):
            return ""
        method = settings.get("quant_method", "unknown method")
        return (
            f"; its weights are quantized ({method}): install the package that transformers needs for them, or name a "
            "model whose weights are not quantized"
        )

    def skeleton(self) -> "PreTrainedModel":
        """The network without weights: the names and shapes of its tensors, and which of them are one.

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


def fetch_folder(
    name: str, what: str, revision: str | None = None, *, make: bool = True, weights: Sequence[str] = _SAFETENSORS
) -> Path:
    """The folder that `name` (a folder or a hub name) leads to; a hub name is downloaded into the hub's cache.

    Of a hub model's weights only the files of the patterns `weights` are downloaded.

    Raises:
        InputError: neither a folder nor something the hub gives, or a model that asks to run code of its own.
        MissingInput: without `make`, where it would have to be downloaded.
    """
    if Path(name).is_dir():
        _check_code(name, what, Path(name))
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    def download(patterns: Sequence[str]) -> Path:
        patterns = [*_FILES, *patterns]
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_OTHER_FORMATS,
            local_files_only=not make,
        )
        return Path(found)

    try:
        _check_code(name, what, download([]))
        return download(weights)
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"{what} {name}: no such folder, and not a hub name") from error
    except Exception as error:  # the hub client's failures have no common type: offline, not found, gated, …
        if not make:
            raise MissingInput(f"{what} {name}: no such folder or training, and not downloaded from the hub") from error
        raise InputError(
            f"{what} {name}: no such folder or training, and the hub did not give it ({cause(error)})"
        ) from error


def _check_code(name: str, what: str, folder: Path) -> None:
    if what == "model":
        remote_code.check_causal_model(name, folder)
    elif what == "embedding model":
        remote_code.check_embedder(name, folder)


def locate_model(name: str, store: Store, revision: str | None = None, *, make: bool = True) -> Model:
    """The model that a folder or hub name leads to; of a LoRA adapter it is made, in the store, with its base.

    Raises:
        InputError: there is none, its files are damaged, or an adapter's base is not there.
        MissingInput: without `make`, where it would have to be downloaded or made.
    """
    folder = fetch_folder(name, "model", revision, make=make)
    if not make and not Path(name).is_dir() and not any(folder.glob("*.safetensors")):
        raise MissingInput(f"model {name}: its weights are not downloaded from the hub")
    check_weights(folder)
    if (folder / adapters.CONFIG).is_file():
        base = _base_model(name, folder, store, make)
        product = adapters.adapted(name, folder, base, store, make=make)
        return checkpoint_model(name, product)
    weights = hash_weights(folder, store.hash_file)
    return Model(name, folder, model_fingerprint(folder, store.hash_file), weights)


def checkpoint_model(name: str, product: Product) -> Model:
    """Return a complete checkpoint as a model."""
    manifest = product.manifest
    weights = {file: sha256 for file, sha256 in manifest["files"].items() if file.endswith(".safetensors")}
    return Model(name, product.path, manifest["fingerprint"], weights)


def _base_model(name: str, adapter: Path, store: Store, make: bool) -> Model:
    base, revision = adapters.base_of(name, adapter)
    try:
        return locate_model(base, store, revision, make=make)
    except MissingInput:
        raise
    except InputError as error:
        raise InputError(f"model {name}: the base of this adapter: {error}; correct {adapters.CONFIG}") from error


def logprob_rows(store: Store, model: Model, dtype: str) -> Rows:
    """The artifact that keeps log-probs of a frozen model; the dtype is identity, because it changes the values."""
    return store.rows("reference-logprobs", {"model": model.fingerprint, "dtype": dtype})


def check_weights(folder: Path) -> None:
    """Refuse weights that are cut short, incomplete or something else (such as a Git LFS pointer), by their headers.

    Raises:
        InputError: they are.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        if not _is_safetensors(file):
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
            raise InputError(f"model {folder}: {min(absent)} is not there, which {index.name} names; download it again")


def _is_safetensors(path: Path) -> bool:
    """Whether the header is one, and the file ends where the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < size else {}
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
    return bool(ends) and 8 + length + max(ends) == size


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk."""

    path: Path
    fingerprint: str

    def load(self) -> "PreTrainedTokenizerBase":
        """The tokenizer itself.

        Raises:
            InputError: it cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path,
                trust_remote_code=False,  # or else it would ask whether to
            )
        except Exception as error:  # the libraries' failures have no common type
            if "trust_remote_code" in str(error):
                raise remote_code.code_error(f"tokenizer {self.path}", "tokenizer_config.json") from error
            raise InputError(f"tokenizer {self.path}: cannot be loaded ({cause(error)})") from error
        return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put a tokenizer's files beside a checkpoint's weights."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def locate_tokenizer(name: str, store: Store) -> TokenizerFiles:
    """The tokenizer that a folder or hub name leads to.

    Raises:
        InputError: no tokenizer is there, or it needs Python code of its own.
    """
    return tokenizer_in(fetch_folder(name, "tokenizer"), store)


def tokenizer_in(folder: Path, store: Store) -> TokenizerFiles:
    """The tokenizer in a folder.

    Raises:
        InputError: no tokenizer is there, or it needs Python code of its own.
    """
    found = TokenizerFiles(folder, tokenizer_fingerprint(folder, store.hash_file))
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("auto_map"):
        found.load()  # transformers decides whether it needs the code
    return found


def check_vocabulary(model: Model, tokenizer: TokenizerFiles, store: Store) -> None:
    """Refuse a model to whose own tokenizer the token ids of `tokenizer` mean something else.

    Only where both have a tokenizer.json; nothing is loaded.

    Raises:
        InputError: one of them has a token that is absent or another in the other.
    """
    files = [folder / "tokenizer.json" for folder in (model.path, tokenizer.path)]
    if not all(file.is_file() for file in files) or store.hash_file(files[0]) == store.hash_file(files[1]):
        return
    own, given = map(_tokens, files)
    if own != given:
        token_id = min(token_id for token_id in own.keys() | given.keys() if own.get(token_id) != given.get(token_id))
        raise InputError(
            f"data.tokenizer is not that of the model {model.name}: the token id {token_id} is "
            f"{given.get(token_id)!r} in the one and {own.get(token_id)!r} in the other; "
            "set data.tokenizer to the model's own"
        )


def _tokens(file: Path) -> dict[int, str]:
    """The tokens of a tokenizer.json, by id."""
    content = read_json(file)
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, dict):
            tokens = {token_id: token for token, token_id in vocabulary.items()}
        else:  # Unigram: pairs of token and score, in the order of their ids
            tokens = dict(enumerate(token for token, _ in vocabulary))
        return tokens | {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{file}: is not a valid tokenizer.json; download or save the model again") from error
