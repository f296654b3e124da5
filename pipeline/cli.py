"""The command line: parses, calls, and turns failures into one line and an exit status."""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.progress import console
from cpo_pipe.data.recipe import builtin_recipes, load_recipe
from cpo_pipe.data.recipe_text import recipe_text
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.run import Run

# Read by these libraries when they are imported: our own messages say what matters.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    help="Contrastive Preference Optimization (Feng et al. 2025), from ground-truth pairs to a report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe: a YAML file or the name of a built-in one.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe. Repeatable.")
]
StoreOption = Annotated[Path, typer.Option("--store", envvar="CPO_PIPE_STORE", help="Folder of the artifact store.")]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder for the resolved recipe and the report (default: runs/NAME).")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DEFAULT_STORE = Path("cpo-store")


@app.command()
def init(name: Annotated[str, typer.Argument(help="Name of a built-in recipe.")]) -> None:
    """Print a built-in recipe, every key commented: `cpo-pipe init NAME > my.yaml`."""
    with _reported(debug=False):
        if name not in builtin_recipes():
            raise InputError(f"recipe {name}: not built in; there are {', '.join(builtin_recipes())}")
        print(recipe_text(load_recipe(name)), end="")


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006  (typer copies it)
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Read the ground-truth pairs, refuse bad rows, split and tokenize."""
    with _reported(debug):
        _open(recipe, overrides, store, run_dir).prepare()


@app.command()
def generate_negatives(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Make the synthetic negatives that are missing."""
    with _reported(debug):
        _open(recipe, overrides, store, run_dir).generate_negatives()


@app.command()
def rank(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Drop duplicates and order each group by similarity to its target."""
    with _reported(debug):
        _open(recipe, overrides, store, run_dir).rank()


@app.command()
def train(
    recipe: RecipeArgument,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Trainings of the recipe (default: all whose inputs are there)."),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Train the named models, or all whose inputs exist, in order of dependency."""
    with _reported(debug):
        blocked = _open(recipe, overrides, store, run_dir).train(names or [])
        for name, reason in blocked.items():
            print(f"{name} is waiting: {reason}")


@app.command()
def evaluate(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Compare the systems on held-out prompts and write report.html."""
    with _reported(debug):
        _open(recipe, overrides, store, run_dir).evaluate()


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Do all that is missing, in order."""
    with _reported(debug):
        _open(recipe, overrides, store, run_dir).everything()


@app.command()
def demo(
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """The whole method on the documentation of the running Python: nothing is downloaded, minutes on two cores."""
    with _reported(debug):
        _open("demo", overrides, store, run_dir).everything()


def _open(recipe: str, overrides: list[str], store: Path, run_dir: Path | None) -> Run:
    loaded = load_recipe(recipe, overrides)
    return Run(loaded, recipe, Store(store), run_dir or Path("runs") / loaded.name)


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Log to the terminal; show a failure as one line: exit 2 for the user's mistake, 1 for the run's."""
    terminal = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None,
                           log_time_format="%H:%M:%S")  # fmt: skip
    handler = terminal if console.is_terminal else logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("cpo_pipe").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except KeyboardInterrupt as error:
        print("stopped; what was made is kept: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from error
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, InputError | RunError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; what was made before is kept: free some space and run the same command again"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:500]} (--debug shows the traceback)"


def main() -> None:
    """Entry point of `cpo-pipe`."""
    app()
