"""Prepared ground-truth pairs: the product that `prepare` makes and every later stage reads."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data.fingerprint import Spec, hash_keys
from cpo_pipe.data.models import TokenizerFiles
from cpo_pipe.data.store import Product


@dataclass(frozen=True)
class Examples:
    """The examples of a run, and what their token ids depend on."""

    product: Product
    """Folder with examples.parquet, tokenizer/ and, where rows were refused, rejected.parquet."""
    tokenizer: TokenizerFiles
    rendering: Spec
    """What decides an example's prompt ids beyond its id: template, tokenizer and, for cut text, where it is cut."""

    def read(self, split: str, limit: int | None = None, columns: list[str] | None = None) -> pa.Table:
        """The split's selection, in its fixed order: the first `limit` examples of the EXAMPLES schema."""
        names = columns if columns is None else [*columns, "split"]
        table = pq.read_table(self.product.path / "examples.parquet", columns=names)
        chosen = table.filter(pc.equal(table["split"], split))
        chosen = chosen if columns is None else chosen.select(columns)
        return chosen if limit is None else chosen.slice(0, limit)

    def count(self, split: str) -> int:
        """Examples of a split."""
        return int(self.read(split, columns=["example_id"]).num_rows)


def largest_token_id(examples: Examples) -> int:
    """The largest token id in prompts and targets."""
    largest = 0
    with pq.ParquetFile(examples.product.path / "examples.parquet") as file:
        for batch in file.iter_batches(columns=["prompt_ids", "target_ids"]):
            largest = max(largest, *(pc.max(pc.list_flatten(column)).as_py() for column in batch.columns))
    return largest


def selection_hash(examples: pa.Table) -> str:
    """Identity of an ordered selection: its ids and token ids (an id alone does not say where text was cut)."""
    columns = [examples[name].to_pylist() for name in ("example_id", "prompt_ids", "target_ids")]
    return hash_keys(zip(*columns, strict=True))
