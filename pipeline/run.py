"""A run: one recipe on one store. Resolves the recipe's names to artifacts and calls the stages in order.

Beside the command line the only module that knows all stages. Nothing heavy is imported until there is work.
"""

import json
import logging
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data import atomic, processes
from cpo_pipe.data.embedding import locate_embedder
from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.examples import Examples, largest_token_id
from cpo_pipe.data.models import Model, check_vocabulary, locate_model
from cpo_pipe.data.recipe import Evaluate, Negatives, Rank, Recipe, System, Training, nearest
from cpo_pipe.data.recipe_text import recipe_text
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.generate import Sources, generate_negatives, plan_negatives
from cpo_pipe.pipeline.prepare import find_examples, prepare, target_tokens
from cpo_pipe.pipeline.rank import dropped_reasons, plan_groups, rank
from cpo_pipe.trainer.merge import merge
from cpo_pipe.trainer.train import METRICS_FILE, Inputs, checkpoint, checkpoint_model, train, training_spec

if TYPE_CHECKING:
    from cpo_pipe.eval.evaluate import Evaluation

log = logging.getLogger(__name__)

REPORTED_GROUPS = 50
PACKAGES = ("cpo-pipe", "torch", "transformers", "datasets", "sentence-transformers", "pyarrow")


@dataclass(frozen=True)
class _GroupFacts:
    """What a report shows of the groups; empty where there are none."""

    artifacts: Mapping[str, str] = field(default_factory=dict)
    groups: pa.Table | None = None
    """The first ones."""
    similarities: Sequence[float] = ()
    """Of all ranked negatives."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Negatives by the reason why they were dropped."""
    notes: Sequence[str] = ()


class Run:
    """One recipe on one store."""

    def __init__(self, recipe: Recipe, source: str, store: Store, run_dir: Path, options: Sequence[str] = ()):
        """`source` and `options` are the recipe and the options as given on the command line; messages repeat them."""
        self.recipe = recipe
        self.store = store
        self.run_dir = run_dir
        self._source = source
        self._options = options
        self._examples: Examples | None = None
        self._models: dict[str, Model] = {}

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self) -> Examples:
        """The prepared examples, or MissingInput."""
        if self._examples is None:
            self._examples = find_examples(self.recipe.data, self.store)
        if self._examples is None:
            raise MissingInput(f"the examples are not prepared: run `{self._command('prepare')}`")
        return self._examples

    def model(self, name: str) -> Model:
        """What a model name in the recipe means: a checkpoint (or MissingInput), a folder or a hub model."""
        if name not in self._models:
            self._models[name] = self._find_model(name)
        return self._models[name]

    def _find_model(self, name: str) -> Model:
        if name not in self.recipe.train:
            return self._locate_model(name)
        product = checkpoint(self.store, training_spec(self.recipe.train[name], self._inputs(name)))
        if not product.complete():
            raise MissingInput(f"the training {name} is not done: run `{self._command('train', name)}`")
        return checkpoint_model(name, product)

    def _locate_model(self, name: str) -> Model:
        try:
            model = locate_model(name, self.store)
        except InputError as error:
            near = nearest(name, self.recipe.train, "the training ")
            raise InputError(f"{error}; {near}" if near else str(error)) from error
        known, used = model.vocabulary(), largest_token_id(self.examples())
        if known is not None and used >= known:
            raise InputError(
                f"model {name}: its vocabulary has {known} entries, but the examples have the token id {used}; "
                "set data.tokenizer to the model's own"
            )
        check_vocabulary(model, self.examples().tokenizer, self.store)
        return model

    def sources(self) -> Sources:
        """Which negatives the recipe asks for, made or not."""
        config, examples = self._negatives(), self.examples()
        return plan_negatives(config, self.store, examples, self._generator(), self._target_tokens())[0]

    def groups(self) -> tuple[Sources, Rows]:
        """The complete groups, or MissingInput."""
        sources = self.sources()
        if sources.missing():
            command = self._command("generate-negatives")
            raise MissingInput(f"{sources.missing()} negatives are missing: run `{command}`")
        groups, _, _ = plan_groups(self._rank(), self._ranked(), self.store, sources)
        missing = groups.missing(sources.selection.select(["example_id"])).num_rows
        if missing:
            raise MissingInput(f"{missing} groups are missing: run `{self._command('rank')}`")
        return sources, groups

    # ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Stage `prepare`."""
        with self._stage("prepare") as record:
            record["artifact"] = prepare(self.recipe.data, self.store).product.name

    def generate_negatives(self) -> None:
        """Stage `generate-negatives`."""
        config, examples = self._negatives(), self.examples()
        model = self._generator()
        with self._stage("generate-negatives") as record:
            sources = generate_negatives(config, self.store, examples, model, self._target_tokens())
            record["artifact"] = [pool.rows.name for pool in sources.pools]

    def rank(self) -> None:
        """Stage `rank`."""
        sources = self.sources()
        if sources.missing():
            raise MissingInput(
                f"{sources.missing()} negatives are missing: run `{self._command('generate-negatives')}`"
            )
        with self._stage("rank") as record:
            record["artifact"] = rank(self._rank(), self._ranked(), self.store, sources).name

    def train(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Stage `train`: the named trainings; without names all whose inputs are there, in order of dependency.

        Returns:
            The trainings that could not start, with the reason (which names the command that unblocks them).

        Raises:
            InputError: a name is not in the recipe; MissingInput: an input of a named training is missing.
        """
        for name in names:
            if name not in self.recipe.train:
                hint = nearest(name, self.recipe.train) or f"there are {', '.join(self.recipe.train)}"
                raise InputError(f"training {name}: not in the recipe; {hint}")
        blocked = {}
        for name in self.recipe.training_order():
            if names and name not in names:
                continue
            try:
                inputs = self._inputs(name)
            except MissingInput as missing:
                if names:
                    raise
                blocked[name] = str(missing)
                continue
            with self._stage(f"train {name}") as record:
                record["artifact"] = train(name, self.recipe.train[name], self.store, inputs, self.run_dir).name
        return blocked

    def evaluate(self) -> Path:
        """Stage `evaluate`: prints the table and writes report.html and metrics.parquet; returns the report's path."""
        from cpo_pipe.eval.evaluate import evaluate
        from cpo_pipe.eval.report import print_table

        config, examples = self._evaluation(), self.examples()
        systems = {name: self.system(name, system) for name, system in config.systems.items()}
        with self._stage("evaluate") as record:
            evaluation = evaluate(
                config,
                self.store,
                examples,
                systems,
                max_new_tokens=config.max_new_tokens or self._target_tokens(),
                ranker=self._ranker(),
                target_nll=self._target_logprobs,
            )
            record["artifact"] = evaluation.product.name
        shutil.copyfile(evaluation.product.path / "metrics.parquet", self.run_dir / "metrics.parquet")
        report = self._report(evaluation, systems)
        print_table(evaluation.metrics(), config.baseline, evaluation.shared_metrics, evaluation.notes)
        print(f"report: {report}")
        return report

    def _report(self, evaluation: "Evaluation", systems: Mapping[str, Model]) -> Path:
        from cpo_pipe.eval.report import ReportData, write_report

        trained = self._finished_trainings()
        facts = self._group_facts()
        artifacts = {"examples": self.examples().product.name, **facts.artifacts}
        artifacts |= {f"training {name}": self._address(model) for name, model in trained.items()}
        artifacts |= {f"system {name}": self._address(model) for name, model in systems.items()}
        path = self.run_dir / "report.html"
        data = ReportData(
            run=self.recipe.name,
            created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            versions=_versions(),
            recipe=recipe_text(self.recipe),
            artifacts=artifacts | {"metrics": evaluation.product.name},
            baseline=self._evaluation().baseline,
            metrics=evaluation.metrics(),
            shared_metrics=evaluation.shared_metrics,
            notes=[*evaluation.notes, *facts.notes],
            examples=evaluation.examples,
            outputs=evaluation.outputs(),
            trainings={name: pq.read_table(model.path / METRICS_FILE) for name, model in trained.items()},
            similarities=facts.similarities,
            dropped=facts.dropped,
            group_examples=self.examples().read("train", REPORTED_GROUPS) if facts.groups is not None else None,
            groups=facts.groups,
        )
        write_report(path, data)
        return path

    def _finished_trainings(self) -> dict[str, Model]:
        finished = {}
        for name in self.recipe.training_order():
            with suppress(MissingInput):
                finished[name] = self.model(name)
        return finished

    def _address(self, model: Model) -> str:
        """Where a model is in the store; of one from elsewhere its name and fingerprint."""
        if model.path.is_relative_to(self.store.root):
            return str(model.path.relative_to(self.store.root))
        return f"{model.name} ({model.fingerprint})"

    def _group_facts(self) -> _GroupFacts:
        if self.recipe.negatives is None:
            return _GroupFacts()
        try:
            sources, groups = self.groups()
        except MissingInput as missing:
            return _GroupFacts(notes=[f"No negatives are shown: {missing}"])
        ids = sources.selection["example_id"].to_pylist()
        similarities: list[float] = []
        for table in groups.batches(ids, columns=["candidates"]):
            candidates = pc.list_flatten(table["candidates"])
            negatives = candidates.filter(pc.not_equal(pc.struct_field(candidates, "strategy"), "target"))
            similarities += pc.struct_field(negatives, "similarity").drop_null().to_pylist()
        _, dropped, _ = plan_groups(self._rank(), self._ranked(), self.store, sources)
        return _GroupFacts(
            artifacts={"negatives": ", ".join(pool.rows.name for pool in sources.pools), "groups": groups.name},
            groups=groups.read(ids[:REPORTED_GROUPS]),
            similarities=similarities,
            dropped=dict(dropped_reasons(dropped, ids)),
        )

    def _target_logprobs(self, model: Model, examples: pa.Table) -> list[tuple[float, int]]:
        from cpo_pipe.trainer.logprobs import target_logprobs

        return target_logprobs(self.store, model, examples)

    def _ranker(self) -> str | None:
        """Fingerprint of the embedding model that ranks this recipe's negatives."""
        if self.recipe.negatives is None or not self._ranked():
            return None
        return locate_embedder(self._rank().model, self.store).fingerprint

    def everything(self) -> Path | None:
        """All that is missing, in order; returns the path of the report, if the recipe evaluates."""
        self.prepare()
        grouped = False
        for name in self.recipe.training_order():
            if self.recipe.train[name].objective != "mle" and not grouped:
                self.generate_negatives()
                self.rank()
                grouped = True
            self.train([name])
        if self.recipe.negatives is not None and not grouped:
            self.generate_negatives()
            self.rank()
        return self.evaluate() if self.recipe.evaluate is not None else None

    # ── resolving ────────────────────────────────────────────────────────────────────────────────────────────────

    def _inputs(self, name: str) -> Inputs:
        config: Training = self.recipe.train[name]
        examples = self.examples()
        init = self.model(config.init) if isinstance(config.init, str) else config.init
        if config.objective == "mle":
            return Inputs(examples.tokenizer, init, examples.read("train"))
        assert config.reference is not None
        reference = self.model(config.reference)
        sources, groups = self.groups()
        return Inputs(examples.tokenizer, init, sources.selection, groups, reference)

    def system(self, name: str, system: System) -> Model:
        """The model of a system; an ensemble is merged."""
        if system.model is not None:
            return self.model(system.model)
        assert system.merge is not None
        parts = [(self.model(part), weight) for part, weight in system.merge.items()]
        return checkpoint_model(name, merge(name, self.store, parts, self.examples().tokenizer))

    def _generator(self) -> Model | None:
        name = self._negatives().model
        return None if name is None else self.model(name)

    def _negatives(self) -> Negatives:
        if self.recipe.negatives is None:
            raise InputError("negatives is missing: the recipe has no such section, so there is nothing to generate")
        return self.recipe.negatives

    def _evaluation(self) -> Evaluate:
        if self.recipe.evaluate is None:
            raise InputError("evaluate is missing: the recipe has no such section, so there is nothing to compare")
        return self.recipe.evaluate

    def _rank(self) -> Rank:
        return self.recipe.rank if isinstance(self.recipe.rank, Rank) else Rank()

    def _ranked(self) -> bool:
        return self.recipe.rank != "none"

    def _target_tokens(self) -> int:
        return target_tokens(self.recipe.data)

    def _command(self, stage: str, *names: str) -> str:
        return shlex.join(["cpo-pipe", stage, self._source, *names, *self._options])

    @contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Note in the run's folder, once a stage is done, by which recipe, what it made, how long it took."""
        record: dict[str, Any] = {}
        if not processes.is_main():
            yield record
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is said before the work
        start = time.time()
        yield record
        atomic.write_bytes(self.run_dir / "recipe.yaml", recipe_text(self.recipe).encode())
        record |= {"started": start, "seconds": round(time.time() - start, 3)}
        path = self.run_dir / "run.json"
        run = json.loads(path.read_text()) if path.exists() else {"stages": {}}
        run |= {"store": str(self.store.root.resolve()), "versions": _versions()}
        run["stages"][name] = record
        atomic.write_bytes(path, json.dumps(run, indent=2).encode())


def _versions() -> dict[str, str]:
    """Of Python and of the packages that could change what is made."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
