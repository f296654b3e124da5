"""Tiny real models and tokenizers, made on the spot."""

from pathlib import Path


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 entries; `<|endoftext|>` (id 0) is EOS and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)


def make_model(folder: Path, *, seed: int = 0, architecture: str = "llama", **config: object) -> Path:
    """A model folder with random weights, scaled up so that its distribution is far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    sizes: dict[str, object] = {"vocab_size": 300, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    if architecture == "llama":
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
    elif architecture == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**sizes, **config}))
    model.save_pretrained(folder)
    return folder


def make_embedder(folder: Path) -> Path:
    """A sentence model of a few thousand weights: what embedded does not matter to a run that embeds nothing."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder / "bert").mkdir(parents=True)
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(32, 127)),
        *(f"##{chr(c)}" for c in range(33, 127)),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, models.Pooling(32)]).save(str(folder / "embedder"))
    return folder / "embedder"
