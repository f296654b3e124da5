"""Find what is wrong with a recipe's later stages before anything costly is made."""

from contextlib import suppress

from cpo_pipe.data.errors import MissingInput
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.rank.rank import check_scorers, plan_groups
from cpo_pipe.resolve import Resolver


def check_annotations(resolver: Resolver) -> None:
    """Read the human annotations that the recipe names.

    Raises:
        InputError: the file cannot be read or breaks a rule.
    """
    config = resolver.recipe.evaluate
    if config is not None and config.annotations is not None:
        from cpo_pipe.eval.annotations import read_annotations

        read_annotations(config.annotations, resolver.store.hash_file)


def check_stages(resolver: Resolver) -> None:
    """Plan the stages after `prepare` as far as their inputs exist; make nothing and load no model.

    What waits for a training is skipped here. It is planned when its stage begins.

    Raises:
        InputError: a model, a file or a setting of a stage is wrong.
    """
    _check_negatives(resolver)
    for training in resolver.recipe.train.values():
        for model in training.upstream():
            with suppress(MissingInput):
                resolver.model(model)
    if resolver.recipe.evaluate is not None:
        _check_evaluation(resolver)


def _check_negatives(resolver: Resolver) -> None:
    """Plan the negatives and the groups."""
    recipe = resolver.recipe
    if recipe.negatives is None:
        return
    dependencies = resolver.scorer_dependencies()
    recipe.rank.spec(dependencies)
    targets: list[str] = []
    for owner in resolver.negatives_owners():
        section = resolver.negatives_section(owner)
        try:
            resolver.groups(owner)
        except MissingInput:
            targets = (
                targets or resolver.examples().read("train", section.max_examples, ["target"])["target"].to_pylist()
            )
            check_scorers(recipe.rank, section.drop_correct, dependencies, targets)
        for source in section.sources:  # one by one: some may wait for a training
            with suppress(MissingInput):
                plan = resolver.negatives(owner, source)
                plan_groups(recipe.rank, dependencies, plan)
                plan.check_inputs()


def _check_evaluation(resolver: Resolver) -> None:
    """Plan the evaluation of the systems that exist, by the judges whose models exist."""
    from cpo_pipe.eval.evaluate import plan_evaluation

    config = resolver.evaluate_section()
    systems, models = dict[str, Model | ApiModel](), dict[str, Model]()
    for name, system in config.all_systems().items():
        for part in system.merge or ():
            with suppress(MissingInput):
                resolver.model(part)
        with suppress(MissingInput):
            if (model := resolver.available_system(system)) is not None:
                systems[name] = model
    needed = [name for judge in config.judges.values() for name in judge.models()]
    for name in [*needed, config.mauve_model] if config.mauve_model else needed:
        with suppress(MissingInput):
            models[name] = resolver.judge_model(name)
    judges = {name: judge for name, judge in config.judges.items() if models.keys() >= {*judge.models()}}
    without_mauve = {} if config.mauve_model in (None, *models) else {"mauve_model": None, "mauve_seeds": 0}
    plan = plan_evaluation(
        config.model_copy(update={"judges": judges, **without_mauve}),
        resolver.store,
        resolver.examples(),
        systems,
        max_new_tokens=config.max_new_tokens or resolver.recipe.data.longest_target(),
        models=models,
        apis=resolver.apis,
        executor=LocalExecutor(),
    )
    asked = [one.system for one in plan.generations if one.request.missing(plan.selection["example_id"]).any()]
    apis = [model for name in asked if isinstance(model := systems[name], ApiModel)]
    if len(systems) < len(config.all_systems()):  # their outputs are missing, so the judges will be asked
        apis += [resolver.apis[name] for judge in config.judges.values() for name in judge.apis()]
    for api in apis:
        api.check_client()
