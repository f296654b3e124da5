"""The recipe: one YAML file that drives a run.

Each section is declared next to the code that it configures. This module composes them and checks the rules across
sections.
"""

import graphlib
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from cpo_pipe.data.config import Name, Section
from cpo_pipe.data.text import listed, nearest
from cpo_pipe.eval.config import Evaluate, Published
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.negatives.config import TARGET, Negatives
from cpo_pipe.pipeline.negatives.rejected import Rejected
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.presets import PRESETS
from cpo_pipe.pipeline.scorers import SCORERS
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.pipeline.scorers.scorer import Scorer
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.objectives.preference import PreferenceTraining


def _default_negatives(sections: dict[str, Any]) -> Negatives | None:
    """Return the rejected answers of the data as negatives, where a training needs some and the data may have them."""
    data, trainings = sections.get("data"), sections.get("train", {}).values()
    needed = any(isinstance(training, PreferenceTraining) for training in trainings)
    if not needed or data is None or not data.may_have_rejected:
        return None
    return Negatives.model_validate({"sources": {Rejected.kind: {}}})


def _default_scorer(sections: dict[str, Any]) -> Scorer:
    """Return the paper's scorer; none where all negatives are rejected answers and no training needs an order."""
    negatives, trainings = sections.get("negatives"), sections.get("train", {}).values()
    only_rejected = negatives is not None and all(isinstance(source, Rejected) for source in negatives.sources.values())
    if only_rejected and not any(needs_scores(training) for training in trainings):
        return NoScorer(by="none")
    return EmbeddingScorer()


def needs_scores(training: Training) -> bool:
    """Return whether the order or the scores of negatives decide a training."""
    by = training.curriculum.by if training.curriculum is not None else None
    return isinstance(training, PreferenceTraining) and (training.sees_ranks or by == "similarity")


class Recipe(Section):
    """A whole run."""

    name: Name = Field("recipe", description="names the run's folder (default: the file's name)")
    note: str | None = Field(None, description="remarks, which the report shows")
    data: Annotated[Data, PRESETS] = Field(description="ground-truth pairs")
    apis: dict[Name, Api] = Field(default_factory=dict, description="models behind OpenAI-compatible servers, by name")
    train: dict[Name, Annotated[Training, OBJECTIVES]] = Field(default_factory=dict, description="named trainings")
    negatives: Negatives | None = Field(
        default_factory=_default_negatives,
        description="negatives (default: the rejected answers of preference data)",
    )
    rank: Annotated[Scorer, SCORERS] = Field(
        default_factory=_default_scorer, description="how negatives are ranked, and which are dropped"
    )
    iterations: int = Field(
        1,
        gt=0,
        le=100,
        description="iterations of self-play: each training on negatives is repeated, `cpo` as `cpo@2` and so on, from "
        "the model of the iteration before, which is also its reference and the generator of its negatives",
    )
    evaluate: Evaluate | None = Field(None, description="comparison of the results")
    published: list[Published] = Field(
        default_factory=list, description="published figures, shown beside those of the run"
    )
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="keys as for `--set`, each with a list of values: `run` makes all combinations on one store, and "
        "ranks them on validation rows",
    )
    scales: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="smaller versions of the run, by name, for `--scale NAME`: keys as for `--set`, with their values; "
        "a * matches every name",
    )

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if twice := sorted(self.apis.keys() & self.train.keys()):
            raise ValueError(f"apis: {twice[0]} is also the name of a training; rename one of them")
        if self.negatives is not None:
            self._check_apis(self.negatives)
        for name, judge in self.evaluate.judges.items() if self.evaluate is not None else ():
            for api in judge.apis():
                self._check_api(f"evaluate.judges.{name}.api", api)
        for api in self.rank.apis():
            self._check_api("rank.api", api)
        if self.negatives is not None and self.negatives.drop_correct is not None:
            for api in self.negatives.drop_correct.scorer().apis():
                self._check_api("negatives.drop_correct.api", api)
        self._check_local()
        for name, training in self.train.items():
            if isinstance(training, PreferenceTraining):
                self._check_preferences(name, training)
        self.training_order()
        self._check_iterations()
        return self

    def _check_iterations(self) -> None:
        """Refuse iterations without a training on negatives, and names of iterations that do not exist."""
        if self.iterations > 1 and not any(
            isinstance(training, PreferenceTraining) for training in self.train.values()
        ):
            raise ValueError(f"iterations is {self.iterations}, but no training learns from negatives; remove it")
        trainings = self.trainings()
        for place, model in ((place, model) for place, models in self.named_models().items() for model in models):
            base, separator, number = model.rpartition("@")
            if separator and number.isdecimal() and base in self.train and model not in trainings:
                existing = [name for name in trainings if name.partition("@")[0] == base]
                raise ValueError(
                    f"{place} names {model}, but iterations is {self.iterations}; choose from {listed(existing)}, or "
                    "raise iterations"
                )

    def _check_preferences(self, name: str, training: PreferenceTraining) -> None:
        """Refuse missing negatives, unknown sources and pairs, and an order by a measure that is not available."""
        if self.negatives is None:
            raise ValueError(f"negatives is missing: train.{name} has the objective {training.objective}")
        sources = self.negatives.sources
        for source, count in (training.negatives or {}).items():
            if source not in sources:
                hint = nearest(source, sources) or f"choose from {listed(sources)}"
                raise ValueError(f"train.{name}.negatives: unknown source {source!r}; {hint}")
            try:
                sources[source].with_count(count)
            except ValidationError as error:
                message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"train.{name}.negatives.{source}: {message}") from error
        known = (self.negatives_of(name) or self.negatives).labels()
        for label in (label for pair in training.pairs or () for label in pair):
            if label not in known:
                hint = nearest(label, known) or f"choose from {listed(known)}"
                raise ValueError(f"train.{name}.pairs: unknown label {label!r}; {hint}")
        if training.sees_ranks and not self.rank.ranks:
            raise ValueError(
                f"rank.by is {self.rank.by}, but the objective {training.objective} of train.{name} needs ranks; "
                "use another objective, or remove rank.by"
            )
        by = training.curriculum.by if training.curriculum is not None else None
        if by == "similarity" and not self.rank.ranks:
            raise ValueError(
                f"rank.by is {self.rank.by}, but train.{name}.curriculum.by is similarity; "
                "choose another curriculum, or remove rank.by"
            )
        if by == "strength":
            strengths = self.strengths_of(name)
            if unknown := [label for label in self._compared(name) if label not in strengths]:
                key = f"sources.{unknown[0]}.strength" if unknown[0] != TARGET else "target_strength"
                raise ValueError(
                    f"train.{name}.curriculum.by is strength, but {unknown[0]} has none; set negatives.{key}"
                )

    def _check_local(self) -> None:
        """Refuse APIs where weights are needed."""
        for place, models in self.local_models().items():
            for model in models:
                if model in self.apis:
                    raise ValueError(
                        f"{place} names {model}, which is an API and has no weights here; name a local or hub model"
                    )

    def local_models(self) -> dict[str, list[str]]:
        """Return the names of the models whose weights are needed, by the key that names them."""
        needed = {f"train.{name}": training.upstream() for name, training in self.train.items()}
        if self.evaluate is not None:
            needed |= {f"evaluate.systems.{name}": [*(system.merge or ())]
                       for name, system in self.evaluate.systems.items()}  # fmt: skip
            needed |= {f"evaluate.ensembles.{name}": ensemble.of for name, ensemble in self.evaluate.ensembles.items()}
            needed |= {f"evaluate.judges.{name}": judge.models() for name, judge in self.evaluate.judges.items()}
            needed["evaluate.mauve_model"] = [self.evaluate.mauve_model] if self.evaluate.mauve_model else []
        return needed

    def named_models(self) -> dict[str, list[str]]:
        """Return `local_models` with those of sources and systems, which may be APIs, by the key that names them."""
        named = self.local_models()
        if self.negatives is not None:
            named |= {f"negatives.sources.{name}": source.models() for name, source in self.negatives.sources.items()}
        if self.evaluate is not None:
            named |= {f"evaluate.systems.{name}": [system.model]
                      for name, system in self.evaluate.systems.items() if system.model is not None}  # fmt: skip
        return named

    def apis_of_negatives(self) -> list[str]:
        """Return the names of the APIs that make, filter or rank negatives."""
        named = list(self.rank.apis())
        if self.negatives is not None:
            named += self.negatives.models()
            if self.negatives.drop_correct is not None:
                named += self.negatives.drop_correct.scorer().apis()
        return [name for name in dict.fromkeys(named) if name in self.apis]

    def _check_apis(self, negatives: Negatives) -> None:
        for name, source in negatives.sources.items():
            try:
                source.check_apis(self.apis)
            except ValueError as error:
                raise ValueError(f"negatives.sources.{name}: {error}") from error

    def _check_api(self, place: str, name: str) -> None:
        if name not in self.apis:
            hint = nearest(name, self.apis) or f"choose from {listed(self.apis)}"
            raise ValueError(f"{place} {name!r} is not in `apis`; {hint}")

    def trainings(self) -> dict[str, Training]:
        """Return the trainings by name, later iterations last.

        Iteration 2 of `cpo` is `cpo@2`: no name in `train` has an @, and α in an ensemble's NAME@α is at most 1.
        """
        trainings = dict(self.train)
        for number in range(2, self.iterations + 1):
            for name, training in self.train.items():
                if isinstance(training, PreferenceTraining):
                    before = name if number == 2 else f"{name}@{number - 1}"
                    trainings[f"{name}@{number}"] = training.continued_from(before)
        return trainings

    def strengths_of(self, name: str) -> dict[str, float]:
        """Return the strength of each label that a training compares, where the recipe gives it."""
        negatives = self.negatives_of(name)
        known = negatives.strengths() if negatives is not None else {}
        return {label: known[label] for label in self._compared(name) if label in known}

    def _compared(self, name: str) -> list[str]:
        """Return the labels of the candidates that a training learns from."""
        training = self.training(name)
        if isinstance(training, PreferenceTraining) and training.pairs is not None:
            return list(dict.fromkeys(label for pair in training.pairs for label in pair))
        negatives = self._negatives_of(name, training)
        return negatives.labels() if negatives is not None else []

    def negatives_of(self, name: str) -> Negatives | None:
        """Return the negatives that a training learns from; in a later iteration the one before samples them."""
        return self._negatives_of(name, self.training(name))

    def training(self, name: str) -> Training:
        """Return a training by its name, also of a later iteration."""
        return self.train[name] if name in self.train else self.trainings()[name]

    def _negatives_of(self, name: str, training: Training) -> Negatives | None:
        if self.negatives is None or not isinstance(training, PreferenceTraining):
            return None
        chosen = self.negatives if training.negatives is None else self.negatives.only(training.negatives)
        return chosen if name in self.train else chosen.with_generator(str(training.init))

    def training_order(self) -> list[str]:
        """Return the names of the trainings of all iterations, each after those that it needs."""
        trainings = self.trainings()
        graph = {
            name: [model for model in self._models_before(name, training) if model in trainings]
            for name, training in trainings.items()
        }
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            raise ValueError(f"train has a cycle: {' needs '.join(reversed(error.args[1]))}") from error

    def _models_before(self, name: str, training: Training) -> list[str]:
        negatives = self._negatives_of(name, training)
        return training.upstream() + (negatives.models() if negatives is not None else [])
