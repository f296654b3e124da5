"""Tokenizers made from the data."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cpo_pipe.data.models.train_tokenizer import END_OF_TEXT, LONGEST_WORD, train_bpe


def plainly_trained(texts: list[str], vocab_size: int) -> Tokenizer:
    """As the library does it, without regard to long words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_words_that_are_not_too_long_are_learnt_as_the_library_does(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdé\u65e5\u0000", k=rng.randint(1, 12))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=50)) + rng.choice(["\n\n\r\n", "  ", "!?", "\x85\u2028"]) for _ in range(40)]
    texts += ["x" * LONGEST_WORD, " " * 3000, "#" * 3000, "\u65e5" * (LONGEST_WORD // 3)]
    train_bpe(texts, 500, tmp_path)
    trained = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    plain = json.loads(plainly_trained(texts, 500).to_str())
    assert trained["model"]["merges"]
    for part in ("model", "pre_tokenizer", "decoder", "normalizer", "added_tokens"):
        assert trained[part] == plain[part]


def test_one_word_of_300_kilobytes_takes_seconds(tmp_path: Path) -> None:
    """It took minutes: the trainer's time grows with the square of a word's length."""
    word = "a" * 300_000
    start = time.process_time()
    assert train_bpe(["hello world " * 50, word], 300, tmp_path) > 257
    assert time.process_time() - start < 10
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(word).ids) == word


LONG_TRAINING = """
import random, signal, sys
from pathlib import Path
from cpo_pipe.data.models.train_tokenizer import train_bpe

def texts():
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000)
    yield "".join(letters)
    print("reading is done", flush=True)

signal.signal(int(sys.argv[2]), lambda *_: sys.exit(3))
train_bpe(texts(), 5000, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_at_once(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", LONG_TRAINING, str(tmp_path), str(int(number))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading is done\n"
        process.send_signal(number)
    assert process.returncode == -number, "not the handler, which waits for the training"
    assert not list(tmp_path.iterdir())


def test_handlers_are_back_after_a_training(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train_bpe(["hello"], 300, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
