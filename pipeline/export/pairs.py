"""The preference pairs of groups."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.control_tokens import control_tokens
from cpo_pipe.data.models.templates import eos_token_id
from cpo_pipe.data.text import listed, nearest
from cpo_pipe.pipeline.export.trl_tokens import PromptedCandidate, WrittenCandidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
"""Labels of the chosen and the rejected."""
Write = Callable[[Sequence[PromptedCandidate]], Sequence[WrittenCandidate]]
EXAMPLE_COLUMNS = ["prompt", "rendered", "messages"]
"""Columns of the EXAMPLES schema that pairs are made of."""


@dataclass
class PairCounts:
    """What an export contains."""

    groups: int = 0
    pairs: Counter[Pair] = field(default_factory=Counter)
    endless: int = 0
    """Pairs omitted because a text does not end."""
    equal: int = 0
    """Pairs omitted because both texts are equal, in other token ids."""
    texts: int = 0
    other_ids: int = 0
    """Texts that TRL tokenizes to other ids than they have in their group."""


def parse_pairs(texts: Sequence[str], known: Sequence[str]) -> list[Pair]:
    """Return the pairs that `CHOSEN,REJECTED` texts name.

    Args:
        texts: as given on the command line.
        known: the labels of candidates.

    Raises:
        InputError: a text is not a pair, a label is unknown, or a pair is given twice.
    """
    pairs: list[Pair] = []
    for text in texts:
        labels = text.split(",")
        if len(labels) != 2:
            raise InputError(f"--pair {text}: must be CHOSEN,REJECTED, such as target,{known[-1]}")
        for label in labels:
            if label not in known:
                hint = nearest(label, known) or f"choose from {listed(known)}"
                raise InputError(f"--pair {text}: unknown label {label!r}; {hint}")
        chosen, rejected = labels
        if chosen == rejected:
            raise InputError(f"--pair {text}: chosen and rejected must differ")
        if {(chosen, rejected), (rejected, chosen)} & set(pairs):
            raise InputError(f"--pair {text}: duplicate pair, perhaps reversed; remove one")
        pairs.append((chosen, rejected))
    return pairs


def pair_rows(
    groups: Sequence[dict[str, Any]],
    examples: Sequence[dict[str, Any]],
    pairs: Sequence[Pair],
    write: Write,
    tokenizer: "PreTrainedTokenizerBase",
    counts: PairCounts,
) -> Iterator[dict[str, Any]]:
    """Yield the pairs of some groups, in their order.

    Args:
        groups: the groups.
        examples: each group's example, with the columns `EXAMPLE_COLUMNS`.
        pairs: which pairs; empty: the target with each negative.
        write: writes candidates as texts or as messages.
        tokenizer: of the examples.
        counts: updated in place.
    """
    # A sample may end by another control token than EOS, such as one that ends a turn.
    no_end = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    ends = {eos_token_id(tokenizer), *(set(control_tokens(tokenizer).values()) - no_end)}
    places: list[list[tuple[int, int]]] = []
    for group in groups:
        asked = _places([candidate["strategy"] for candidate in group["candidates"]], pairs)
        ended = [bool(ends & {*candidate["token_ids"][-1:]}) for candidate in group["candidates"]]
        places.append([pair for pair in asked if all(ended[place] for place in pair)])
        counts.endless += len(asked) - len(places[-1])
    used = [(row, place) for row, of_row in enumerate(places) for place in sorted({p for pair in of_row for p in pair})]
    conversations = [Conversation.of_example(example) for example in examples]
    candidates = []
    for row, place in used:
        candidate = groups[row]["candidates"][place]
        candidates.append(PromptedCandidate(
            conversations[row], examples[row]["rendered"], groups[row]["prompt_ids"], candidate["text"],
            candidate["token_ids"],
        ))  # fmt: skip
    written = write(candidates)
    counts.texts += len(written)
    counts.other_ids += sum(not candidate.same_ids for candidate in written)
    texts = dict(zip(used, written, strict=True))
    for row, (group, of_row) in enumerate(zip(groups, places, strict=True)):
        before = counts.pairs.total()
        for chosen_place, rejected_place in of_row:
            chosen, rejected = group["candidates"][chosen_place], group["candidates"][rejected_place]
            if texts[row, chosen_place].completion == texts[row, rejected_place].completion:
                counts.equal += 1
                continue
            counts.pairs[chosen["strategy"], rejected["strategy"]] += 1
            yield {
                "prompt": texts[row, chosen_place].prompt,
                "chosen": texts[row, chosen_place].completion,
                "rejected": texts[row, rejected_place].completion,
                "tools": texts[row, chosen_place].tools,
                "example_id": group["example_id"],
                "chosen_strategy": chosen["strategy"],
                "rejected_strategy": rejected["strategy"],
                "similarity": rejected["similarity"],
            }
        counts.groups += counts.pairs.total() > before


def _places(labels: Sequence[str], pairs: Sequence[Pair]) -> list[tuple[int, int]]:
    """Return the positions in a group of the candidates of each pair."""
    if not pairs:
        return [(0, place) for place in range(1, len(labels))]
    at = {label: [place for place, other in enumerate(labels) if other == label] for label in labels}
    return [places for chosen, rejected in pairs for places in product(at.get(chosen, ()), at.get(rejected, ()))]
