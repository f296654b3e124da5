"""Tokenizers made from the data: a byte-level BPE, identified by its corpus."""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from cpo_pipe.data.config import Section
from cpo_pipe.data.fingerprint import Spec, tokenizer_fingerprint
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import ArtifactWriter, Store


class TrainedTokenizer(Section):
    """A byte-level BPE tokenizer made from the data."""

    vocab_size: int = Field(gt=256, description="entries in the vocabulary")


log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 4000
"""The longest word that the trainer sees, in bytes: its time grows with the square of the length."""


class TrainedBPE:
    """The tokenizer of a corpus, kept as a store artifact of the kind `tokenizers`.

    It is trained on the whole corpus, including validation and test rows: the split depends on which rows are rejected
    and, for cut text, on where it is cut, and both depend on the tokenizer. It learns only which strings are frequent.
    """

    def __init__(self, corpus: Spec, vocab_size: int, store: Store):
        """`corpus` identifies the texts; a small corpus fills fewer than `vocab_size` entries."""
        spec = {"corpus": corpus, "vocab_size": vocab_size, "algorithm": "byte-level-bpe"}
        self._artifact = store.artifact("tokenizers", spec)
        self._vocab_size = vocab_size
        self._hash_file = store.hash_file

    def found(self) -> TokenizerFiles | None:
        """Return the tokenizer if it was trained before."""
        if not self._artifact.complete():
            return None
        return TokenizerFiles(self._artifact.path, tokenizer_fingerprint(self._artifact.path, self._hash_file))

    def trained(self, texts: Iterable[str]) -> TokenizerFiles:
        """Return the tokenizer; train it on the corpus's `texts` if it is missing."""

        def train(writer: ArtifactWriter) -> None:
            entries = writer.facts["vocab_size"] = train_bpe(texts, self._vocab_size, writer.path)
            log.info("tokenizer: trained a byte-level BPE with %s entries (%s)", f"{entries:,}", self._artifact.name)

        self._artifact.make(train)
        return TokenizerFiles(self._artifact.path, tokenizer_fingerprint(self._artifact.path, self._hash_file))


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE and save it as a transformers tokenizer; return the number of its entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with _ended_by_signals():
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the process directly: Python's handlers would wait until the trainer (Rust) returns.

    Nothing is lost: the tokenizer is saved after the training.
    """
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
