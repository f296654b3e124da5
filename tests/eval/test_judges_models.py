"""Judges that run a model here, against transformers' own logits and loss on tiny models."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.executor import LocalExecutor
from cpo_pipe.data.fingerprint import tokenizer_fingerprint
from cpo_pipe.data.models import Model, TokenizerFiles, locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.eval.judges.base import Case, Judgement, Pair, judged
from cpo_pipe.eval.judges.likelihood import LikelihoodJudge
from cpo_pipe.eval.judges.local import LocalJudge
from cpo_pipe.eval.judges.query import Query
from cpo_pipe.trainer.logprobs import cached_logprobs, read_logprobs

TEMPLATE = "{prompt}|{output_a}|{output_b}:"


class Bench:
    """A model with its tokenizer, and a store that its log-probs are kept in."""

    def __init__(self, root: Path, folder: Path):
        self.store = Store(root)
        self.model = locate_model(str(folder), self.store)
        self.tokenizer = TokenizerFiles(folder, tokenizer_fingerprint(folder, self.store.hash_file))
        self.scored: list[int] = []
        """Rows of each call."""

    def logprobs(self, model: Model, groups: pa.Table) -> list[float]:
        self.scored.append(groups.num_rows)
        values: list[float] = read_logprobs(
            cached_logprobs(self.store, model, "float32", groups, LocalExecutor()), groups
        ).tolist()
        return values

    def likelihood(self, template: str = "plain") -> LikelihoodJudge:
        return LikelihoodJudge("likelihood", self.model, self.tokenizer, template, self.logprobs)

    def local(self, template: str = TEMPLATE, both_orders: bool = True) -> LocalJudge:
        return LocalJudge("local", self.model, self.tokenizer, Query(template), both_orders, self.logprobs)

    def judged(self, judge: LocalJudge | LikelihoodJudge, pairs: Sequence[Pair]) -> list[Judgement]:
        return judged(judge, pairs, self.store.rows("verdicts", judge.spec()))


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


def case(number: int) -> Case:
    return Case(f"e{number}", f"the fox {number}", f"say the fox {number}:", "target")


OUTPUTS = [" the dog", "", " jumps over the lazy dog", "Ä\x00<b>", " the dog"]


# ── likelihood ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_likelihood_is_minus_transformers_loss(bench: Bench) -> None:
    network, tokenizer = (kind.from_pretrained(bench.model.path) for kind in (AutoModelForCausalLM, AutoTokenizer))
    cases = [case(0), case(1), case(0), case(2), case(0)]
    scores = bench.likelihood().scores(cases, OUTPUTS)
    for one, output, score in zip(cases, OUTPUTS, scores, strict=True):
        prompt, written = tokenizer.encode(one.rendered), [*tokenizer.encode(output), 0]
        ids, labels = torch.tensor([prompt + written]), torch.tensor([[-100] * len(prompt) + written])
        with torch.no_grad():
            loss = network(input_ids=ids, labels=labels).loss.item()
        assert score == pytest.approx(-loss, rel=1e-4)
    assert bench.scored == [3], "of case 0 and what stands twice one group"


def test_the_likelier_output_wins(bench: Bench) -> None:
    judge = bench.likelihood()
    pairs = [Pair(case(k), a, b) for k in range(3) for a, b in [(OUTPUTS[0], OUTPUTS[2]), (OUTPUTS[2], OUTPUTS[1])]]
    found = bench.judged(judge, pairs)
    scores = [[judge.scores([pair.case], [text])[0] for text in (pair.output_a, pair.output_b)] for pair in pairs]
    assert [judgement.winner for judgement in found] == ["a" if a > b else "b" for a, b in scores]
    assert found[0].by_order["ab"].raw == pytest.approx({"a": scores[0][0], "b": scores[0][1]})
    assert {judgement.flipped for judgement in found} == {None}, "it sees no order"


def test_likelihood_needs_room(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    bench = Bench(tmp_path, new_model(max_position_embeddings=16))
    with pytest.raises(
        InputError, match=r"evaluate.judges.likelihood.model .*: its context is 16 tokens, but the longest"
    ):
        bench.likelihood().scores([case(0)], ["x" * 20])


# ── local ────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(folder: Path, query: str) -> float:
    """P(A) from the softmax after the query, over both letters with and without a space before them."""
    network, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.encode(query, add_special_tokens=False)

    def logprob(continuation: str) -> float:
        total, so_far = 0.0, list(ids)
        for token in tokenizer.encode(continuation, add_special_tokens=False):
            with torch.no_grad():
                total += torch.log_softmax(network(torch.tensor([so_far])).logits[0, -1], -1)[token].item()
            so_far.append(token)
        return total

    p = {letter: sum(torch.tensor(logprob(space + letter)).exp().item() for space in ("", " ")) for letter in "AB"}
    return p["A"] / (p["A"] + p["B"])


def test_the_probability_of_the_letter_a(bench: Bench) -> None:
    pairs = [Pair(case(k), f" the dog {k}", " over the lazy dog") for k in range(4)]
    found = bench.judged(bench.local(), pairs)
    for pair, judgement in zip(pairs, found, strict=True):
        first = by_hand(bench.model.path, Query(TEMPLATE)(pair))
        second = 1 - by_hand(bench.model.path, Query(TEMPLATE)(pair.swapped()))
        assert judgement.by_order["ab"].p_a == pytest.approx(first, rel=1e-4)
        assert judgement.by_order["ba"].p_a == pytest.approx(second, rel=1e-4)
        assert judgement.p_a == pytest.approx((first + second) / 2, rel=1e-4)
        assert judgement.winner == ("a" if first + second > 1 else "b")
    assert len({judgement.winner for judgement in found} | {judgement.flipped for judgement in found}) > 2, "varied"
    assert bench.scored == [8], "one call for all"
    bench.judged(bench.local(), [pair.swapped() for pair in pairs])
    assert bench.scored == [8], "nothing is computed again"


def test_a_query_as_a_message_where_there_is_a_chat_template(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    folder = new_model()
    plain = Bench(tmp_path / "plain", folder).local().spec()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    bench = Bench(tmp_path / "chat", folder)
    pair = Pair(case(0), " the dog", " the fox")
    (judgement,) = bench.judged(bench.local(both_orders=False), [pair])
    (order,) = judgement.by_order
    shown = pair if order == "ab" else pair.swapped()
    expected = by_hand(folder, f"<user>{Query(TEMPLATE)(shown)}<assistant>")
    assert judgement.p_a == pytest.approx(expected if order == "ab" else 1 - expected, rel=1e-4)
    assert bench.local().spec() != plain, "another template of the tokenizer is another judge"


def test_a_letter_that_a_tokenizer_joins_to_the_query_counts_where_it_does_not(
    tmp_path: Path, new_model: Callable[..., Path]
) -> None:
    """Where `:A` and `:B` are tokens, only ` A` and ` B` may follow a colon; where `: A` and `: B` are, too, none."""
    bench = Bench(tmp_path, new_model(vocab_size=310))
    tokenizer = AutoTokenizer.from_pretrained(bench.model.path)
    tokenizer.add_tokens([":A", ":B"])
    tokenizer.save_pretrained(bench.model.path)
    pair = Pair(case(0), " the dog", " the fox")
    network = AutoModelForCausalLM.from_pretrained(bench.model.path)
    ids = tokenizer.encode(Query(TEMPLATE)(pair))
    spaced = [tokenizer.encode(f" {letter}") for letter in "AB"]
    with torch.no_grad():
        logprobs = [
            torch.log_softmax(network(torch.tensor([ids + letter])).logits[0], -1)[
                range(len(ids) - 1, len(ids) + len(letter) - 1), letter
            ].sum()
            for letter in spaced
        ]
    ((place, verdict),) = next(bench.local().judge([pair]))
    assert place == 0
    assert verdict.p_a == pytest.approx(torch.softmax(torch.stack(logprobs), 0)[0].item(), rel=1e-4)
    tokenizer.add_tokens([": A", ": B"])
    tokenizer.save_pretrained(bench.model.path)
    with pytest.raises(InputError, match=r"evaluate.judges.local.template: the tokenizer of .* joins the letter A to"):
        next(bench.local().judge([pair]))


def test_a_query_beyond_the_context_is_no_verdict(bench: Bench) -> None:
    pairs = [Pair(case(0), " the dog", "x" * 200), Pair(case(1), " the dog", " the fox")]
    long, short = bench.judged(bench.local(), pairs)
    assert (long.winner, long.unparseable, long.p_a) == ("tie", 1, None)
    assert long.by_order["ab"].raw["unparseable"] == "too long"
    assert short.p_a is not None
