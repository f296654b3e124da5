"""A tokenizer of one token per byte makes every expected id countable by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.templates import encode_prompts, encode_texts, eos_token_id, render, render_prompt
from cpo_pipe.data.tokenizers import train_bpe

BOS, EOS = 256, 257


def byte_tokenizer(single: str | None = None, bos="<s>", eos="</s>", **kwargs) -> PreTrainedTokenizerFast:
    """Token id = position in the byte alphabet; `single` is the tokenizer's own frame, such as `<s> $A </s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if single:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **kwargs)


def test_plain_is_the_prompt_and_its_context():
    assert render("plain", " Why? ") == " Why? "
    assert render("plain", "Why?", "Because.") == "Why?\n\nBecause."


def test_dolly_with_and_without_context():
    without = render("dolly", "Name a bird.", "  ")
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a bird.\n\n### Response:\n"
    )
    assert render("dolly", "Name a bird.", "Blue.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a bird.\n\n### Input:\nBlue.\n\n### Response:\n"
    )


def test_own_template_fills_each_place_once_and_leaves_other_braces():
    assert render('{"q": "{prompt}"}', "{context} {x}") == '{"q": "{context} {x}"}'
    assert render("{context}|{prompt}|{prompt}", "p", "c") == "c|p|p"
    assert render("Q: {prompt}\nA:", "p", "c") == "Q: p\n\nc\nA:"


def test_chat_is_the_tokenizers_own():
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    chat = "{{ '<s>' }}" + turns + "{% if add_generation_prompt %}>{% endif %}"
    tokenizer = byte_tokenizer("<s> $A </s>", chat_template=chat)
    text, ids = render_prompt("chat", "Hi", "ctx", tokenizer)
    assert text == "<s>[user] Hi\n\nctx>"
    # one BOS: the one that the template wrote
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    assert EOS not in ids
    assert tokenizer.decode(ids) == text


def test_chat_without_a_chat_template_is_an_error():
    for tokenizer in (None, byte_tokenizer()):
        with pytest.raises(
            InputError, match=r"data\.template is chat, but the tokenizer has no chat template; use plain"
        ):
            render("chat", "Hi", "", tokenizer)


@pytest.mark.parametrize(
    ("frame", "before"), [(None, []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", []), ("</s> $A", [EOS])]
)
def test_prompt_keeps_what_stands_before_it_and_loses_what_is_appended(frame, before):
    tokenizer = byte_tokenizer(frame)
    (bare,) = encode_texts(["hé"], tokenizer)
    assert len(bare) == 3  # bytes
    assert tokenizer.decode(bare) == "hé"
    assert encode_prompts("plain", ["hé", "a"], tokenizer) == [
        [*before, *bare],
        [*before, *encode_texts(["a"], tokenizer)[0]],
    ]


def test_eos_id_and_its_absence():
    assert eos_token_id(byte_tokenizer()) == EOS
    with pytest.raises(InputError, match="it has no EOS token"):
        eos_token_id(byte_tokenizer(eos=None))


def test_trained_tokenizer_is_the_same_each_time_and_gives_back_any_text(tmp_path):
    texts = ["the cat sat on the mat", "the dog sat on the log"] * 3
    assert train_bpe(texts, 270, tmp_path / "a") == train_bpe(iter(texts), 270, tmp_path / "b") == 270
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    text = " Ünï  code\n\t🙂 , end ."
    (ids,) = encode_prompts("plain", [text], tokenizer)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens([eos_token_id(tokenizer), tokenizer.pad_token_id]) == ["<|endoftext|>"] * 2
    assert encode_prompts("plain", [""], tokenizer) == [[]]
