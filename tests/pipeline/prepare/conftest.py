"""A store, and tokenizers of one token per byte."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpo_pipe.data.models.train_tokenizer import train_bpe
from cpo_pipe.data.store import Store

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """One token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([], 257, folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """One token per byte from 4 on; BOS before every text, EOS after it; `<think>` is a token and not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.add_tokens(["<think>"])
    wrapped.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("chat")
    wrapped.save_pretrained(folder)
    return str(folder)
