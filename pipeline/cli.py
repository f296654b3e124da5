"""The command line: parses, calls, and turns failures into one line and an exit status."""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from cpo_pipe.data import processes
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.progress import console
from cpo_pipe.data.recipe import builtin_recipes, load_recipe, nearest
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
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe: a YAML file or the name of a built-in one.")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a key of the recipe. Repeatable.",
        show_default="the recipe as it is",
    ),
]
StoreOption = Annotated[Path, typer.Option("--store", envvar="CPO_PIPE_STORE", help="Folder of the artifact store.")]
RunDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder for the resolved recipe and the report.", show_default="runs/NAME"),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default="off")]
DEFAULT_STORE = Path("cpo-store")

# Typer's usage errors (an unknown option, a missing argument): click's class in some versions, a copy in others.
_UsageError: Any = typer.BadParameter.__base__

# A path that cannot be used as asked: the user's to mend.
_PATH_TROUBLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
                 errno.ELOOP}  # fmt: skip
_DISK_FULL = ("No space left on device", "Disk quota exceeded")


@app.command()
def init(name: Annotated[str, typer.Argument(help="Name of a built-in recipe.")]) -> None:
    """Print a built-in recipe, every key commented: `cpo-pipe init NAME > my.yaml`."""
    with _reported(debug=False):
        if name not in builtin_recipes():
            hint = nearest(name, builtin_recipes()) or f"there are {', '.join(builtin_recipes())}"
            raise InputError(f"recipe {name}: not built in; {hint}")
        print(recipe_text(load_recipe(name), named=False), end="")


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
        typer.Argument(help="Trainings of the recipe.", show_default="all whose inputs are there"),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    run_dir: RunDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Train the named models, or all whose inputs exist, in order of dependency."""
    with _reported(debug):
        blocked = _open(recipe, overrides, store, run_dir, several=True).train(names or [])
        for name, reason in blocked.items() if processes.is_main() else ():
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


def _open(recipe: str, overrides: list[str], store: Path, run_dir: Path | None, several: bool = False) -> Run:
    """The run that the options mean; `several` where a command may be started in several processes."""
    if processes.count() > 1 and not several:
        raise InputError(f"started in {processes.count()} processes: only train does its work in several; run it alone")
    loaded = load_recipe(recipe, overrides)
    # What the commands that messages name need besides the recipe, to mean the same run.
    options = [part for override in overrides for part in ("--set", override)]
    if str(store) != os.environ.get("CPO_PIPE_STORE", str(DEFAULT_STORE)):
        options += ["--store", str(store)]
    if run_dir is not None:
        options += ["--run-dir", str(run_dir)]
    return Run(loaded, recipe, Store(store), run_dir or Path("runs") / loaded.name, options)


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Log to the terminal; show a failure as one line: exit 2 for the user's mistake, 1 for the run's."""
    terminal = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None,
                           log_time_format="%H:%M:%S")  # fmt: skip
    handler = terminal if console.is_terminal else logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("cpo_pipe").setLevel(logging.INFO if processes.is_main() else logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except KeyboardInterrupt as error:
        if processes.is_main():
            print(f"stopped{error}; what was made is kept: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from error
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, text = _failure(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise typer.Exit(status) from error


def _failure(error: Exception) -> tuple[int, str]:
    """Exit status and message of an error."""
    if isinstance(error, InputError | RunError):
        return 2 if isinstance(error, InputError) else 1, str(error)
    # Libraries written in Rust and C++ have their own types for a full disk.
    if any(sign in str(error) for sign in _DISK_FULL):
        return 1, "the disk is full; what was made before is kept: free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in _PATH_TROUBLE:
        reason = (error.strerror or "").lower()
        return 2, f"{error.filename}: {reason}; give a path that can be used (--store, --run-dir, or in the recipe)"
    text = str(error).strip() or "no message"
    return 1, f"{type(error).__name__}: {text[:500]} (--debug shows the traceback)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `cpo-pipe`; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(arguments or ["--help"], prog_name="cpo-pipe", standalone_mode=False)
    except _UsageError as error:
        print(f"error: {' '.join(error.format_message().split())} (--help shows how)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before a command has begun
        return 130
    return status if isinstance(status, int) else 0
