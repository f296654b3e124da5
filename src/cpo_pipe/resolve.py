"""What the names in a recipe mean: models, APIs, and the artifacts in the store, made or not.

Nothing is made here, except that a hub model is downloaded and an adapter or an ensemble merged when it is asked for.
"""

import logging
import shlex
from collections.abc import Sequence
from contextlib import suppress

from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.examples import Examples, largest_token_id
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model, checkpoint_model, logprob_rows
from cpo_pipe.data.models.tokenizer import check_vocabulary
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.text import nearest
from cpo_pipe.eval.config import Evaluate, System
from cpo_pipe.eval.generate import SystemModel
from cpo_pipe.eval.output_file import open_outputs
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import Plan, plan_negatives
from cpo_pipe.pipeline.prepare.prepare import find_examples
from cpo_pipe.pipeline.rank.rank import plan_groups
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.trainer.merge import ensemble, merge
from cpo_pipe.trainer.objectives.preference import PreferenceTraining, ReferenceTraining
from cpo_pipe.trainer.train import Inputs, checkpoint, training_spec

log = logging.getLogger(__name__)


class Resolver:
    """Resolves the names of one recipe on one store.

    Trainings share negatives and groups, unless a training has its own (`train.NAME.negatives`, or a later iteration).
    Where a method takes `training`, None means those that are shared.
    """

    def __init__(self, recipe: Recipe, store: Store, source: str, options: Sequence[str], *, fetch: bool = True):
        """Resolve the names of a recipe.

        Args:
            recipe: the recipe.
            store: where artifacts are.
            source: the recipe as given on the command line, which messages repeat.
            options: the options of the command line, likewise.
            fetch: download hub models and merge adapters that are named; else they count as missing.
        """
        self.recipe = recipe
        self.store = store
        self.trainings = recipe.trainings()
        """By name, later iterations included."""
        self.apis = {name: ApiModel(name, api) for name, api in recipe.apis.items()}
        self._source = source
        self._options = options
        self._examples: Examples | None = None
        self._models: dict[str, Model] = {}
        self._fetch = fetch

    def command(self, stage: str, *names: str) -> str:
        """Return the command line that makes a stage of this recipe, for messages."""
        return shlex.join(["cpo-pipe", stage, self._source, *names, *self._options])

    def offline(self) -> "Resolver":
        """Return a resolver to which hub models that are not downloaded, and adapters not merged, are missing."""
        return Resolver(self.recipe, self.store, self._source, self._options, fetch=False)

    # ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────

    def negatives_section(self, training: str | None) -> Negatives:
        """Return the recipe's section, or what of it a training uses."""
        negatives = self.recipe.negatives if training is None else self.recipe.negatives_of(training)
        if negatives is None:
            raise InputError("negatives: the recipe has no such section, so there is nothing to generate; add it")
        return negatives

    def evaluate_section(self) -> Evaluate:
        """Return the recipe's section."""
        if self.recipe.evaluate is None:
            raise InputError("evaluate: the recipe has no such section, so there is nothing to compare; add it")
        return self.recipe.evaluate

    def negatives_owner(self, training: str) -> str | None:
        """Return the training itself where it has negatives of its own, else None."""
        config = self.trainings[training]
        own = isinstance(config, PreferenceTraining) and config.negatives is not None
        return training if own or training not in self.recipe.train else None

    def negatives_owners(self) -> list[str | None]:
        """Return whose negatives the recipe needs: the shared ones (None) first, then each training's own."""
        users = [name for name, training in self.trainings.items() if isinstance(training, PreferenceTraining)]
        owners = dict.fromkeys(map(self.negatives_owner, users))
        return sorted(owners, key=lambda training: training is not None) or [None]

    def check_trainings(self, names: Sequence[str]) -> None:
        """Refuse names of trainings that are not in the recipe.

        Raises:
            InputError: one is not, or there are none.
        """
        if not self.trainings:
            raise InputError("train: the recipe has no such section, so there is nothing to train; add it")
        for name in names:
            if name not in self.trainings:
                hint = nearest(name, self.trainings) or f"choose from {', '.join(self.trainings)}"
                raise InputError(f"training {name}: not in the recipe; {hint}")

    def exported_owner(self, training: str) -> str | None:
        """Return whose negatives an export is of: those of a training, or without a name the first ones.

        Raises:
            InputError: there is no such training on negatives.
        """
        if not training:
            return self.negatives_owners()[0]
        if not isinstance(self.trainings.get(training), PreferenceTraining):
            known = [name for name, config in self.trainings.items() if isinstance(config, PreferenceTraining)]
            hint = nearest(training, known) or f"choose from {', '.join(known)}"
            raise InputError(f"--training {training}: no training on negatives; {hint}")
        return self.negatives_owner(training)

    # ── artifacts ────────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self) -> Examples:
        """Return the prepared examples.

        Raises:
            MissingInput: they are not prepared.
        """
        if self._examples is None:
            self._examples = find_examples(self.recipe.data, self.store)
        if self._examples is None:
            raise MissingInput(f"the examples are not prepared: run `{self.command('prepare')}`")
        return self._examples

    def negatives(self, training: str | None = None, source: str | None = None) -> Plan:
        """Return which negatives the recipe asks for, of one source or of all, made or not."""
        tokens = self.recipe.data.longest_target()
        section = self.negatives_section(training)
        if source is not None:
            section = section.only({source: section.sources[source].count})
        return plan_negatives(section, self.store, self.examples(), self._generator, tokens)

    def complete_negatives(self, training: str | None) -> Plan:
        """Return where the negatives are.

        Raises:
            MissingInput: some are missing.
        """
        plan = self.negatives(training)
        if missing := plan.missing():
            command = self.command("generate-negatives")
            raise MissingInput(f"{missing} negatives{of(training)} are missing: run `{command}`")
        return plan

    def groups(self, training: str | None = None) -> tuple[Plan, Rows]:
        """Return the complete groups, and the negatives they consist of.

        Raises:
            MissingInput: some are missing.
        """
        plan = self.complete_negatives(training)
        groups, _ = plan_groups(self.recipe.rank, self.scorer_dependencies(), plan)
        missing = groups.missing(plan.selection.select(["example_id"])).num_rows
        if missing:
            raise MissingInput(f"{missing} groups{of(training)} are missing: run `{self.command('rank')}`")
        return plan, groups

    def dropped_as_correct(self, plan: Plan) -> Rows | None:
        """Return the negatives that `rank` drops, with the reasons; None unless it drops correct ones."""
        if plan.drop_correct is None:
            return None
        _, dropped = plan_groups(self.recipe.rank, self.scorer_dependencies(), plan)
        return dropped

    def training_inputs(self, name: str) -> Inputs:
        """Return what a training starts from.

        Raises:
            MissingInput: something of it is missing.
        """
        config, examples = self.trainings[name], self.examples()
        init = self.model(config.init) if isinstance(config.init, str) else config.init
        columns = ["example_id", "prompt_ids", "target_ids"]  # texts need not be in memory while training
        if not isinstance(config, PreferenceTraining):
            selection = examples.read("train", columns=columns)
            return Inputs(examples.tokenizer, init, selection, target_ends=examples.end_tokens)
        reference = self.model(config.reference) if isinstance(config, ReferenceTraining) else None
        plan, groups = self.groups(self.negatives_owner(name))
        strengths = self.recipe.strengths_of(name)
        selection = plan.selection.select(columns)
        return Inputs(examples.tokenizer, init, selection, groups, reference, strengths, examples.end_tokens)

    def finished_trainings(self) -> dict[str, Model]:
        """Return the checkpoints that exist, by training."""
        finished = {}
        for name in self.recipe.training_order():
            with suppress(MissingInput):
                finished[name] = self.model(name)
        return finished

    def reference_logprobs(self) -> Rows | None:
        """Return the log-probs under the first training's reference model that exists, made or not."""
        for training in self.recipe.train.values():
            if isinstance(training, ReferenceTraining):
                with suppress(MissingInput):
                    return logprob_rows(self.store, self.model(training.reference), training.dtype)
        return None

    def scorer_dependencies(self) -> ScorerDependencies:
        """Return what scorers may need."""
        return ScorerDependencies(self.store, self.apis)

    def ranker(self) -> str | None:
        """Return the fingerprint of the embedding model that ranks the negatives; None where none does."""
        if self.recipe.negatives is None:
            return None
        embedder = self.recipe.rank.embedder(self.store)
        return embedder.fingerprint if embedder is not None else None

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────

    def model(self, name: str) -> Model:
        """Return what a model's name means: a training's checkpoint, a folder or a hub model.

        Raises:
            MissingInput: the training is not done.
            InputError: the model does not exist, or it does not know the examples' token ids.
        """
        if name not in self._models:
            self._models[name] = self._find_model(name)
        return self._models[name]

    def judge_models(self, config: Evaluate, only_apis: bool = False) -> dict[str, Model]:
        """Return the models that judges and `mauve_model` name, which have tokenizers of their own.

        Args:
            config: the recipe's section.
            only_apis: leave out those of judges that ask no API, and MAUVE's.
        """
        judges = [judge for judge in config.judges.values() if judge.apis() or not only_apis]
        names = [name for judge in judges for name in judge.models()]
        if config.mauve_model is not None and not only_apis:
            names.append(config.mauve_model)
        return {name: self.judge_model(name) for name in names}

    def judge_model(self, name: str) -> Model:
        """Return a model that has a tokenizer of its own.

        Raises:
            MissingInput: it is a training that is not done.
        """
        return self.model(name) if name in self.trainings else self._locate(name)

    def system(self, name: str, system: System) -> SystemModel:
        """Return the model of a system, or its file; an ensemble is merged."""
        if system.file is not None:
            return open_outputs(name, system.file, system.columns, self.store)
        if system.model is not None:
            return self.apis.get(system.model) or self.model(system.model)
        assert system.merge is not None
        parts = [(self.model(part), weight) for part, weight in system.merge.items()]
        return checkpoint_model(name, merge(name, self.store, parts, self.examples().tokenizer))

    def merged(self, name: str) -> Model:
        """Return the model of a system or a training by its name.

        Raises:
            InputError: the recipe has neither, or the system has no weights.
            MissingInput: the training is not done.
        """
        systems = self.recipe.evaluate.all_systems() if self.recipe.evaluate is not None else {}
        if name not in systems:
            if name in self.trainings:
                return self.model(name)
            known = {**systems, **self.trainings}
            hint = nearest(name, known) or f"choose from {', '.join(known)}"
            raise InputError(f"{name}: the recipe has no such system or training; {hint}")
        model = self.system(name, systems[name])
        if not isinstance(model, Model):
            what = "an API" if isinstance(model, ApiModel) else "a file of outputs"
            raise InputError(f"{name}: is {what}, which has no weights to merge; name another system")
        return model

    def systems(self) -> dict[str, SystemModel]:
        """Return the model of each system that is evaluated; ensembles are merged."""
        return {name: self.system(name, system) for name, system in self.evaluate_section().all_systems().items()}

    def available_systems(self, quiet: bool = False) -> dict[str, SystemModel | None]:
        """Return the model of each system; None where it is not downloaded, trained or merged. Makes nothing.

        Args:
            quiet: do not log why a system is not available.
        """
        offline = self.offline()
        available: dict[str, SystemModel | None] = {}
        for name, system in self.evaluate_section().all_systems().items():
            try:
                available[name] = offline.available_system(name, system)
            except MissingInput as missing:
                log.log(logging.DEBUG if quiet else logging.INFO, "system %s is not available yet: %s", name, missing)
                available[name] = None
        return available

    def available_system(self, name: str, system: System) -> SystemModel | None:
        """Return the model of a system; None for an ensemble that is not merged yet.

        Raises:
            MissingInput: a model is not downloaded or trained.
        """
        if system.merge is None:
            return self.system(name, system)
        parts = [(self.model(part), weight) for part, weight in system.merge.items()]
        artifact = ensemble(self.store, parts, self.examples().tokenizer)
        return checkpoint_model("", artifact) if artifact.complete() else None

    def _generator(self, name: str, *, any_tokenizer: bool = False) -> Model | ApiModel:
        """Return what makes negatives: an API of the recipe, or a model."""
        if name in self.apis:
            return self.apis[name]
        return self._locate(name) if any_tokenizer and name not in self.trainings else self.model(name)

    def _find_model(self, name: str) -> Model:
        if name in self.trainings:
            artifact = checkpoint(self.store, training_spec(self.trainings[name], self.training_inputs(name)))
            if not artifact.complete():
                raise MissingInput(f"the training {name} is not done: run `{self.command('train', name)}`")
            return checkpoint_model(name, artifact)
        model = self._locate(name)
        known, used = model.vocabulary(), largest_token_id(self.examples())
        if known is not None and used >= known:
            raise InputError(
                f"model {name}: its vocabulary has {known} entries, but the examples have the token id {used}; "
                "set data.tokenizer to the model's own"
            )
        check_vocabulary(model, self.examples().tokenizer, self.store)
        return model

    def _locate(self, name: str) -> Model:
        """Return the model of a folder or hub name, whatever its tokenizer is."""
        try:
            return locate_model(name, self.store, make=self._fetch)
        except MissingInput:
            raise
        except InputError as error:
            near = nearest(name, self.trainings, "the training ")
            raise InputError(f"{error}; {near}" if near else str(error)) from error


def of(training: str | None) -> str:
    """Return ` of NAME` for a training with negatives of its own, nothing for shared ones."""
    return f" of {training}" if training is not None else ""
