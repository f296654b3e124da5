"""Continuations from a model with a tokenizer of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.answers import AnswerEncoder, text_behind
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, locate_tokenizer
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import plan_negatives
from cpo_pipe.pipeline.negatives.pool import PoolModelWork, other_tokenizer
from tests.support.pools import (
    CUT_EXAMPLE,
    PAIRS,
    Bench,
    bytes_tokenizer,
    metaspace_tokenizer,
    with_tokenizer,
    write,
)


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


@pytest.fixture(params=[bytes_tokenizer, metaspace_tokenizer])
def other_model(request: pytest.FixtureRequest, new_model: Callable[..., Path]) -> Path:
    """A model with a tokenizer of its own."""
    return with_tokenizer(new_model(seed=3, vocab_size=290, eos_token_id=1), request.param())


def sampling(folder: Path, store: Store, tokens: int = 8, top_k: int = 1) -> Sampling:
    ends = end_tokens(folder, locate_tokenizer(str(folder), store))
    return Sampling(temperature=1.0, top_k=top_k, max_new_tokens=tokens, stop_ids=ends)


@pytest.mark.parametrize("make", [bytes_tokenizer, metaspace_tokenizer])
def test_a_space_at_the_start_is_kept(make: Callable[[], Tokenizer]) -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    whole = own.encode("the quick brown fox")
    for place in range(1, len(whole)):
        prompt = own.decode(whole[:place])
        assert prompt + text_behind(whole[:place], whole[place:], own) == "the quick brown fox"
    spaced = next(place for place in range(len(whole)) if own.decode(whole[:place]) == "the quick")
    assert text_behind(whole[:spaced], whole[spaced:], own) == " brown fox"
    if make is metaspace_tokenizer:
        assert own.decode(whole[spaced:]) == "brown fox", "which is what it is about"


def test_a_model_is_sampled_in_its_own_tokens(bench: Bench, other_model: Path) -> None:
    found = bench.from_model(other_model, sampling(other_model, bench.store))
    own, network = locate_tokenizer(str(other_model), bench.store).load(), None
    network = AutoModelForCausalLM.from_pretrained(other_model).eval()
    for prompt, rows in found.items():
        inputs = own(prompt, return_tensors="pt", return_token_type_ids=False)
        output = network.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=1, pad_token_id=0)[0]
        written = output[inputs["input_ids"].shape[1] :].tolist()
        ends = written[-1] == 1
        text = own.decode(output, skip_special_tokens=True)[len(own.decode(inputs["input_ids"][0])) :]
        text = text if ends else text.rstrip("\ufffd")
        ids = bench.tokenizer.encode(text)
        ids = [*ids, 0] if ends and len(ids) < 8 else ids[:8]
        (row,) = rows
        assert row["token_ids"] == ids
        assert row["finish_reason"] == ("stop" if ids[-1] == 0 else "length")
        assert row["text"] == (text if len(bench.tokenizer.encode(text)) <= 8 else bench.tokenizer.decode(ids))
        assert row["logprob"] is None
        assert "transformers" in row["engine"]


def test_samples_depend_on_their_keys_alone(tmp_path: Path, tiny_model: Path, other_model: Path) -> None:
    roots = [tmp_path / name for name in "ab"]
    for root in roots:
        root.mkdir()
    bench = Bench(roots[0], tiny_model)
    settings = sampling(other_model, bench.store, top_k=0)
    first = bench.from_model(other_model, settings)
    assert bench.made == 6
    grown = bench.from_model(other_model, settings, count=3)
    assert bench.made == 12
    assert {prompt: rows[:1] for prompt, rows in grown.items()} == first
    again = Bench(roots[1], tiny_model, PAIRS[::-1])
    assert again.from_model(other_model, settings, count=3) == grown
    assert bench.from_model(other_model, settings, seed=1) != first
    assert bench.made == 6


def test_an_end_is_an_end_and_half_a_character_is_none(bench: Bench) -> None:
    text = "né🦊"
    whole, cut = AnswerEncoder(bench.tokenizer, {"template": "plain"}, continuations=True).encode(
        [CUT_EXAMPLE] * 2, [text, text], 99, [True, False]
    )
    assert (whole.token_ids, whole.ends) == ([*bench.tokenizer.encode(text), 0], True)
    assert (cut.token_ids, cut.ends) == (bench.tokenizer.encode(text), False)


def test_special_tokens_in_continuations_are_text_but_for_an_eos_at_the_end(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = bench.selection["prompt"].to_pylist()
    written = ["a<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>", "a", "b", "c"]
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, written, strict=True)]
    found = bench.from_file(write(tmp_path / "pool.jsonl", rows))
    (a, b, c), end = (bench.tokenizer.encode(text) for text in "abc"), 0
    inside = bench.tokenizer("a<|endoftext|>b", split_special_tokens=True)["input_ids"]
    assert [found[prompt][0]["token_ids"] for prompt in prompts] == [
        [*a, end], [*inside, end], [end], [*a, end], [*b, end], [*c, end],
    ]  # fmt: skip
    assert end not in inside
    assert [found[prompt][0]["text"] for prompt in prompts] == ["a", "a<|endoftext|>b", "", "a", "b", "c"]
    assert "pool.jsonl: 3 continuations have special tokens in their text; they are text to the model" in caplog.text


def test_a_prompt_without_room_is_refused(tmp_path: Path, tiny_model: Path, new_model: Callable[..., Path]) -> None:
    long = [{"prompt": "say 1 " * 20, "target": "a"}, {"prompt": "🦊", "target": "b"}]
    bench = Bench(tmp_path, tiny_model, [*PAIRS, *long])
    small = with_tokenizer(
        new_model(seed=3, vocab_size=290, eos_token_id=1, max_position_embeddings=32), bytes_tokenizer()
    )
    found = bench.from_model(small, sampling(small, bench.store, tokens=25), count=2)
    assert {len(rows) for prompt, rows in found.items() if prompt != long[0]["prompt"]} == {2}
    assert bench.refusals() == [("prompt too long", "sample:0"), ("prompt too long", "sample:1")]
    detail = bench.refused.read(bench.selection["example_id"].to_pylist())["detail"][0].as_py()
    assert detail.endswith(" tokens, of 32")
    bench.from_model(small, sampling(small, bench.store, tokens=25), count=2)
    assert bench.made == 0


def test_a_batch_of_nothing_but_long_prompts(tmp_path: Path, tiny_model: Path, new_model: Callable[..., Path]) -> None:
    bench = Bench(tmp_path, tiny_model)
    small = with_tokenizer(
        new_model(seed=3, vocab_size=290, eos_token_id=1, max_position_embeddings=8), bytes_tokenizer()
    )
    found = bench.from_model(small, sampling(small, bench.store))
    assert not any(found.values())
    assert len(bench.refusals()) == 6


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def test_a_chat_is_rendered_by_the_models_own_template(
    tmp_path: Path, new_model: Callable[..., Path], other_model: Path
) -> None:
    run_model = new_model(seed=9)
    config = json.loads((run_model / "tokenizer_config.json").read_text())
    (run_model / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    )
    bench = Bench(tmp_path, run_model, template="chat")
    with pytest.raises(InputError, match=r"model .*: data.template is chat, but its tokenizer has no chat template"):
        bench.from_model(other_model, sampling(other_model, bench.store), template="chat")
    own = PreTrainedTokenizerFast.from_pretrained(other_model)
    own.chat_template = CHAT
    own.save_pretrained(other_model)
    found = bench.from_model(other_model, sampling(other_model, bench.store), template="chat")
    network = AutoModelForCausalLM.from_pretrained(other_model).eval()
    for prompt, rows in found.items():
        inputs = own(f"<user>{prompt}<bot>", return_tensors="pt", return_token_type_ids=False)
        output = network.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=1, pad_token_id=0)[0]
        text = own.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.startswith(rows[0]["text"]), "an answer begins a text: without the space of its first token"


def test_a_date_in_the_models_own_template_is_recorded(
    tmp_path: Path, new_model: Callable[..., Path], other_model: Path
) -> None:
    run_model = new_model(seed=9)
    templates = {
        run_model: "{% for m in messages %}{{ m.content }}{% endfor %}",
        other_model: f"{{{{ strftime_now('%Y') }}}}{CHAT}",
    }
    for folder, template in templates.items():
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        loaded.chat_template = template
        loaded.save_pretrained(folder)
    bench = Bench(tmp_path, run_model, template="chat")
    config = Negatives.model_validate({"sources": {"other": {"strategy": "pool", "model": "other"}}})
    other = locate_model(str(other_model), bench.store)
    (job,) = plan_negatives(config, bench.store, bench.examples, lambda *_, **__: other, 8).jobs
    assert isinstance(job.work, PoolModelWork)
    assert job.work.chat_date == job.source.rows.spec["chat_date"] == chat_date(job.work.own_tokenizer, bench.store)


def test_which_tokenizer_is_another(bench: Bench, tmp_path: Path, other_model: Path, tiny_model: Path) -> None:
    def find(folder: Path) -> TokenizerFiles | None:
        return other_tokenizer(locate_model(str(folder), bench.store), bench.examples.tokenizer, bench.store)

    assert find(tiny_model) is None
    found = find(other_model)
    assert found is not None
    assert found.path == other_model
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model / name).read_bytes())
    assert find(bare) is None


@pytest.mark.parametrize(("kind", "doubled"), [("ByteLevel", False), ("Metaspace", False), ("Llama", True)])
def test_only_a_space_that_would_be_doubled_is_taken_off(kind: str, doubled: bool) -> None:
    """Of a text with a space at its start: indented code keeps its spaces where the tokenizer adds none to them."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}" if kind == "ByteLevel" else "\N{LOWER ONE EIGHTH BLOCK}"
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(["</s>", space, "a", "b"])}, []))
    if kind == "ByteLevel":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    elif kind == "Metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoder = AnswerEncoder(tokenizer, {"template": "plain"}, continuations=True)
    spaced, plain = encoder.encode([CUT_EXAMPLE] * 2, ["  b", "b"], 99, [True, True])
    assert plain.token_ids == [1, 3, 0]
    assert spaced.token_ids == [1, 1, 3, 0], "two spaces, of which one is the tokenizer's own"
    assert spaced.text == (" b" if doubled else "  b")
