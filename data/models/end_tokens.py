"""Which tokens end a text, how a model's files name them, and a text's tokens without the one that ends it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import read_json
from cpo_pipe.data.models.tokenizer import TokenizerFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_CONFIG = "generation_config.json"
_SPECIAL_TOKENS = ("bos_token_id", "pad_token_id")


def end_tokens(model: Path | None, tokenizer: TokenizerFiles | None, of_targets: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ids of all tokens that end a text of a model: first those that end targets, then the tokenizer's EOS.

    The others are those that generation_config.json and config.json (also a nested text_config) name, ascending. Read
    from the JSON files, so that a run with nothing to do imports no transformers; where those do not name the EOS (the
    class of an old tokenizer implies it), the tokenizer is loaded.

    Args:
        model: The model's folder, or None for a model with random weights.
        tokenizer: The tokenizer of prompts and continuations, or None.
        of_targets: The tokens that end the targets of examples (`Examples.end_tokens`), the most frequent first.

    Raises:
        InputError: an `eos_token_id` in a file of the model is not a token id or a list of them.
    """
    eos = tokenizer_eos(tokenizer)
    return joined([*of_targets, *([] if eos is None else [eos])], set() if model is None else _configured(model))


def joined(first: Iterable[int], others: Iterable[int]) -> tuple[int, ...]:
    """Return end tokens as configs list them: those that end targets first, the others ascending."""
    first = tuple(dict.fromkeys(first))
    return (*first, *sorted({*others} - {*first}))


def tokenizer_eos(tokenizer: TokenizerFiles | None) -> int | None:
    """Return the id of the EOS token of a tokenizer; None where it has none."""
    if tokenizer is None:
        return None
    declared = _declared_eos(tokenizer.path)
    found = tokenizer.load().eos_token_id if declared is None else declared
    return found if isinstance(found, int) else None


def without_end(token_ids: list[int], ended: bool) -> list[int]:
    """Return the tokens of a continuation without the one that ends it; `ended` says whether it has one.

    A model may end a text with any of several tokens, or run into its limit: two continuations are the same text where
    these tokens are equal.
    """
    return token_ids[:-1] if ended else token_ids


def name_end_tokens(network: "PreTrainedModel", ids: Sequence[int]) -> None:
    """Set the end tokens in a network's config and give it a generation config of special tokens alone.

    Sampling settings of its authors (temperature, repetition penalty, suppressed tokens) are removed: they would
    change what is sampled from the network, and transformers refuses to save settings that contradict each other.
    """
    from huggingface_hub.errors import StrictDataclassFieldValidationError
    from transformers import GenerationConfig

    before, named = network.generation_config, _value(ids)
    for config in (network.config, network.config.get_text_config()):
        try:
            config.eos_token_id = named
        except StrictDataclassFieldValidationError:  # takes one token only; the generation config has them all
            config.eos_token_id = ids[0]
    network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=getattr(before, "bos_token_id", None),
        eos_token_id=named,
        pad_token_id=getattr(before, "pad_token_id", None),
    )


def write_end_tokens(folder: Path, ids: Sequence[int]) -> None:
    """Name the end tokens in the config files of a model's folder; its generation config keeps special tokens alone."""
    generation = {key: value for key, value in _json(folder / GENERATION_CONFIG).items() if key in _SPECIAL_TOKENS}
    for name, content in (("config.json", _json(folder / "config.json")), (GENERATION_CONFIG, generation)):
        content["eos_token_id"] = _value(ids)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _value(ids: Sequence[int]) -> int | list[int] | None:
    """Return end tokens as a config has them."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _configured(model: Path) -> set[int]:
    """Return the end tokens that a model's files name, without those that its vocabulary lacks."""
    config = _json(model / "config.json")
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    size = config.get("vocab_size", nested.get("vocab_size"))
    found: set[int] = set()
    for name, content in ((GENERATION_CONFIG, _json(model / GENERATION_CONFIG)), ("config.json", config),
                          ("config.json", nested)):  # fmt: skip
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise InputError(
                f"model {model}: {name}: eos_token_id is {json.dumps(value)}; set it to a token id or a list of them"
            )
        found |= {token for token in ids if token >= 0 and not (isinstance(size, int) and token >= size)}
    return found


def _declared_eos(folder: Path) -> int | None:
    """Return the id of the EOS token that a tokenizer's JSON files name; None leaves it to the tokenizer to say."""
    config, tokenizer = _json(folder / "tokenizer_config.json"), _json(folder / "tokenizer.json")
    named = config.get("eos_token") or _json(folder / "special_tokens_map.json").get("eos_token")
    try:
        token = named["content"] if isinstance(named, dict) else named
        for added in tokenizer.get("added_tokens", []):
            if added["content"] == token:
                return int(added["id"])
        vocabulary = tokenizer.get("model", {}).get("vocab")
        found = vocabulary.get(token) if isinstance(vocabulary, dict) else None  # Unigram lists pairs
    except (AttributeError, KeyError, TypeError, ValueError):  # damaged: loading it says how
        return None
    return found if isinstance(found, int) else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
