"""Stage `generate-negatives`: synthetic continuations of the training prompts."""

import logging
from dataclasses import dataclass

import pyarrow as pa

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import Model
from cpo_pipe.data.recipe import Negatives
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.engines.base import Sampling, check_context, open_engine, sample_keys, stop_ids
from cpo_pipe.pipeline.negatives.autoregressive import make_autoregressive, negatives_spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The negatives of one strategy and how many of each example a group takes."""

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
    config: Negatives, store: Store, examples: Examples, model: Model, default_tokens: int
) -> tuple[Sources, Sampling]:
    """Which negatives a run wants; makes none.

    Raises:
        InputError: a prompt leaves the model no room for `max_new_tokens`, or no strategy has a count.
    """
    if not config.counts.autoregressive:
        raise InputError("negatives.counts.autoregressive is 0: ask for at least 1 negative a prompt")
    sampling = Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens or default_tokens,
        stop_ids=stop_ids(model, examples.tokenizer),
    )
    selection = examples.read("train", config.max_examples)
    check_context(selection, model, sampling.max_new_tokens, "negatives.max_new_tokens")
    rows = store.rows("negatives", negatives_spec(examples, model, sampling, config.seed))
    return Sources(selection, [Pool(rows, config.counts.autoregressive)]), sampling


def generate_negatives(
    config: Negatives, store: Store, examples: Examples, model: Model, default_tokens: int
) -> Sources:
    """Make what is missing of a run's negatives; `default_tokens` is used where the recipe gives no max_new_tokens.

    Raises:
        InputError: see `plan_negatives`; or the engine asked for does not run the model.
    """
    sources, sampling = plan_negatives(config, store, examples, model, default_tokens)
    rows = sources.pools[0].rows
    made = make_autoregressive(
        config, rows, examples, sources.selection, model, sampling, lambda: open_engine(config.engine, model)
    )
    wanted = sources.selection.num_rows * config.counts.autoregressive
    log.info("negatives: %d autoregressive in %s (%d made, %d reused)", wanted, rows.name, made, wanted - made)
    return sources
