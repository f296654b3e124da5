"""Find all that is wrong with a recipe before anything is made: what can be found now, and what prepared examples show.

Each check collects its mistakes, so that a user sees all of them at once.
"""

from contextlib import suppress

import pyarrow.compute as pc

from cpo_pipe.data.errors import Findings, InputError, MissingInput
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models import lora
from cpo_pipe.data.models.embedder import PACKAGED
from cpo_pipe.data.models.fetch import check_exists
from cpo_pipe.data.models.model import Model, ScratchModel, check_weights
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.data.text import nearest
from cpo_pipe.eval.config import Evaluate
from cpo_pipe.eval.generate import SystemModel
from cpo_pipe.eval.output_file import open_outputs
from cpo_pipe.needs import check_fits, training_needs
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.engines.registry import AUTO
from cpo_pipe.pipeline.engines.registry import check_installed as check_engine
from cpo_pipe.pipeline.prepare.prepare import check_data
from cpo_pipe.pipeline.rank.rank import check_scorers, plan_groups
from cpo_pipe.resolve import Resolver
from cpo_pipe.trainer.packages import check_installed

# ── before there are examples ────────────────────────────────────────────────────────────────────────────────────────


def check_settings(resolver: Resolver, force: bool = False) -> None:
    """Check what needs no examples: data, models, packages, engines, files, servers, memory and disk; make nothing.

    Raises:
        InputError: something is wrong; all of it is in the message.
    """
    findings = Findings()
    with findings.collect():
        check_data(resolver.recipe.data, resolver.store)
    for name, training in resolver.recipe.train.items():
        with findings.collect():
            check_installed(name, training)
        if isinstance(training.init, ScratchModel):
            with findings.collect():
                training.init.check_keys(f"train.{name}.init")
    if isinstance(tokenizer := resolver.recipe.data.tokenizer, str):
        with findings.collect():
            locate_tokenizer(tokenizer, resolver.store).load()
    for model, place in _named_models(resolver).items():
        with findings.collect():
            _check_model(model, place, resolver)
    _check_negatives_settings(resolver, findings)
    if resolver.recipe.evaluate is not None:
        _check_evaluation_settings(resolver, resolver.recipe.evaluate, findings)
    if not force:
        with findings.collect():
            check_fits(resolver, training_needs(resolver))
    if not _prepared(resolver):  # otherwise the stages know which of them will be asked
        for api in _named_apis(resolver):
            with findings.collect():
                api.check_server()
    findings.report()


def _prepared(resolver: Resolver) -> bool:
    with suppress(InputError):
        resolver.examples()
        return True
    return False


def _named_models(resolver: Resolver) -> dict[str, str]:
    """Return the folders and hub names of causal models in the recipe, with the first key that names each."""
    known = {*resolver.trainings, *resolver.recipe.apis}
    named: dict[str, str] = {}
    for place, models in resolver.recipe.named_models().items():
        for model in models:
            if model not in known:
                named.setdefault(model, place)
    return named


def _check_model(name: str, place: str, resolver: Resolver) -> None:
    """Refuse a model that does not exist, is damaged, or is of an unknown architecture. Its weights are not read."""
    try:
        folder = check_exists(name, "model")
    except InputError as error:
        near = nearest(name, resolver.trainings, "the training ")
        raise InputError(f"{place}: {error}{f'; {near}' if near else ''}") from error
    if folder is None:
        return
    check_weights(folder)
    if (folder / lora.CONFIG).is_file():
        base, _ = lora.base_of(name, folder)
        _check_model(base, place, resolver)
    else:
        Model(name, folder, "").skeleton()


def _check_negatives_settings(resolver: Resolver, findings: Findings) -> None:
    recipe = resolver.recipe
    if recipe.negatives is None:
        return
    for name, source in recipe.negatives.sources.items():
        with findings.collect():
            check_engine(getattr(source, "engine", AUTO), f"negatives.sources.{name}.engine")
    correct = recipe.negatives.drop_correct
    for scorer in [recipe.rank, *([correct.scorer()] if correct is not None else [])]:
        with findings.collect():
            scorer.check_models()


def _check_evaluation_settings(resolver: Resolver, config: Evaluate, findings: Findings) -> None:
    with findings.collect():
        check_engine(config.engine, "evaluate.engine")
    features = config.mauve_seeds > 0 and config.mauve_model is None
    if config.embedder != PACKAGED and (features or any(judge.uses_embeddings for judge in config.judges.values())):
        with findings.collect():
            check_exists(config.embedder, "embedding model")
    for name, system in config.systems.items():
        if system.file is not None:
            with findings.collect():
                open_outputs(name, system.file, system.columns, resolver.store)
    if config.annotations is not None:
        from cpo_pipe.eval.annotations import read_annotations

        with findings.collect():
            read_annotations(config.annotations, resolver.store.hash_file)


def _named_apis(resolver: Resolver) -> list[ApiModel]:
    """Return the APIs that a section uses."""
    recipe = resolver.recipe
    named = recipe.apis_of_negatives()
    if recipe.evaluate is not None:
        named += [system.model for system in recipe.evaluate.systems.values() if system.model is not None]
        named += [api for judge in recipe.evaluate.judges.values() for api in judge.apis()]
    return [resolver.apis[name] for name in dict.fromkeys(named) if name in resolver.apis]


# ── with examples ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_stages(resolver: Resolver) -> None:
    """Check the stages after `prepare` as far as their inputs exist; make nothing and load no model.

    What needs a training is checked when its stage begins.

    Raises:
        InputError: a model, a file or a setting of a stage is wrong; all of it is in the message.
    """
    findings = Findings()
    with findings.collect():
        _check_negatives(resolver, findings)
    longest = _longest_example(resolver)
    for name, training in resolver.recipe.train.items():
        for model in training.upstream():
            with findings.collect():
                _check_context(f"train.{name}", longest, model, resolver.model(model).context())
        if isinstance(training.init, ScratchModel):
            with findings.collect():
                _check_context(f"train.{name}", longest, "the scratch model", training.init.context())
    if resolver.recipe.evaluate is not None:
        with findings.collect():
            _check_evaluation(resolver, findings)
    findings.report()


def _longest_example(resolver: Resolver) -> int:
    """Return the tokens of the longest prompt and target together that are trained on."""
    table = resolver.examples().read("train", columns=["prompt_ids", "target_ids"])
    lengths = pc.add(*(pc.list_value_length(table[column]) for column in table.column_names))
    return int(pc.max(lengths).as_py() or 0)


def _check_context(key: str, longest: int, model: str, context: int | None) -> None:
    if context is not None and longest > context:
        raise InputError(
            f"{key}: the longest training example has {longest} tokens, but the context of {model} is {context}; lower "
            "data.max_prompt_tokens and data.max_target_tokens (of cut text data.chunk_tokens)"
        )


def _check_negatives(resolver: Resolver, findings: Findings) -> None:
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
            with findings.collect():
                check_scorers(recipe.rank, section.drop_correct, dependencies, targets)
        for source in section.sources:  # one by one: some may wait for a training
            with findings.collect():
                plan = resolver.negatives(owner, source)
                plan_groups(recipe.rank, dependencies, plan)
                plan.check_inputs()


def _check_evaluation(resolver: Resolver, findings: Findings) -> None:
    """Plan the evaluation of the systems that exist, by the judges whose models exist."""
    from cpo_pipe.eval.evaluate import plan_evaluation

    config = resolver.evaluate_section()
    systems, models = dict[str, SystemModel](), dict[str, Model]()
    for name, system in config.all_systems().items():
        for part in system.merge or ():
            with findings.collect():
                resolver.model(part)
        with findings.collect():
            if (model := resolver.available_system(name, system)) is not None:
                systems[name] = model
    needed = [name for judge in config.judges.values() for name in judge.models()]
    for name in [*needed, config.mauve_model] if config.mauve_model else needed:
        with findings.collect():
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
        with findings.collect():
            api.check_server()
