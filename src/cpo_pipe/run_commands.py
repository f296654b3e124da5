"""The commands that look at runs: `runs`, `status` and `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from cpo_pipe.compare import compare as compare_runs
from cpo_pipe.compare import print_comparison, write_page
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.text import one_line, say
from cpo_pipe.runs import find_run, list_runs
from cpo_pipe.status import print_status
from cpo_pipe.terminal import DebugOption, folder, reported

runs_app = typer.Typer()


@runs_app.command()
def runs(
    name: Annotated[str | None, typer.Argument(help="Name of a recipe.", show_default="all")] = None,
    debug: DebugOption = False,
) -> None:
    """List the runs: when, how long, which keys differ from the recipe's run before, and the verdict."""
    with reported(debug):
        list_runs(name)


@runs_app.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe's name, or a run's folder.", show_default="all")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Show what runs are doing: stage, step, rate, time left, last warning, pid; also after a crash."""
    with reported(debug):
        print_status(name.removesuffix(".yaml") if name else None)


@runs_app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Two or more: a run's folder, NAME (its latest), or NAME/VERSION."),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", parser=folder, metavar="FILE", help="Also write a page.", show_default="no")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Show where runs differ: keys, artifacts, and metrics with their significance, paired by prompt."""
    with reported(debug):
        if len(runs) < 2:
            raise InputError(f"compare {runs[0]}: names one run; name another, which `cpo-pipe runs` lists")
        if html is not None and html.is_dir():
            raise InputError(f"--html {html}: is a folder; name a file")
        found = compare_runs([find_run(run) for run in runs])
        print_comparison(found)
        if html is not None:
            write_page(html, found)
            say(one_line(f"page: {html}"))
