"""SentencePiece models as tokenizers that encode exactly as SentencePiece itself does.

transformers 5 has no tokenizer that calls SentencePiece for the Llama family (`use_fast=False` is ignored). Its
conversion of a `tokenizer.model` ignores the model's normalizer: repeated spaces stay where the normalizer drops them
(OpenLLaMA), and a space at the start of a text is lost where it does not. So the tokenizer is made here, and compared
with SentencePiece.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.models.tokenizer import TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MODEL_FILE = "tokenizer.model"

TEXTS = (
    "Hello world", " Hello", "  Hello", "Hello  world", "a   b    c", "trailing ", "trailing  ", " ", "  ", "\t", "\n",
    "a\nb", "a\n\nb\n", "a\n b", "a \n  b", "\n\n\n   \n", "a\tb\r\nc", "def f(x):\n    return x\n\n\n    # done\n",
    f"x{' ' * 40}y", "thermal tasks", "12345 3.14", "...  !!", "naïve café", "cafe\u0301", "“quoted” – ﬁne ½ ①",
    "ＡＢＣ", "日本語 テスト", "日本  語", "🦊🐶 👩\u200d👧", "Привет  мир", "a\u00a0b", "a\u3000b", "a\u200bb",
    "\ufeffBOM", "x\u2028y",
)  # fmt: skip
"""Texts that conversions of SentencePiece models often encode differently."""

_BPE, _NORMAL, _USER_DEFINED = 2, 1, 4
"""Numbers of SentencePiece's enumerations: a model type and two piece types."""


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json that encodes as the folder's SentencePiece model does, if the folder has one.

    A tokenizer.json that already does so is not changed. Control tokens written in a text, such as `</s>`, are tokens
    to transformers and only text to SentencePiece.

    Args:
        folder: a model's, with config.json and the tokenizer's files.

    Raises:
        InputError: sentencepiece is not installed, or no tokenizer.json can encode as the model does.
    """
    file = folder / MODEL_FILE
    if not file.is_file():
        return
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as pieces
    except ImportError as error:
        raise InputError(
            f"{MODEL_FILE} is a SentencePiece model, but sentencepiece is not installed: "
            'pip install -e ".[sentencepiece]"'
        ) from error
    from transformers import PreTrainedTokenizerFast

    try:
        truth = SentencePieceProcessor(model_file=str(file))
        proto = pieces.ModelProto.FromString(file.read_bytes())
    except Exception as error:  # its failures have no common type
        raise InputError(f"{MODEL_FILE}: no SentencePiece model ({cause(error)}); download it again") from error
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    texts = [*TEXTS, *(f"a{symbol}b" for symbol in symbols)]
    original = TokenizerFiles(folder, "").load()
    if (folder / "tokenizer.json").is_file() and _difference(original, truth, texts) is None:
        return
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(f"{MODEL_FILE}: only SentencePiece's BPE models are converted; give a tokenizer.json with it")
    backend = _converted(proto, original.backend_tokenizer)
    special = {key: token for key, token in original.special_tokens_map.items() if isinstance(token, str)}
    written = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        **special,
        chat_template=original.chat_template,
        model_max_length=original.model_max_length,
        padding_side=original.padding_side,
        clean_up_tokenization_spaces=False,
    )
    if written.get_vocab() != original.get_vocab():
        raise InputError(f"{MODEL_FILE}: its pieces contradict the added tokens of the folder; remove these")
    text = _difference(written, truth, texts)
    if text is not None:
        raise InputError(f"{MODEL_FILE}: no tokenizer.json encodes {text!r} as it does; take another model")
    if proto.normalizer_spec.precompiled_charsmap:
        log.warning(
            "%s: tokenizer.json may normalize rare combinations of characters otherwise than it does (%s)",
            *(MODEL_FILE, proto.normalizer_spec.name),
        )
    written.save_pretrained(folder)
    log.info("tokenizer: wrote tokenizer.json from %s; it encodes %d texts as the model does", MODEL_FILE, len(texts))


def _difference(tokenizer: "PreTrainedTokenizerBase", truth: Any, texts: list[str]) -> str | None:
    """Return the first text that is not encoded as SentencePiece does, or None."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return next((text for text, ids in zip(texts, encoded, strict=True) if ids != truth.encode(text)), None)


def _converted(proto: Any, given: "Tokenizer") -> "Tokenizer":
    """Return a SentencePiece model as a tokenizer, with the added tokens and the BOS of another one.

    Args:
        proto: the model.
        given: the tokenizer that has the added tokens and the BOS.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = sorted(
        ((-score, ids[left], ids[right]), (left, right))
        for piece, score in scores.items()
        for left, right in ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        if left in scores and right in scores
    )
    converted = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for _, pair in merges],
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    rules = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    converted.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", left=1, right=0))
    converted.decoder = decoders.Sequence(decoding)
    for _, token in sorted(given.get_added_tokens_decoder().items()):
        # Found before the text is normalized: a normalized token would be looked for with the space before a text.
        flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
        converted.add_tokens([AddedToken(token.content, normalized=False, special=token.special, **flags)])
    if given.post_processor is not None:
        converted.post_processor = given.post_processor
    return converted
