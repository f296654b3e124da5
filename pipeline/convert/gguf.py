"""GGUF files, llama.cpp's format, as safetensors with config, tokenizer and chat template.

The `gguf` package, which llama.cpp's authors maintain, dequantizes the tensors; transformers knows how each
architecture names and permutes them, and how its tokenizer is made.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.progress import track
from cpo_pipe.pipeline.convert.loading import load_whole

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

TYPES = frozenset(
    {
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
        "MXFP4", "NVFP4",
    }
)  # fmt: skip
"""Types of tensors that can be read (names of llama.cpp's `ggml_type`)."""

_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Pre-tokenizers of llama.cpp that split digits off one by one and then as GPT-2 does; transformers lacks them."""
_LIKE_GPT_2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "granite-docling"}
"""Those that split as GPT-2 does, as transformers does for all that it does not know."""


def find_gguf(name: str) -> Path | None:
    """Return the GGUF file that `name` is or, of a folder without other weights, the one that it contains.

    Raises:
        InputError: the folder contains several.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {name}: no such file")
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"model {name}: has {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0] if files else None


def write_model(name: str, file: Path, folder: Path, shard_size: str | int) -> None:
    """Write the model of a GGUF file in float32, with its config, tokenizer and chat template.

    The whole model is in memory in float32, which contains the values of all types without rounding.

    Args:
        name: of the model, for messages.
        file: the GGUF file.
        folder: an empty folder.
        shard_size: the largest file of weights.

    Raises:
        InputError: the `gguf` package is not installed, the file is damaged or one of several, a tensor has a type that
            cannot be read or is missing, or transformers does not know the architecture or the tokenizer.
    """
    import torch
    from transformers import AutoTokenizer

    reader = _open(name, file)
    plain = folder / "plain.gguf"
    _write_plain(reader, plain)
    try:
        model: Any = load_whole(name, folder, gguf_file=plain.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=plain.name)
    except InputError:
        raise
    except Exception as error:  # the libraries' failures have no common type
        raise InputError(
            f"model {name}: transformers cannot read this GGUF file ({cause(error)}); get the model as safetensors"
        ) from error
    finally:
        plain.unlink()
    _set_pre_tokenizer(name, _value(reader, "tokenizer.ggml.pre"), tokenizer)
    _set_bos(_value(reader, "tokenizer.ggml.add_bos_token"), tokenizer)
    _check_tokens(name, reader, tokenizer)
    # Else save_pretrained would write packed tensors or refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


def _open(name: str, file: Path) -> "GGUFReader":
    """Return the opened file, all of whose tensors can be read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(
            f'model {name}: is a GGUF file, but gguf is not installed: pip install -e ".[gguf]"'
        ) from error
    try:
        reader = GGUFReader(file)
    except Exception as error:  # a damaged file fails in any of the ways of numpy and the package
        raise InputError(
            f"model {name}: is damaged or no GGUF file ({file.stat().st_size:,} bytes; {cause(error)}); "
            "download it again"
        ) from error
    parts = _value(reader, "split.count") or 1
    if parts > 1:
        raise InputError(
            f"model {name}: is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge` first"
        )
    unknown = sorted({tensor.tensor_type.name for tensor in reader.tensors} - TYPES)
    if unknown:
        raise InputError(
            f"model {name}: has tensors of type {', '.join(unknown)}, which cannot be read; get a file of another "
            "quantization, such as F16 or Q8_0"
        )
    return reader


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _write_plain(reader: "GGUFReader", out: Path) -> None:
    """Write a GGUF file's metadata and tensors with all tensors in float32, one at a time."""
    from gguf import GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    writer = GGUFWriter(out, arch=_value(reader, "general.architecture"))
    for key, field in reader.fields.items():
        if key == "general.architecture" or key.startswith("GGUF."):
            continue  # the writer writes its own
        kind = field.types[0]
        of = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(tensor.n_elements))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with track("dequantize", len(reader.tensors), "tensors") as meter:
        for tensor in reader.tensors:
            writer.write_tensor_data(dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False))
            meter.advance()
    writer.close()


def _set_pre_tokenizer(name: str, pre_tokenizer: str | None, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Split texts before they are merged as the file says, where transformers does not know how."""
    from tokenizers import pre_tokenizers

    # transformers splits as GPT-2 wherever it does not know the name.
    as_gpt_2 = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    if pre_tokenizer is None or pre_tokenizer in _LIKE_GPT_2 or not as_gpt_2:
        return
    if pre_tokenizer in _DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        log.warning(
            "model %s: its pre-tokenizer %s is unknown, so texts may be split into other tokens than in training; use "
            "the original model's tokenizer (data.tokenizer)",
            name, pre_tokenizer,
        )  # fmt: skip


def _set_bos(wanted: bool | None, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Begin texts with BOS where the file says so; transformers does not read that."""
    from tokenizers.processors import TemplateProcessing

    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if wanted and bos is not None and tokenizer("a").input_ids[:1] != [bos_id]:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )


def _check_tokens(name: str, reader: "GGUFReader", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a tokenizer that gives a control token another id than the file."""
    from gguf import TokenType

    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type") or []
    for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == TokenType.CONTROL and tokenizer.convert_tokens_to_ids(token) != token_id:
            raise InputError(
                f"model {name}: transformers reads its tokenizer wrongly: the token {token_id} ({token}) is "
                f"{tokenizer.convert_tokens_to_ids(token)} there; get the model as safetensors"
            )
