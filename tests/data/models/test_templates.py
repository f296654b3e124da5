"""A tokenizer of one token per byte makes every expected id countable by hand."""

import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from cpo_pipe.data.models.control_tokens import breaker, control_tokens, special_tokens
from cpo_pipe.data.models.templates import (
    encode_as_text,
    encode_prompts,
    encode_prompts_again,
    encode_targets,
    encode_texts,
    eos_token_id,
    render,
    without_eos,
)
from cpo_pipe.data.models.train_tokenizer import train_bpe

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
    text = ChatTemplate(tokenizer).prompt(Conversation.of_text("Hi\n\nctx"))
    (ids,) = encode_prompts("chat", [text], tokenizer)
    assert text == "<s>[user] Hi\n\nctx>"
    # one BOS: the one that the template wrote
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    assert EOS not in ids
    assert tokenizer.decode(ids) == text


def test_chat_without_a_chat_template_is_an_error():
    with pytest.raises(InputError, match=r"data\.template is chat, but the tokenizer has no chat template; use plain"):
        ChatTemplate(byte_tokenizer())


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


@pytest.mark.parametrize("frame", ["<s> $A", "<s> $A </s>"])
def test_a_template_that_writes_the_bos_gives_one(frame):
    tokenizer = byte_tokenizer(frame)
    (a,) = encode_texts(["a"], tokenizer)
    assert encode_prompts("<s>{prompt}", ["<s>a", "a", "", "<s>"], tokenizer) == [[BOS, *a], [BOS, *a], [BOS], [BOS]]
    assert encode_prompts("<s>{prompt}", ["<s>a"], byte_tokenizer()) == [[BOS, *a]], "the template's alone"


def test_eos_id_and_its_absence():
    assert eos_token_id(byte_tokenizer()) == EOS
    with pytest.raises(InputError, match=r"data\.tokenizer .*it has no EOS token"):
        eos_token_id(byte_tokenizer(eos=None))
    with pytest.raises(InputError, match=r"^evaluate\.judges\.x\.model .*it has no EOS token"):
        eos_token_id(byte_tokenizer(eos=None), "evaluate.judges.x.model")


# ── control tokens as text ───────────────────────────────────────────────────────────────────────────────────────


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Its vocabulary holds `</s>`, which it finds in a text even where special tokens are to be split."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), (">", -2.0), *((char, -2.0) for char in "ab</s> ")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


MARKS = ["<s>", "</s>", "<|end|>", "<<", "||", "<｜User｜>", "§"]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Control tokens that overlap with themselves and others, one of a character, and one that is not special."""
    tokenizer = byte_tokenizer("<s> $A", chat_template="<｜User｜>{{ messages[0].content }}<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<<", "||", "§"]})
    tokenizer.add_tokens(["<｜User｜>", "content", "<b>", AddedToken("  ", normalized=False)])
    return tokenizer


CHAT = chat_tokenizer()


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "<s>a</s> </s>", "a"])
@pytest.mark.parametrize("make", [byte_tokenizer, chat_tokenizer, ByT5Tokenizer, unigram_tokenizer])
def test_a_control_token_in_a_text_is_text(make, text):
    tokenizer = make()
    (ids,) = encode_as_text([text], tokenizer)
    assert tokenizer.eos_token_id not in ids
    if make is unigram_tokenizer:  # has no other way to write it
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    else:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, "not one special token, and nothing else"
    assert (tokenizer.eos_token_id in encode_texts([text], tokenizer)[0]) == ("</s>" in text)


@given(st.lists(st.sampled_from(["<", ">", "s", "/s", "|", "User", "｜", "é", " a", "\n", "content"])).map("".join))
def test_texts_without_control_tokens_are_encoded_as_they_are(text):
    assume(not any(mark in text for mark in MARKS))
    plain = encode_texts([text], CHAT)
    assert encode_targets([text], CHAT) == plain
    assert encode_as_text([text], CHAT) == plain


def test_in_targets_special_tokens_are_text_and_other_marks_are_not():
    ids, *_ = encode_targets(["a</s><s>b<｜User｜>§", "a"], CHAT)
    special = {token_id for text, token_id in control_tokens(CHAT).items() if text != "<｜User｜>"}
    assert special.isdisjoint(ids)
    assert CHAT.convert_tokens_to_ids("<｜User｜>") in ids
    assert special_tokens(CHAT).keys() == set(MARKS) - {"<｜User｜>"}


def test_a_character_that_is_unknown_is_no_control_token():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    assert encode_targets(["a z b", "a </s> z"], tokenizer) == [[1, 0, 2], [1, 0, 0, 0]], "`< /s>` is two words"
    assert encode_as_text(["a z b"], tokenizer) == [[1, 0, 2]]
    gpt2 = byte_tokenizer(bos="</s>", unk_token="</s>")
    assert EOS not in encode_targets(["a</s>b"], gpt2)[0], "of GPT-2 all special tokens are one"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("a</s>", "a"),
        ("a </s>\n</s> ", "a "),
        ("</s>", ""),
        ("a</s>b", "a</s>b"),
        ("a\n", "a\n"),
        ("</s>a</s>", "</s>a"),
    ],
)
def test_an_eos_written_at_the_end_is_taken_off(text, without):
    assert without_eos(text, byte_tokenizer()) == without
    assert without_eos(text, byte_tokenizer(eos=None)) == text


def test_many_written_eos_are_taken_off_in_bounded_time():
    start = time.process_time()
    assert without_eos("</s>" * 20_000 + "x", byte_tokenizer()) == "</s>" * 20_000 + "x"
    assert without_eos("a" + "</s>\n" * 20_000, byte_tokenizer()) == "a"
    assert time.process_time() - start < 5


def test_a_character_of_texts_that_is_declared_as_padding_is_text():
    """Its token is that of the vocabulary."""
    tokenizer = byte_tokenizer()
    (plain,) = encode_texts(["Hi! there"], tokenizer)
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert "!" not in special_tokens(tokenizer)
    assert encode_targets(["Hi! there"], tokenizer) == encode_as_text(["Hi! there"], tokenizer) == [plain]
    assert breaker(tokenizer)("Hi! there</s>") == "Hi! there< /s>"


def test_prompts_for_another_tokenizer_have_its_control_tokens_as_text():
    tokenizer = byte_tokenizer("<s> $A", chat_template="<s>{{ messages[0].content }}")
    (text,) = encode_texts(["< /s>a"], tokenizer)
    texts = ["</s>a"]
    asked = [Conversation.of_text("</s>a")]
    assert encode_prompts_again("chat", asked, ["nothing of it"], tokenizer) == [[BOS, *text]]
    assert encode_prompts_again("plain", asked, texts, tokenizer) == [[BOS, *text]]
    assert encode_prompts_again("</s>{prompt}", asked, texts, tokenizer) == [[BOS, EOS, *text[-1:]]], (
        "the template's own"
    )


def test_what_is_a_control_token():
    assert set(control_tokens(chat_tokenizer())) == set(MARKS)
    assert control_tokens(byte_tokenizer()) == {"<s>": BOS, "</s>": EOS}
    tokenizer = chat_tokenizer()
    (ids,) = encode_as_text(["a<｜User｜>b<b>"], tokenizer)
    assert tokenizer.convert_tokens_to_ids("<｜User｜>") not in ids
    assert tokenizer.convert_tokens_to_ids("<b>") in ids, "is no mark of a conversation"
    assert tokenizer.decode(ids) == "a< ｜User｜>b<b>"


@given(st.lists(st.sampled_from([*MARKS, *"<>|s/ a", "end", "User", "｜", "\n"])).map("".join))
def test_no_control_token_survives_breaking(text):
    broken = breaker(CHAT)(text)
    assert not any(mark in broken for mark in MARKS)
    assert broken.replace(" ", "") == text.replace("§", "").replace(" ", ""), "only spaces are put in"
    if not any(mark in text for mark in MARKS):
        assert broken == text
    (ids,) = encode_texts([broken], CHAT)
    assert set(control_tokens(CHAT).values()).isdisjoint(ids)


def test_breaking_for_a_tokenizer_without_control_tokens():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    assert breaker(bare)("a</s>") == "a</s>"
    assert breaker(byte_tokenizer())("</s></s") == "< /s></s"


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
