"""What leaves the store: a system's model as a folder, and groups as preference data for other trainers."""

from collections.abc import Sequence
from pathlib import Path

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.copy_model import copy_model
from cpo_pipe.data.output_folder import check_new
from cpo_pipe.data.text import one_line, say
from cpo_pipe.pipeline.export.export import export
from cpo_pipe.pipeline.export.hub import check_repo, upload
from cpo_pipe.pipeline.export.pairs import parse_pairs
from cpo_pipe.recipe.render import recipe_text
from cpo_pipe.run import Run


def export_model(run: Run, name: str, out: Path) -> None:
    """Write the model of a system or a training to a folder of its own, with the tokenizer of the examples.

    Raises:
        InputError: the name is not in the recipe, the system has no weights, or the folder is not empty.
    """
    check_new(out)
    run.store.register_run(run.run_dir)
    copy_model(run.resolver.merged(name), run.resolver.examples().tokenizer, out)
    say(one_line(f"{name}: written to {out}"))


def export_groups(
    run: Run,
    out: Path,
    pairs: Sequence[str] = (),
    conversational: bool | None = None,
    push: str = "",
    public: bool = False,
    training: str = "",
) -> None:
    """Write the groups (of a training with negatives of its own) to a folder as preference data, and to the hub.

    Raises:
        InputError: the folder is not empty, or a pair, the training or the hub's name is unknown.
        MissingInput: groups are missing.
    """
    resolver = run.resolver
    owner = resolver.exported_owner(training)
    negatives = resolver.negatives_section(owner)
    parsed = parse_pairs(pairs, negatives.labels())
    check_new(out)
    if push:
        check_repo(push)
    elif public:
        raise InputError("--public: not used without --push; remove it")
    plan, groups = resolver.groups(owner)
    examples, text, tokenizer = resolver.examples(), recipe_text(run.recipe), run.recipe.data.tokenizer
    export(
        out, run.recipe.name, text, tokenizer if isinstance(tokenizer, str) else None, negatives, examples,
        plan.selection, groups, parsed, conversational,
    )  # fmt: skip
    if push:
        upload(out, push, public)
