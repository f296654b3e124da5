"""Stage `generate-negatives`: synthetic continuations of the training prompts, by one strategy or a mixture."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import Spec, hash_keys
from cpo_pipe.data.models import Model
from cpo_pipe.data.recipe import Negatives
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.engines.base import (
    Engine,
    MakeRows,
    Sampling,
    check_context,
    make_missing,
    open_engine,
    sample_keys,
    stop_ids,
)
from cpo_pipe.pipeline.negatives import batch, meanfield, truncation
from cpo_pipe.pipeline.negatives.autoregressive import make_autoregressive, negatives_spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The negatives of one strategy and how many of each example a group takes."""

    strategy: str
    rows: Rows
    count: int


@dataclass(frozen=True)
class Sources:
    """Where the negatives of a run are: its selection of examples and one pool per strategy."""

    selection: pa.Table
    pools: list[Pool]

    def spec(self) -> list[Spec]:
        """Their part of the groups' spec: the counts are identity there, and only there."""
        return [{"negatives": pool.rows.spec, "count": pool.count} for pool in self.pools]

    def missing(self) -> int:
        """Negatives that are still to be made."""
        return sum(
            pool.rows.missing(sample_keys(self.selection["example_id"], pool.count)).num_rows for pool in self.pools
        )


def plan_negatives(
    config: Negatives, store: Store, examples: Examples, model: Model | None, default_tokens: int
) -> tuple[Sources, Sampling | None]:
    """Which negatives a run wants, and how those from an engine are sampled; makes none.

    Raises:
        InputError: a prompt leaves the model no room for `max_new_tokens`.
    """
    selection = examples.read("train", config.max_examples)
    counts, sampling = config.counts, None
    specs: dict[str, Spec] = {}
    if counts.autoregressive:
        assert model is not None
        sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens or default_tokens,
            stop_ids=stop_ids(model, examples.tokenizer),
        )
        check_context(selection, model, sampling.max_new_tokens, "negatives.max_new_tokens")
        specs["autoregressive"] = negatives_spec(examples, model, sampling, config.seed)
    if counts.batch:
        pool = hash_keys(sorted(selection["example_id"].to_pylist()))
        specs["batch"] = batch.batch_spec(examples.rendering, config.seed, pool)
    if counts.meanfield:
        assert model is not None
        ends = stop_ids(model, examples.tokenizer)
        specs["meanfield"] = meanfield.meanfield_spec(
            examples.rendering, model.fingerprint, config.meanfield_share, ends, config.seed
        )
    if counts.truncation:
        specs["truncation"] = truncation.truncation_spec(examples.rendering, config.seed)
    pools = [Pool(name, store.rows("negatives", spec), getattr(counts, name)) for name, spec in specs.items()]
    return Sources(selection, pools), sampling


def generate_negatives(
    config: Negatives, store: Store, examples: Examples, model: Model | None, default_tokens: int
) -> Sources:
    """Make what is missing of a run's negatives; `default_tokens` is used where the recipe gives no max_new_tokens.

    Raises:
        InputError: see `plan_negatives`; the engine asked for does not run the model; or the training examples are too
            few for the batch negatives asked for.
    """
    sources, sampling = plan_negatives(config, store, examples, model, default_tokens)
    for pool in sources.pools:
        if pool.strategy == "autoregressive":
            assert model is not None
            assert sampling is not None
            engine = _engine(config, model)
            made = make_autoregressive(config, pool.rows, examples, sources.selection, model, sampling, engine)
        else:
            make = _maker(pool.strategy, config, examples, sources.selection, model)
            label = f"{pool.strategy} negatives"
            made = make_missing(pool.rows, sources.selection, pool.count, make, label)
        wanted = sources.selection.num_rows * pool.count
        log.info(
            "negatives: %d %s in %s (%d made, %d reused)", wanted, pool.strategy, pool.rows.name, made, wanted - made
        )
    return sources


def _engine(config: Negatives, model: Model) -> Callable[[], Engine]:
    return lambda: open_engine(config.engine, model)


def _maker(strategy: str, config: Negatives, examples: Examples, selection: pa.Table, model: Model | None) -> MakeRows:
    """What makes a strategy's negatives; anything heavy is loaded when it is first called."""
    if strategy == "truncation":
        return truncation.maker(examples, config.seed)
    if strategy == "batch":
        return batch.maker(selection, config.seed)
    assert model is not None
    return meanfield.maker(examples, model, stop_ids(model, examples.tokenizer), config.meanfield_share, config.seed)
