"""A run: one recipe on one store. Resolves the recipe's names to artifacts and calls the stages in order.

Beside the command line the only module that knows all stages. Nothing heavy is imported until there is work.
"""

import difflib
import json
import logging
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from cpo_pipe.data import atomic
from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.models import Model, locate_model
from cpo_pipe.data.recipe import Negatives, Rank, Recipe, System, Training
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.generate import Sources, generate_negatives, plan_negatives
from cpo_pipe.pipeline.prepare import find_examples, prepare
from cpo_pipe.pipeline.rank import plan_groups, rank
from cpo_pipe.trainer.merge import merge
from cpo_pipe.trainer.train import Inputs, checkpoint, checkpoint_model, train, training_spec

log = logging.getLogger(__name__)

PACKAGES = ("cpo-pipe", "torch", "transformers", "datasets", "sentence-transformers", "pyarrow")


class Run:
    """One recipe on one store."""

    def __init__(self, recipe: Recipe, source: str, store: Store, run_dir: Path):
        self.recipe = recipe
        self.store = store
        self.run_dir = run_dir
        self._source = source
        self._examples: Examples | None = None
        self._models: dict[str, Model] = {}
        atomic.write_bytes(run_dir / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self) -> Examples:
        """The prepared examples, or MissingInput."""
        if self._examples is None:
            self._examples = find_examples(self.recipe.data, self.store)
        if self._examples is None:
            raise MissingInput(f"the examples are not prepared: run `{self._command('prepare')}`")
        return self._examples

    def model(self, name: str) -> Model:
        """The model that a name in the recipe means: a training's checkpoint (or MissingInput), a folder or a hub model."""
        if name not in self._models:
            self._models[name] = self._find_model(name)
        return self._models[name]

    def _find_model(self, name: str) -> Model:
        if name not in self.recipe.train:
            return locate_model(name, self.store)
        product = checkpoint(self.store, training_spec(self.recipe.train[name], self._inputs(name)))
        if not product.complete():
            raise MissingInput(f"the training {name} is not done: run `{self._command('train', name)}`")
        return checkpoint_model(name, product)

    def sources(self) -> Sources:
        """Which negatives the recipe asks for, made or not."""
        config, examples = self._negatives(), self.examples()
        return plan_negatives(config, self.store, examples, self.model(config.model), self._target_tokens())[0]

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
        model = self.model(config.model)
        with self._stage("generate-negatives") as record:
            sources = generate_negatives(config, self.store, examples, model, self._target_tokens())
            record["artifact"] = [pool.rows.name for pool in sources.pools]

    def rank(self) -> None:
        """Stage `rank`."""
        sources = self.sources()
        if sources.missing():
            raise MissingInput(f"{sources.missing()} negatives are missing: run `{self._command('generate-negatives')}`")
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
                near = difflib.get_close_matches(name, self.recipe.train, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.recipe.train)}"
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
                record["artifact"] = train(name, self.recipe.train[name], self.store, inputs).name
        return blocked

    def evaluate(self) -> Path:
        """Stage `evaluate`; returns the path of the report."""
        raise NotImplementedError

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

    def _negatives(self) -> Negatives:
        if self.recipe.negatives is None:
            raise InputError("negatives is missing: the recipe has no such section, so there is nothing to generate")
        return self.recipe.negatives

    def _rank(self) -> Rank:
        return self.recipe.rank if isinstance(self.recipe.rank, Rank) else Rank()

    def _ranked(self) -> bool:
        return self.recipe.rank != "none"

    def _target_tokens(self) -> int:
        return self.recipe.data.max_target_tokens

    def _command(self, stage: str, *names: str) -> str:
        return shlex.join(["cpo-pipe", stage, self._source, *names])

    @contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Note in the run's folder what a stage made, how long it took, and with which versions."""
        record: dict[str, Any] = {}
        start = time.time()
        yield record
        record |= {"started": start, "seconds": round(time.time() - start, 3)}
        path = self.run_dir / "run.json"
        run = json.loads(path.read_text()) if path.exists() else {"stages": {}}
        run |= {"store": str(self.store.root.resolve()), "python": platform.python_version(),
                "versions": {package: version(package) for package in PACKAGES}}  # fmt: skip
        run["stages"][name] = record
        atomic.write_bytes(path, json.dumps(run, indent=2).encode())
