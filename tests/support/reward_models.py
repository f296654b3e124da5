"""Tiny reward models with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

from tests.support.chat_templates import CHATML
from tests.support.models import make_tokenizer

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 96, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 96, "initializer_range": 0.3, "type_vocab_size": 2}  # fmt: skip


def make_reward_model(folder: Path, architecture: str = "llama", chat: bool = False, **config: Any) -> Path:
    """A sequence classifier with one output; `chat` gives its tokenizer a chat template."""
    if architecture == "bert":
        make_bert_tokenizer(folder)
    else:
        make_tokenizer(folder)
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder)
    sizes = {"llama": LLAMA, "bert": BERT}[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoConfig.for_model(architecture, **{"vocab_size": 310, "num_labels": 1, **sizes, **config})
        AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    return folder


def make_bert_tokenizer(folder: Path) -> None:
    """One token a character, with the type of the text that it is in."""
    folder.mkdir(parents=True)
    characters = [character for code in range(33, 127) for character in (chr(code), f"##{chr(code)}")]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
