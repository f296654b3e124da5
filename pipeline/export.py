"""Groups as preference data that TRL's DPOTrainer, and others, train on: prompt, chosen, rejected.

TRL tokenizes prompt and completion together and ends both completions, with an EOS token or as the chat template does.
So texts are written without one, and a text that does not end cannot be said. A text is written so that TRL makes of it
the ids that we train on (SentencePiece takes the space off the start of what it decodes alone); where there is no such
text (tokens that merge across the two) TRL trains on other ids. Both are counted.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.data.models import TokenizerFiles
from cpo_pipe.data.progress import track
from cpo_pipe.data.recipe import Negatives, Recipe, nearest
from cpo_pipe.data.recipe_text import recipe_text
from cpo_pipe.data.store import Rows
from cpo_pipe.data.templates import control_tokens, eos_token_id
from cpo_pipe.data.text import fenced, markdown, one_line, visible
from cpo_pipe.pipeline.folders import check_new, new_folder
from cpo_pipe.pipeline.negatives.pool import text_behind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Pair = tuple[str, str]
"""Strategies of the chosen and the rejected."""

ROWS_PER_FILE = 100_000
"""A file is closed once it has so many."""

_GROUPS_AT_ONCE = 512

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_FACTS = [
    ("example_id", pa.string()),
    ("chosen_strategy", pa.string()),
    ("rejected_strategy", pa.string()),
    ("similarity", pa.float32()),
]

_CARD = """
# {name}: preference pairs

{pairs:,} pairs of {groups:,} prompts, written by cpo-pipe for Contrastive Preference Optimization (Feng et al. 2025,
*Sequence-level Large Language Model Training with Contrastive Preference Optimization*). A `target` is the ground
truth; the others are synthetic negatives, of which no human said that they are worse.

```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

pairs = load_dataset("this-folder", split="train")
DPOTrainer("model", args=DPOConfig(max_length=None), train_dataset=pairs).train()
```

{strategies}

- `example_id`: the prompt with its ground truth; `similarity`: cosine of the rejected text's embedding to the ground
  truth's, empty where negatives were not ranked.
- {ends} {left_out:,} pairs with a text that does not end (cut at a
  limit of tokens) are left out: they would teach to end there. {same:,} pairs of texts that differ in their token ids
  only are left out, too.
- {prompts} Of {texts:,} texts {otherwise:,} get other token ids so than they had in cpo-pipe.

The recipe, with the source of prompts and ground truth:

{recipe}

No licence is named: it follows from those of the prompts and the ground truth, and of the models that wrote negatives.
"""

_PLAIN = (
    "Texts are without an EOS token, which TRL appends to both.",
    """`prompt` is the text that the model is given, as the recipe's template renders it; TRL tokenizes it together
  with the completion.""",
)
_CONVERSATIONAL = (
    "Texts are without what ends them, which the tokenizer's chat template writes.",
    """`prompt` is what stands before any template, as a message; TRL renders both by the tokenizer's chat
  template.""",
)


@dataclass
class _Tally:
    """What an export has in it."""

    groups: int = 0
    pairs: Counter[Pair] = field(default_factory=Counter)
    left_out: int = 0
    """Pairs with a text that does not end."""
    same: int = 0
    """Pairs of one text, by two ways of writing it in tokens."""
    texts: int = 0
    otherwise: int = 0
    """Texts that TRL tokenizes to other ids than they have in their group."""


def parse_pairs(texts: Sequence[str], negatives: Negatives) -> list[Pair]:
    """The pairs that `CHOSEN,REJECTED` texts name.

    Raises:
        InputError: one is no pair, or no candidate is of such a strategy.
    """
    pairs: list[Pair] = []
    known = negatives.labels()
    for text in texts:
        labels = text.split(",")
        if len(labels) != 2:
            raise InputError(f"--pair {text}: must be CHOSEN,REJECTED, such as target,{known[-1]}")
        for label in labels:
            if label not in known:
                hint = nearest(label, known) or f"there are {', '.join(known)}"
                raise InputError(f"--pair {text}: no candidate is of {label!r}; {hint}")
        if labels[0] == labels[1] or {(labels[0], labels[1]), (labels[1], labels[0])} & set(pairs):
            raise InputError(f"--pair {text}: is of one kind, or stands there twice: name each pair once")
        pairs.append((labels[0], labels[1]))
    return pairs


def export(
    out: Path,
    recipe: Recipe,
    negatives: Negatives,
    tokenizer: TokenizerFiles,
    examples: pa.Table,
    groups: Rows,
    pairs: Sequence[Pair],
    conversational: bool,
) -> None:
    """Write groups to a folder as preference data, with a data card.

    Args:
        out: a folder that is new or empty.
        recipe: of the groups; it goes into the card.
        negatives: what they are made of, of a training with its own that.
        tokenizer: of the examples.
        examples: whose groups (EXAMPLES schema).
        groups: where they are.
        pairs: which, by strategy, of each group all that there are; empty: the target and each of the negatives.
        conversational: texts as messages, and the prompt as it was before the template.

    Raises:
        InputError: `out` has something in it, or there is no pair.
    """
    check_new(out)
    encoder, tally = tokenizer.load(), _Tally()
    if conversational and not encoder.chat_template:
        log.warning(
            "export: the tokenizer of the examples has no chat template, and TRL cannot render messages without"
        )
    with new_folder(out) as scratch:
        writer = _Writer(scratch / "data", _schema(conversational))
        with track("export", examples.num_rows) as meter:
            start = 0
            for part in groups.batches(examples["example_id"], _GROUPS_AT_ONCE):
                own = examples.slice(start, part.num_rows).select(["prompt", "rendered"]).to_pylist()
                start += part.num_rows
                rows = list(_rows(part.to_pylist(), own, pairs, conversational, encoder, tally))
                writer.write(rows)
                meter.advance(part.num_rows)
        writer.close()
        if not writer.rows:
            raise InputError(
                f"--out {out}: there is nothing to write: of the pairs asked for {tally.left_out + tally.same:,} are "
                f"there, {tally.left_out:,} with a text that does not end (cut at a limit of tokens), which this "
                f"format cannot say, and {tally.same:,} of one text"
            )
        (scratch / "README.md").write_text(_card(recipe, negatives, writer, tally, conversational), encoding="utf-8")
    log.info("export: %s pairs of %s groups written to %s", f"{writer.rows:,}", f"{tally.groups:,}", out)
    if tally.left_out:
        log.warning(
            "export: %s pairs are left out: a text of theirs does not end (cut at a limit of tokens), which this "
            "format cannot say",
            f"{tally.left_out:,}",
        )
    if tally.same:
        log.warning("export: %s pairs are left out: their texts are one, in other token ids", f"{tally.same:,}")
    if tally.otherwise:
        log.warning(
            "export: of %s texts TRL will give %s other token ids than they were trained on here: %s",
            f"{tally.texts:,}", f"{tally.otherwise:,}", _OTHERWISE[conversational],
        )  # fmt: skip


_OTHERWISE = {
    False: "it tokenizes them together with their prompt, and a sampled text need not have the ids of its sample",
    True: "it renders messages by the tokenizer's chat template; the recipe's data.template is another, or the chat "
    "template changes what it is given",
}


def _rows(
    groups: Sequence[dict[str, Any]],
    examples: Sequence[dict[str, Any]],
    pairs: Sequence[Pair],
    conversational: bool,
    tokenizer: "PreTrainedTokenizerBase",
    tally: _Tally,
) -> Iterator[dict[str, Any]]:
    """The pairs of some groups, in their order."""
    # A sample may end by another control token than EOS, such as one that ends a turn.
    no_end = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    ends = {eos_token_id(tokenizer), *(set(control_tokens(tokenizer).values()) - no_end)}
    chosen: list[list[tuple[int, int]]] = []
    for group in groups:
        candidates = group["candidates"]
        asked = _places([candidate["strategy"] for candidate in candidates], pairs)
        whole = [candidate["token_ids"][-1:] != [] and candidate["token_ids"][-1] in ends for candidate in candidates]
        chosen.append([pair for pair in asked if all(whole[place] for place in pair)])
        tally.left_out += sum(not all(whole[place] for place in pair) for pair in asked)
    used = [(row, place) for row, of in enumerate(chosen) for place in sorted({place for pair in of for place in pair})]
    ours = [_Ours(groups[row], place, examples[row]) for row, place in used]
    written = (_messages if conversational else _plain)(ours, tokenizer)
    tally.texts += len(written)
    tally.otherwise += sum(not text.exact for text in written)
    texts = dict(zip(used, written, strict=True))
    for row, (group, places) in enumerate(zip(groups, chosen, strict=True)):
        before = tally.pairs.total()
        for pair in places:
            one, other = (group["candidates"][place] for place in pair)
            better, worse = (texts[row, place] for place in pair)
            if better.completion == worse.completion:
                tally.same += 1
                continue
            tally.pairs[one["strategy"], other["strategy"]] += 1
            yield {
                "prompt": better.prompt,
                "chosen": better.completion,
                "rejected": worse.completion,
                "example_id": group["example_id"],
                "chosen_strategy": one["strategy"],
                "rejected_strategy": other["strategy"],
                "similarity": other["similarity"],
            }
        tally.groups += tally.pairs.total() > before


@dataclass(frozen=True)
class _Ours:
    """A candidate with its prompt, as they are here."""

    group: dict[str, Any]
    place: int
    example: dict[str, Any]

    @property
    def text(self) -> str:
        text: str = self.group["candidates"][self.place]["text"]
        return text

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = self.group["candidates"][self.place]["token_ids"]
        return ids

    @property
    def all_ids(self) -> list[int]:
        return [*self.group["prompt_ids"], *self.token_ids]


@dataclass(frozen=True)
class _Written:
    """The same as preference data has it, and whether TRL makes our token ids of that."""

    prompt: Any
    completion: Any
    exact: bool


def _plain(candidates: Sequence[_Ours], tokenizer: "PreTrainedTokenizerBase") -> list[_Written]:
    """As texts: the stored one where TRL makes our ids of it, or else what the candidate adds to its prompt.

    That also where neither is exact: rejected texts without the space that chosen ones have would be told by it.
    """
    end = str(tokenizer.eos_token)

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        return ids

    prompts = [ours.example["rendered"] for ours in candidates]
    bos = str(tokenizer.bos_token or "")
    # A chat template writes the BOS token that TRL's tokenizing puts before any text.
    begun = [prompt for prompt in dict.fromkeys(prompts) if bos and prompt.startswith(bos)]
    twice = {prompt for prompt, ids in zip(begun, encoded(begun), strict=True) if ids[1:2] == [tokenizer.bos_token_id]}
    prompts = [prompt.removeprefix(bos) if prompt in twice else prompt for prompt in prompts]
    texts = [ours.text for ours in candidates]
    exact = [False] * len(candidates)
    for behind in (False, True):
        left = [place for place, found in enumerate(exact) if not found]
        tried = {
            place: text_behind(candidates[place].group["prompt_ids"], candidates[place].token_ids, tokenizer)
            if behind else texts[place]
            for place in left
        }  # fmt: skip
        for place, ids in zip(left, encoded([prompts[place] + tried[place] + end for place in left]), strict=True):
            exact[place] = ids == candidates[place].all_ids
            texts[place] = tried[place]
    return [_Written(*one) for one in zip(prompts, texts, exact, strict=True)]


def _messages(candidates: Sequence[_Ours], tokenizer: "PreTrainedTokenizerBase") -> list[_Written]:
    """As messages, with the prompt as it was before the template."""
    found = []
    for ours in candidates:
        prompt, completion = _message("user", ours.example["prompt"]), _message("assistant", ours.text)
        exact = False
        if tokenizer.chat_template:
            with suppress(TemplateError):  # of templates that want more than these two messages
                theirs: Any = tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
                exact = theirs["input_ids"] == ours.all_ids
        found.append(_Written(prompt, completion, exact))
    return found


def _places(strategies: Sequence[str], pairs: Sequence[Pair]) -> list[tuple[int, int]]:
    """Which candidates of a group make a pair."""
    if not pairs:
        return [(0, place) for place in range(1, len(strategies))]
    at = {label: [place for place, one in enumerate(strategies) if one == label] for label in strategies}
    return [places for chosen, rejected in pairs for places in product(at.get(chosen, ()), at.get(rejected, ()))]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _schema(conversational: bool) -> pa.Schema:
    kind = _MESSAGES if conversational else pa.string()
    return pa.schema([*((name, kind) for name in ("prompt", "chosen", "rejected")), *_FACTS])


class _Writer:
    """Rows as Parquet files of a bounded size, named as the hub wants them."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.schema, self.rows, self.num_bytes = schema, 0, 0
        self.files: list[Path] = []
        self._folder = folder
        self._writer: pq.ParquetWriter | None = None
        self._first = 0
        folder.mkdir()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        if self._writer is None:
            self.files.append(self._folder / f"train-{len(self.files):05}.parquet")
            self._writer, self._first = pq.ParquetWriter(self.files[-1], self.schema), self.rows
        table = pa.Table.from_pylist(rows, schema=self.schema)
        self._writer.write_table(table)
        self.rows += table.num_rows
        self.num_bytes += table.nbytes
        if self.rows - self._first >= ROWS_PER_FILE:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _card(recipe: Recipe, negatives: Negatives, writer: _Writer, tally: _Tally, conversational: bool) -> str:
    """The data card: README.md, as the Hugging Face hub wants it."""
    from datasets import DatasetInfo, Features, SplitDict
    from huggingface_hub import DatasetCardData

    split = {"name": "train", "num_bytes": writer.num_bytes, "num_examples": writer.rows}
    info = DatasetInfo(
        features=Features.from_arrow_schema(writer.schema),
        splits=SplitDict.from_split_dict([split]),
        download_size=sum(file.stat().st_size for file in writer.files),
        dataset_size=writer.num_bytes,
    )
    facts = DatasetCardData(
        pretty_name=recipe.name,
        task_categories=["text-generation"],
        size_categories=[_size(writer.rows)],
        tags=["cpo-pipe", "trl", "dpo", "preference"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        dataset_info=info._to_yaml_dict(),
    )
    ends, prompts = _CONVERSATIONAL if conversational else _PLAIN
    text = _CARD.format(
        name=recipe.name,
        pairs=writer.rows,
        groups=tally.groups,
        strategies=_strategies(negatives, tally.pairs),
        left_out=tally.left_out,
        same=tally.same,
        texts=tally.texts,
        otherwise=tally.otherwise,
        ends=ends,
        prompts=prompts,
        recipe=fenced(recipe_text(recipe), "yaml"),
    )
    return f"---\n{visible(facts.to_yaml())}\n---\n{text}"


def _strategies(negatives: Negatives, pairs: Counter[Pair]) -> str:
    """A table of the kinds of pairs, and what wrote each kind of text."""
    writers = {"target": "the ground truth", "batch": "the ground truth of another prompt",
               "truncation": "the ground truth, cut", "autoregressive": f"sampled from {negatives.model}",
               "meanfield": f"the ground truth, in part drawn again from {negatives.model}"}  # fmt: skip
    for name, pool in negatives.pools.items():
        writers[f"pool:{name}"] = f"the file {pool.file}" if pool.file is not None else f"sampled from {pool.model}"
    for name, instruction in negatives.instructed.items():
        writers[f"instructed:{name}"] = f"asked of {instruction.model} ({one_line(instruction.template, 100)})"
    labels = dict.fromkeys(label for pair in pairs for label in pair)
    lines = ["| chosen | rejected | pairs |", "| --- | --- | ---: |"]
    lines += [f"| {' | '.join(map(markdown, pair))} | {count:,} |" for pair, count in sorted(pairs.items())]
    return "\n".join([*lines, "", *(f"- `{label}`: {markdown(writers[label])}" for label in labels)])


def _size(rows: int) -> str:
    """The hub's name for a number of rows."""
    bounds = [("1K", 10**3), ("10K", 10**4), ("100K", 10**5), ("1M", 10**6), ("10M", 10**7), ("100M", 10**8)]
    below = "n"
    for name, bound in bounds:
        if rows < bound:
            return f"{below}<n<{name}" if below != "n" else f"n<{name}"
        below = name
    return "100M<n<1B"


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a data set on the hub.

    Raises:
        InputError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo}: not a hub name, such as me/my-pairs") from error


def upload(out: Path, repo: str, public: bool) -> None:
    """Upload an exported folder to the Hugging Face hub; a data set that is not there is made.

    Raises:
        InputError: the data set is there and public, and `public` is not asked for.
        RunError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    later = f"{out} is written: `hf upload {repo} {out} --repo-type dataset` uploads it"
    try:
        made = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        private = api.dataset_info(made.repo_id).private
        if private or public:
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=out,
                repo_type="dataset",
                commit_message="cpo-pipe export",
                delete_patterns="data/train-*.parquet",  # of an export before, or else both would be read
            )
            if private and public:  # only once it is whole
                api.update_repo_settings(made.repo_id, private=False, repo_type="dataset")
    except Exception as error:  # the hub client's failures have no common type: offline, no token, no rights, …
        raise RunError(f"--push {repo}: the hub did not take it ({cause(error)}); {later}") from error
    if not private and not public:
        raise InputError(f"--push {repo}: the data set is there and public; add --public if that is meant; {later}")
    log.info("export: uploaded to %s", made)
