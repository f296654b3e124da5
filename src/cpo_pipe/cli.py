"""The command line: parse arguments, call a stage, turn failures into one line and an exit status."""

import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cpo_pipe import __version__
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution import processes
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.execution.options import open_executor
from cpo_pipe.data.store import Store
from cpo_pipe.data.store.paths import shown
from cpo_pipe.data.text import nearest, one_line, say
from cpo_pipe.demo import demo_recipe
from cpo_pipe.exports import export_groups, export_model
from cpo_pipe.pipeline.convert.convert import convert as convert_model
from cpo_pipe.plan import plan as make_plan
from cpo_pipe.plan import print_plan
from cpo_pipe.recipe.load import builtin_recipes, load_recipe
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.render import recipe_text
from cpo_pipe.run import Run
from cpo_pipe.run_commands import runs_app
from cpo_pipe.runs import run_folder
from cpo_pipe.store_commands import store_app
from cpo_pipe.sweep import OFF, open_sweep, run_sweep
from cpo_pipe.terminal import DEFAULT_STORE, DebugOption, LogFormatOption, QuietOption, StoreOption, folder, reported

# These libraries read them at import. Our own messages take the place of theirs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

app = typer.Typer(
    help="Contrastive Preference Optimization (Feng et al. 2025), from ground-truth pairs to a report.",
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe: a YAML file or the name of a built-in one.")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a key of the recipe. Repeatable.",
        show_default="the recipe unchanged",
    ),
]
ScaleOption = Annotated[
    str | None, typer.Option("--scale", metavar="NAME", help="Use this scale of the recipe.", show_default="full")
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        parser=folder,
        metavar="PATH",
        help="Folder for the resolved recipe and the report.",
        show_default="runs/NAME/TIME-HASH",
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option(
        metavar="local|ray",
        help="Where rows are computed: in this process, or in Ray workers (cluster of RAY_ADDRESS, or this machine).",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Number of Ray workers.", show_default="one per GPU, or per core without GPUs")
]
WorkerGpusOption = Annotated[
    float | None, typer.Option(min=0, help="GPUs per Ray worker, such as 0.5.", show_default="1 where there are GPUs")
]

FINE = "nothing is wrong, as far as it can be seen now"
SCHEMA_FILE = "cpo-pipe.schema.json"

OutOption = Annotated[Path, typer.Option(parser=folder, metavar="PATH", help="A new or empty folder to write to.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"cpo-pipe {__version__}")
        raise typer.Exit


# Typer's usage errors (an unknown option, a missing argument): click's class in some versions, a copy in others.
_UsageError: Any = typer.BadParameter.__base__


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options of the program itself."""


@app.command()
def init(
    name: Annotated[str | None, typer.Argument(help="Name of a built-in recipe.", show_default="list them")] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Print all keys of its parts with their meaning, not only those that are set.",
        ),
    ] = False,
) -> None:
    """Print a built-in recipe to start from: `cpo-pipe init NAME > my.yaml`; without a name list them."""
    with reported(debug=False):
        if name is None:
            for each, path in builtin_recipes().items():
                say(f"{each:<20}{path.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}")
            return
        if name not in builtin_recipes():
            hint = nearest(name, builtin_recipes()) or f"there are {', '.join(builtin_recipes())}"
            raise InputError(f"recipe {name}: not built in; {hint}")
        say(f"# yaml-language-server: $schema={SCHEMA_FILE}")
        say(f"# Editors complete and check the keys after `cpo-pipe schema > {SCHEMA_FILE}`.")
        say(f"# {name}.yaml: run it with `cpo-pipe run FILE`; `cpo-pipe init {name} --full` prints all its keys.")
        say(recipe_text(load_recipe(name), named=False, full=full).removesuffix("\n"))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, from which editors complete and check keys."""
    say(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE) -> None:
    """Show packages, devices, engines, memory and disk, what is wrong with them, and the command that fixes it."""
    from cpo_pipe.doctor import doctor

    wrong = doctor(store)
    for line in wrong:
        say(f"wrong: {line}")
    if wrong:
        raise typer.Exit(1)
    say("nothing is wrong")


@app.command()
def convert(
    model: Annotated[
        str, typer.Argument(help="A GGUF file, or a folder or hub name whose weights are pickles (pytorch_model.bin).")
    ],
    out: OutOption,
    debug: DebugOption = False,
) -> None:
    """Write a model of pickles or in GGUF as safetensors, which the other commands read, with an exact tokenizer."""
    with reported(debug):
        convert_model(model, out)


def _stage(function: Callable[..., None], choose: Callable[..., tuple[str, list[str]]] | None = None) -> None:
    """Register a stage as a command, with the argument and the options from which its `Run` is made.

    Typer reads a command's signature: here the recipe, the function's parameters after the run, and the options that
    all stages have. With `choose`, its parameters take the place of the first two; it returns recipe and overrides.
    """

    def command(
        recipe: RecipeArgument = "",
        scale: ScaleOption = None,
        overrides: SetOption = [],  # noqa: B006  (typer copies it)
        store: StoreOption = DEFAULT_STORE,
        run_dir: RunDirOption = None,
        executor: ExecutorOption = "local",
        workers: WorkersOption = None,
        worker_gpus: WorkerGpusOption = None,
        quiet: QuietOption = False,
        log_format: LogFormatOption = "text",
        debug: DebugOption = False,
        **arguments: Any,
    ) -> None:
        with reported(debug, quiet, log_format):
            if function is not train and processes.count() > 1:
                count = processes.count()
                raise InputError(f"started in {count} processes: only train does its work in several; run it alone")
            how = open_executor(executor, workers, worker_gpus)
            if choose is not None:
                (recipe, chosen), arguments = choose(**arguments), {}
                overrides = [*chosen, *overrides]
            opened = _open(recipe, scale, overrides, store, run_dir, how)
            if opened.recipe.sweep and function in (run_, check):
                if run_dir is not None:
                    raise InputError("--run-dir: not used with the section sweep, whose runs have folders of their own")

                def open_run(more: list[str]) -> Run:
                    return _open(recipe, scale, [*overrides, *more], store, None, how)

                if function is check:
                    open_sweep(opened.recipe, open_run, force=False)
                    say(FINE)
                else:
                    run_sweep(opened.recipe, open_run, ["cpo-pipe", "run", recipe, *opened.options], **arguments)
                return
            if opened.recipe.sweep:
                raise InputError(f"sweep: only `run` and `check` use it; add --set '{OFF}'")
            function(opened, **arguments)

    first, *common = inspect.signature(command).parameters.values()
    own = list(inspect.signature(choose or function).parameters.values())
    own = own if choose else [first.replace(default=inspect.Parameter.empty), *own[1:]]
    shown = [*own, *common[:-1]]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    )
    app.command(function.__name__.strip("_").replace("_", "-"), help=function.__doc__)(command)


def check(run: Run) -> None:
    """Find all that is wrong with a recipe, and make nothing; `run` does this first."""
    run.check()
    say(FINE)


def plan(
    run: Run,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure time and memory on a few steps and examples.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.", show_default="off")] = False,
) -> None:
    """Show per stage what exists, what would be made and why, and what it takes; only examples are made."""
    print_plan(make_plan(run, probe), as_json)


def prepare(run: Run) -> None:
    """Read the ground-truth pairs, refuse bad rows, split and tokenize."""
    run.prepare()


def generate_negatives(run: Run) -> None:
    """Make the missing synthetic negatives."""
    run.generate_negatives()


def rank(run: Run) -> None:
    """Drop duplicates and order each group's negatives by the scorer `rank.by`, by default similarity to the target."""
    run.rank()


def quality(run: Run) -> None:
    """Show copies, lengths, likelihoods and diversity of the negatives, before a training is paid for."""
    run.quality()


def train(
    run: Run,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Trainings of the recipe.", show_default="all whose inputs exist"),
    ] = None,
) -> None:
    """Train the named models, or all whose inputs exist, in order of dependency."""
    blocked = run.train(names or [])
    for name, reason in blocked.items() if processes.is_main() else ():
        say(one_line(f"{name} is waiting: {reason}"))


def evaluate(
    run: Run,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print the calls, tokens and price of systems and judges behind APIs."),
    ] = False,
) -> None:
    """Compare the systems on held-out prompts and write report.html."""
    if dry_run:
        run.evaluation_costs()
    else:
        run.evaluate()


def merge(
    run: Run,
    name: Annotated[
        str, typer.Argument(help="A training, or a system of `evaluate`; the ensemble `mix` at α = 0.5 is mix@0.5.")
    ],
    out: OutOption,
) -> None:
    """Write a trained model or a weight-space ensemble to a folder that transformers and vLLM load."""
    export_model(run, name, out)


def export(
    run: Run,
    out: OutOption,
    pair: Annotated[
        list[str],
        typer.Option(
            metavar="CHOSEN,REJECTED",
            help="A pair of sources to export, such as target,weak. Repeatable.",
            show_default="the target with each negative",
        ),
    ] = [],  # noqa: B006  (typer copies it)
    conversational: Annotated[
        bool | None,
        typer.Option(
            "--conversational/--no-conversational",
            help="Write texts as messages, and prompts as they are before the template.",
            show_default="with data.template chat",
        ),
    ] = None,
    push: Annotated[
        str, typer.Option(metavar="REPO", help="Also upload to this data set on the hub.", show_default="no")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="Make that data set public, or add to a public one.")
    ] = False,
    training: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Export the groups of this training, which has negatives of its own.",
            show_default="shared",
        ),
    ] = "",
) -> None:
    """Write the groups as preference data (prompt, chosen, rejected) that TRL trains on."""
    export_groups(run, out, pair, conversational, push, public, training)


def run_(
    run: Run,
    force: Annotated[
        bool, typer.Option("--force", help="Also try trainings that do not fit into memory or on the disk.")
    ] = False,
) -> None:
    """Run all stages in order; each makes only what is missing."""
    run.everything(force)


def demo(run: Run) -> None:
    """Run the whole method on the documentation of your Python: five minutes on two cores, without a download."""
    run.everything()


for _function in (check, plan, prepare, generate_negatives, rank, quality, train, evaluate, merge, export, run_):
    _stage(_function)
_stage(demo, choose=demo_recipe)
app.add_typer(store_app, name="store")
app.add_typer(runs_app)


def _open(
    recipe: str, scale: str | None, overrides: list[str], store: str, run_dir: Path | None, executor: Executor
) -> Run:
    """Return the run that the options describe."""
    loaded = load_recipe(recipe, overrides, scale)
    # Messages name commands; these options make such a command mean the same run.
    options = ["--scale", scale] if scale is not None else []
    options += [part for override in overrides for part in ("--set", override)]
    if store != os.environ.get("CPO_PIPE_STORE", DEFAULT_STORE):
        options += ["--store", shown(store) if "://" in store else store]  # without credentials
    if run_dir is not None:
        options += ["--run-dir", str(run_dir)]
    run_dir = run_dir or run_folder(loaded.name, recipe_text(loaded))
    return Run(loaded, recipe, Store(store), run_dir, executor, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `cpo-pipe` and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # in an ASCII locale, escape other characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(arguments or ["--help"], prog_name="cpo-pipe", standalone_mode=False)
    except _UsageError as error:
        say(f"error: {one_line(error.format_message())} (--help shows how)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before a command begins
        return 130
    return status if isinstance(status, int) else 0
