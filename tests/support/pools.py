"""Pools of continuations of other models, for a store with a few examples."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.negatives.autoregressive import sampled_spec
from cpo_pipe.pipeline.negatives.pool import (
    ENCODING,
    PoolFileWork,
    PoolModelWork,
    other_tokenizer,
    pool_file_spec,
)
from cpo_pipe.pipeline.negatives.pool_file import Columns, PoolFile
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.samples import LazyEngine, SampleRequest, make_missing
from tests.support.pairs import write_jsonl

CUT_EXAMPLE = {"ends": False}
"""An example whose target has no end token."""
PAIRS = [{"prompt": f"say {n}", "target": f" fox {n}"} for n in range(6)]


class Bench:
    """A store with examples, and the pools made for them."""

    def __init__(self, root: Path, tokenizer: Path, rows: Sequence[dict[str, str]] = PAIRS, **data: Any):
        self.root, self.store = root, Store(root / "store")
        source = str(write_jsonl(root / "pairs.jsonl", list(rows)))
        config = Pairs(source=source, tokenizer=str(tokenizer), train=len(rows), **data)
        self.examples: Examples = prepare(config, self.store)
        self.selection = self.examples.read("train")
        self.tokenizer = self.examples.tokenizer.load()

    def from_file(
        self, path: Path, count: int = 1, max_tokens: int = 40, pool: str = "other", **columns: str
    ) -> dict[str, list[dict[str, Any]]]:
        """The negatives of each prompt, in order."""
        key = f"negatives.sources.{pool}"
        source = locate_source(str(path), key=f"{key}.file", columns_key=f"{key}.columns")
        file, identity = PoolFile(source, Columns.model_validate(columns)), source.identity(self.store.hash_file)
        file.check()
        self.spec = pool_file_spec(self.examples.rendering, identity, file.columns, max_tokens)
        self.rows, self.refused = (
            self.store.rows("negatives", self.spec),
            self.store.rows("rejected", {"of": self.spec}),
        )
        selection = self.selection.select(["example_id", "prompt"])
        work = PoolFileWork(
            self.rows, self.refused, file, identity, selection, count, self.examples.tokenizer, self.examples.rendering,
            max_tokens,
        )  # fmt: skip
        return self._made(work, count)

    def from_model(
        self, folder: Path, sampling: Sampling, count: int = 1, template: str = "plain", seed: int = 0
    ) -> dict[str, list[dict[str, Any]]]:
        """The negatives of each prompt, in order."""
        model = locate_model(str(folder), self.store)
        own = other_tokenizer(model, self.examples.tokenizer, self.store)
        assert own is not None
        self.spec = sampled_spec(
            self.examples.rendering,
            model.fingerprint,
            sampling,
            seed,
            "pool",
            tokenizer=own.fingerprint,
            encoding=ENCODING,
        )
        self.rows, self.refused = (
            self.store.rows("negatives", self.spec),
            self.store.rows("rejected", {"of": self.spec}),
        )
        work = PoolModelWork(
            self.rows,
            self.refused,
            LazyEngine("transformers", model),
            own,
            {"template": template},
            sampling,
            seed,
            self.examples.tokenizer,
            {"strategy": "pool", "generator": model.fingerprint},
        )
        return self._made(work, count)

    def _made(self, work: PoolFileWork | PoolModelWork, count: int) -> dict[str, list[dict[str, Any]]]:
        work = pickle.loads(pickle.dumps(work))
        wanted = SampleRequest(self.rows, count, self.refused)
        self.made = make_missing(wanted, self.selection, work, LocalExecutor(), batch_size=4, label="pool")
        assert not wanted.missing(self.selection["example_id"]).any(), "what cannot be made is refused"
        prompts = dict(zip(*(self.selection[name].to_pylist() for name in ("example_id", "prompt")), strict=True))
        found: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in prompts.values()}
        for row in self.rows.read(list(prompts)).to_pylist():
            found[prompts[row["example_id"]]].append(row)
        return found

    def refusals(self) -> list[tuple[str, str]]:
        """Reason and sample of each."""
        rows = self.refused.read(self.selection["example_id"].to_pylist()).to_pylist()
        return [(row["reason"], row["source"]) for row in rows]


def texts(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    return {prompt: [row["text"] for row in rows] for prompt, rows in found.items()}


def rows_of(bench: Bench) -> list[dict[str, str]]:
    """One continuation of each prompt and one of a prompt that is not asked for, in an order of their own."""
    prompts = [*bench.selection["prompt"].to_pylist(), "say what"]
    return [{"prompt": prompt, "text": f" dog {prompt}"} for prompt in sorted(prompts, reverse=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8-sig")
    return path


CORPUS = ["a lazy dog says that the fox is quick and brown", "say it again: 0 1 2 3 4 5 6 7 8 9"]


def bytes_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Like SentencePiece's: a space is a part of the word behind it, and a text begins with one that is not there."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)
    fast.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder
