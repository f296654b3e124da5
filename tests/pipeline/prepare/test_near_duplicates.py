import random

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.pipeline.prepare.near_duplicates import jaccard, near_duplicate_groups, with_keys
from cpo_pipe.pipeline.prepare.ngrams import word_ngrams, words
from tests.support.texts import changed, text


def groups(texts, threshold=0.5):
    """The groups of more than one text, as sets of places."""
    chunks = [pa.array(texts[start : start + 7]) for start in range(0, len(texts), 7)]
    found = near_duplicate_groups("texts", pa.chunked_array(chunks, pa.string()), threshold).tolist()
    members = {}
    for place, group in enumerate(found):
        members.setdefault(group, []).append(place)
    assert all(group == min(places) for group, places in members.items())
    return [set(places) for places in members.values() if len(places) > 1]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("What's  Tom's\nname?", ["what", "s", "tom", "s", "name"]),
        ("3 + 5 - 2 × 7 = $1,200.50.", ["3", "+", "5", "-", "2", "×", "7", "=", "$", "1,200.50"]),
        ("1.5 and 1,5; 15", ["1.5", "and", "1,5", "15"]),
        ("東京 は Tokyo", ["東", "京", "は", "tokyo"]),
        ("«Straße» \ufb01n e\u0301t\u00e9", ["strasse", "fin", "été"]),
        ("?!", []),
    ],
)
def test_words(written, read):
    assert words(written) == read


def test_ngrams_are_sets_of_runs_in_order():
    def same(one, other, n=2):
        return word_ngrams(one.split(), n).tolist() == word_ngrams(other.split(), n).tolist()

    assert len(word_ngrams(["a", "b", "a", "b", "a"], 2)) == 2
    assert same("a b a b a", "b a b")
    assert not same("a b c", "c b a")
    assert not same("ab c", "a bc")
    assert len(word_ngrams(["a"], 2)) == 0
    assert len(word_ngrams(["a", "b", "c"], 3)) == 1


def test_planted_near_duplicates_are_all_found_and_no_others():
    originals = [text(seed) for seed in range(300)]
    copies = [
        *(changed(original, 20) for original in originals[:20]),  # 37 of 41 bigrams
        *(changed(original, 5, 15, 25) for original in originals[20:40]),  # 33 of 45
        *(changed(original, 3, 10, 17, 24, 31, 38) for original in originals[40:60]),  # 27 of 51: 0.53
        *(original.upper().replace(" ", ",\n") + "!" for original in originals[60:80]),
        *(" ".join(original.split()[::-1]) for original in originals[80:100]),
        *(" ".join(original.split()[:20]) + " " + text(1000 + n, 20) for n, original in enumerate(originals[100:120])),
    ]
    planted = [{n, 300 + n} for n in range(80)]
    assert groups([*originals, *copies]) == planted, "neither words in reverse nor a half of the words"
    strict = groups([*originals, *copies], 0.7)
    assert strict == [*planted[:40], *planted[60:]]
    assert groups([*originals, *copies], 1.0) == planted[60:]


def test_groups_do_not_depend_on_the_order_of_the_texts():
    rng = random.Random(0)
    texts = [changed(text(n // 3), *rng.sample(range(40), n % 3 * 3)) for n in range(90)]
    order = rng.sample(range(90), 90)
    shuffled = groups([texts[place] for place in order])
    assert {frozenset(order[place] for place in group) for group in shuffled} == set(map(frozenset, groups(texts)))
    assert len(shuffled) == 30


def test_a_chain_is_one_group():
    """The first and the last have too little in common; each is near its neighbour."""
    chain = [text(0)]
    for step in range(1, 6):
        chain.append(changed(chain[-1], *range(step * 6, step * 6 + 6)))
    ends = [word_ngrams(words(one), 2) for one in (chain[0], chain[-1])]
    assert jaccard(*ends) < 0.2
    assert groups([text(1), *chain, text(2)]) == [{1, 2, 3, 4, 5, 6}]


def test_short_texts_need_the_same_words():
    short = ["What is the capital of France?", "what is the capital of France", "What is the capital of Spain?",
             "What is 3 + 5?", "What is 3 - 5?", "What is 1.5?", "What is 1,5?", "?", "!", "…"]  # fmt: skip
    assert groups(short) == [{0, 1}]
    assert groups([text(0, 15), changed(text(0, 15), 14)]) == [], "14 bigrams"
    assert groups([text(0, 16), changed(text(0, 16), 15)]) == [{0, 1}], "15 bigrams"


def test_what_many_texts_share_does_not_group_them():
    instructions = text(0, 60)
    texts = [f"{instructions} {text(n, 16)}" for n in range(1, 41)]
    assert groups(texts) == []
    assert groups([*texts, changed(texts[3], 66)]) == [{3, 40}], "the rest is compared"
    assert groups([f"{instructions} {text(n, 5)}" for n in range(1, 41)]) == [], "the rest is short"
    assert groups(texts[:10]) == [set(range(10))], "10 may be copies"


def test_no_texts():
    assert groups([]) == []


def test_with_keys_joins_groups_by_a_common_key():
    labels = with_keys(np.array([0, 1, 0, 3, 4]), ["a", "b", "b", "c", "d"])
    assert labels[0] == labels[1] == labels[2]
    assert len({labels[0], labels[3], labels[4]}) == 3
