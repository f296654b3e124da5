"""Stage `generate-negatives`: synthetic continuations of the training prompts, by one strategy or a mixture."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from cpo_pipe.data.chat_date import chat_date
from cpo_pipe.data.embedding import locate_embedder
from cpo_pipe.data.end_tokens import end_tokens
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.executor import Executor, LocalExecutor, Work
from cpo_pipe.data.fingerprint import Spec, hash_keys
from cpo_pipe.data.models import Model
from cpo_pipe.data.recipe import Negatives, Pool
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.templates import CHAT
from cpo_pipe.pipeline.engines.base import LazyEngine, Sampled, Sampling, check_context
from cpo_pipe.pipeline.engines.openai import ApiModel, Asked, prompt_of
from cpo_pipe.pipeline.missing import WINDOW, Wanted, make_missing
from cpo_pipe.pipeline.negatives import autoregressive, batch, instructed, meanfield, pool, truncation
from cpo_pipe.pipeline.negatives.instructed import Message

log = logging.getLogger(__name__)


class FindModel(Protocol):
    """What a model's name in the recipe means."""

    def __call__(self, name: str, *, any_tokenizer: bool = False) -> Model | ApiModel:
        """The model; with `any_tokenizer` also one that does not know the examples' token ids."""
        ...


TOGETHER = 64
"""Examples whose negatives are made together, where no engine has a batch size."""


@dataclass(frozen=True)
class Source:
    """The negatives of one strategy, or of one pool or instruction."""

    label: str
    """The strategy, for pools and instructions with their name: `pool:gpt2`."""
    wanted: Wanted

    @property
    def rows(self) -> Rows:
        """Their artifact."""
        return self.wanted.rows

    @property
    def count(self) -> int:
        """How many of each example a group takes."""
        return self.wanted.n


@dataclass(frozen=True)
class Job:
    """A source, and what makes its negatives."""

    source: Source
    work: Work
    batch_size: int = TOGETHER
    """Examples per call of the work."""


@dataclass(frozen=True)
class Sources:
    """Where the negatives of a run are: its selection of examples and what each strategy made."""

    selection: pa.Table
    pools: list[Source]
    """In the order in which rank prefers them: of equal negatives it keeps the first."""

    def spec(self) -> list[Spec]:
        """Their part of the groups' spec: the counts are identity there, and only there, as are the names of pools."""
        return [
            {"negatives": source.rows.spec, "count": source.count}
            | ({"label": source.label} if ":" in source.label else {})
            for source in self.pools
        ]

    def missing(self) -> int:
        """Negatives that are still to be made."""
        return sum(int(source.wanted.missing(self.selection["example_id"]).sum()) for source in self.pools)


@dataclass(frozen=True)
class Plan:
    """Which negatives a run wants, and what would make them."""

    sources: Sources
    jobs: list[Job]


def plan_negatives(config: Negatives, store: Store, examples: Examples, find: FindModel, tokens: int) -> Plan:
    """Which negatives a run wants, and what would make them; makes none.

    Args:
        config: the recipe's section.
        store: where they are kept.
        examples: what they are made of.
        find: resolves the names of models.
        tokens: the longest negative, where `config.max_new_tokens` does not say.

    Raises:
        InputError: a prompt leaves the model no room for `max_new_tokens`; a model or a file is not there.
    """
    planner = _Planner(config, store, examples, find, config.max_new_tokens or tokens)
    jobs = [*planner.strategies(), *planner.pools(), *planner.instructed()]
    return Plan(Sources(planner.selection, [job.source for job in jobs]), jobs)


class _Planner:
    def __init__(self, config: Negatives, store: Store, examples: Examples, find: FindModel, tokens: int):
        self.config, self.store, self.examples, self.find, self.tokens = config, store, examples, find, tokens
        self.selection = examples.read("train", config.max_examples)

    def strategies(self) -> Iterator[Job]:
        config, examples = self.config, self.examples
        counts, rendering, seed, tokenizer = config.counts, examples.rendering, config.seed, examples.tokenizer
        if counts.autoregressive:
            assert config.model is not None
            yield self._sampled(autoregressive.STRATEGY, config.model, counts.autoregressive)
        if counts.batch:
            members = hash_keys(sorted(self.selection["example_id"].to_pylist()))
            embedder = locate_embedder(config.embedder, self.store) if config.hardest else None
            rows = self._rows(batch.batch_spec(rendering, seed, members, config.hardest, embedder))
            work: Work = batch.Borrowed(rows, self.selection, seed, config.hardest, embedder)
            yield Job(Source(batch.STRATEGY, Wanted(rows, counts.batch)), work)
        if counts.meanfield:
            assert config.model is not None
            model = self.find(config.model)
            assert isinstance(model, Model)
            ends, share = end_tokens(model.path, tokenizer), config.meanfield_share
            rows = self._rows(meanfield.meanfield_spec(rendering, model.fingerprint, share, ends, seed))
            work = meanfield.Redrawn(rows, model, tokenizer, ends, share, seed)
            yield Job(Source(meanfield.STRATEGY, Wanted(rows, counts.meanfield)), work)
        if counts.truncation:
            rows = self._rows(truncation.truncation_spec(rendering, seed))
            work = truncation.Truncated(rows, tokenizer, seed)
            yield Job(Source(truncation.STRATEGY, Wanted(rows, counts.truncation)), work)

    def pools(self) -> Iterator[Job]:
        """Of the files and models that `negatives.pools` names."""
        for name, config in self.config.pools.items():
            yield self._file(name, config) if config.file is not None else self._other_model(name, config)

    def _file(self, name: str, config: Pool) -> Job:
        assert config.file is not None
        file = pool.PoolFile(name, Path(config.file), config.columns)
        sha256 = file.sha256(self.store.hash_file)
        spec = pool.pool_file_spec(self.examples.rendering, sha256, config.columns, self.tokens)
        rows, refused = self._rows(spec), self.store.rows("rejected", {"of": spec})
        selection, tokenizer = self.selection.select(["example_id", "prompt"]), self.examples.tokenizer
        work = pool.FromFile(rows, refused, file, sha256, selection, config.count, tokenizer, self.tokens)
        return Job(Source(f"{pool.STRATEGY}:{name}", Wanted(rows, config.count, refused)), work)

    def _other_model(self, name: str, config: Pool) -> Job:
        assert config.model is not None
        label = f"{pool.STRATEGY}:{name}"
        model = self.find(config.model, any_tokenizer=True)
        if isinstance(model, ApiModel):
            return self._asked(label, model, config.count)
        own = pool.other_tokenizer(model, self.examples.tokenizer, self.store)
        if own is None:
            return self._sampled(label, config.model, config.count)
        examples, seed, sampling = self.examples, self.config.seed, self._sampling(end_tokens(model.path, own))
        template = str(examples.rendering["template"])
        day = chat_date(own, self.store) if template == CHAT else None
        spec = pool.pool_model_spec(examples.rendering, model.fingerprint, own.fingerprint, sampling, seed, day)
        rows, refused = self._rows(spec), self.store.rows("rejected", {"of": spec})
        engine = LazyEngine(self.config.engine, model)
        columns = {"strategy": pool.STRATEGY, "generator": model.fingerprint}
        work = pool.FromModel(rows, refused, engine, own, template, sampling, seed, examples.tokenizer, columns, day)
        return Job(Source(label, Wanted(rows, config.count, refused)), work, self.config.batch_size)

    def instructed(self) -> Iterator[Job]:
        """Of what `negatives.instructed` asks APIs for."""
        for name, config in self.config.instructed.items():
            api = self.find(config.model)
            assert isinstance(api, ApiModel)
            message = Message(config.template)
            yield self._asked(f"{instructed.STRATEGY}:{name}", api, config.count, message)

    def _sampling(self, ends: tuple[int, ...]) -> Sampling:
        config = self.config
        return Sampling(temperature=config.temperature, top_k=config.top_k, max_new_tokens=self.tokens, stop_ids=ends)

    def _sampled(self, label: str, name: str, count: int) -> Job:
        config, examples = self.config, self.examples
        model = self.find(name)
        if isinstance(model, ApiModel):
            return self._asked(label, model, count)
        sampling = self._sampling(end_tokens(model.path, examples.tokenizer))
        context = check_context(self.selection, model, self.tokens, "negatives.max_new_tokens")
        spec = autoregressive.autoregressive_spec(examples.rendering, model.fingerprint, sampling, config.seed)
        rows = self._rows(spec)
        columns = {"strategy": label.partition(":")[0], "generator": model.fingerprint}
        engine = LazyEngine(config.engine, model, context)
        work = Sampled(rows, engine, sampling, config.seed, examples.tokenizer, columns)
        return Job(Source(label, Wanted(rows, count)), work, config.batch_size)

    def _asked(self, label: str, api: ApiModel, count: int, message: Message | None = None) -> Job:
        """Of an API: it is asked the prompt, or what a message makes of the example."""
        examples, seed, sampling = self.examples, self.config.seed, self._sampling(())
        if message is None:
            obeyed = api.obeyed(sampling)
            spec = autoregressive.autoregressive_spec(examples.rendering, api.spec(), obeyed, seed)
        else:
            spec = instructed.instructed_spec(examples.rendering, api, message, sampling, seed)
        rows, refused = self._rows(spec), self.store.rows("rejected", {"of": spec})
        columns = {"strategy": label.partition(":")[0], "generator": api.fingerprint}
        work = Asked(rows, refused, api, sampling, seed, examples.tokenizer, message or prompt_of, columns)
        return Job(Source(label, Wanted(rows, count, refused)), work, WINDOW)

    def _rows(self, spec: Spec) -> Rows:
        return self.store.rows("negatives", spec)


def generate_negatives(plan: Plan, executor: Executor) -> None:
    """Make what is missing of a run's negatives.

    Raises:
        InputError: the engine asked for does not run the model; a pool's file breaks a rule; or the training examples
            are too few for the batch negatives asked for.
    """
    selection = plan.sources.selection
    for job in plan.jobs:
        if isinstance(job.work, pool.FromFile) and job.source.wanted.missing(selection["example_id"]).any():
            job.work.file.check()
    for job in plan.jobs:
        source, label = job.source, f"{job.source.label} negatives"
        # Requests wait for their server, not for a core: one process sends them all, and so keeps the caps. Who borrows
        # targets has all of them in memory: one process is enough.
        where = LocalExecutor() if isinstance(job.work, Asked | batch.Borrowed) else executor
        before = _recorded(source, selection)
        make_missing(source.wanted, selection, job.work, where, batch_size=job.batch_size, label=label)
        if isinstance(job.work, Asked):
            job.work.check()
        there = _recorded(source, selection)
        refused = selection.num_rows * source.count - there
        log.info("negatives: %d %s in %s (%d made, %d reused)", there, source.label, source.rows.name, there - before,
                 before)  # fmt: skip
        if refused and source.wanted.refused is not None:
            log.warning("negatives: %d %s will never be there; the reasons are in %s", refused, source.label,
                        source.wanted.refused.name)  # fmt: skip


def _recorded(source: Source, selection: pa.Table) -> int:
    """Negatives of the selection that are there."""
    return int(np.count_nonzero(source.rows.has_samples(selection["example_id"], source.count)))
