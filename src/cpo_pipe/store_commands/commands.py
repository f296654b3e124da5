"""The commands that look at a store, verify it, free space in it and compare artifacts."""

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.text import Text

from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import checksums
from cpo_pipe.data.store.differences import differences
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.gc import collect
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.paths import shown
from cpo_pipe.data.store.records import CHECKSUM, Registration
from cpo_pipe.data.store.verify import faults, run_faults
from cpo_pipe.data.text import nearest, one_line, say
from cpo_pipe.screen import (
    abridged,
    counted,
    cut,
    megabytes,
    print_block,
    print_table,
    size_text,
    time_text,
)
from cpo_pipe.store_commands.summary import SHORT, Summaries
from cpo_pipe.terminal import DEFAULT_STORE, DebugOption, StoreOption, reported

log = logging.getLogger(__name__)

store_app = typer.Typer()

NameArgument = Annotated[str, typer.Argument(help="KIND/HASH, or as much of the hash as makes it unique.")]

LISTED = 20
"""Files of one artifact that `show` lists."""


@store_app.callback(invoke_without_command=True)
def store(context: typer.Context) -> None:
    """Look at the artifact store, check it, free space."""
    if context.invoked_subcommand is None:
        say(context.get_help())


@store_app.command()
def ls(
    kind: Annotated[str | None, typer.Argument(help="Kind of artifact.", show_default="all")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON with the specs, for scripts.", show_default="off")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """List the artifacts: what each one is, how large, and which runs use it."""
    with reported(debug):
        inventory = Inventory(store)
        artifacts, summaries, runs = inventory.artifacts(kind), Summaries(inventory), _runs(inventory)
        if as_json:
            say(json.dumps([_record(a, summaries, runs[a.name]) for a in artifacts], indent=2))
            return
        columns = ("artifact", ">rows", ">files", ">size", "written", "runs", "what")
        print_table(columns, [_line(artifact, summaries, runs[artifact.name]) for artifact in artifacts])
        total, kinds = sum(artifact.size for artifact in artifacts), len({artifact.kind for artifact in artifacts})
        say(f"{counted(len(artifacts), 'artifact')} of {counted(kinds, 'kind')}, {size_text(total)}")


@store_app.command()
def show(
    name: NameArgument,
    rows: Annotated[int, typer.Option("--rows", min=0, help="First rows of each table to show.")] = 3,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """Show one artifact: its spec, files, notes and first rows."""
    with reported(debug):
        inventory = Inventory(store)
        artifact, summaries = inventory.find(name), Summaries(inventory)
        Console(soft_wrap=True).print(Text(one_line(artifact.name), style="bold"))
        say(summaries.summary(artifact))
        print_block("", dict(_facts(artifact, summaries, _runs(inventory)[artifact.name])))
        print_block("spec", artifact.spec or "gone or unreadable")
        noted = {key: value for key, value in artifact.manifest.items() if key not in ("artifact", "files", CHECKSUM)}
        if noted:
            print_block("noted when it was made", noted)
        listed = {file: size_text(size) for file, size in list(artifact.files.items())[:LISTED]}
        more = len(artifact.files) - len(listed)
        print_block("files", listed | ({"…": f"{more} more"} if more else {}))
        for file, first in _first_rows(artifact, rows) if rows else ():
            print_block(f"first rows of {file}", first)


@store_app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Artifacts, as for show.", show_default="all")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """Read everything again and compare checksums and specs. Changes nothing; exit 1 if any is damaged."""
    with reported(debug):
        inventory = Inventory(store)
        artifacts = [inventory.find(name) for name in names] if names else inventory.artifacts()
        damaged = []
        # While a bar is on the screen, rich redirects what is printed: right on a terminal, but not for a pipe.
        out = None if sys.stdout.isatty() else sys.stdout
        with track("verify (MB)", sum(megabytes(size) for a in artifacts for size in a.files.values())) as meter:
            for artifact in artifacts:
                found = list(faults(artifact, lambda size: meter.advance(megabytes(size))))
                lines = [f"{'DAMAGED' if found else 'valid'} {artifact.name} {size_text(artifact.size)}", *found]
                say("\n        ".join(map(one_line, lines)), file=out)
                damaged += [artifact.name] if found else []
        for name, found in [] if names else _others(inventory):
            say("\n        ".join(map(one_line, [f"{'DAMAGED' if found else 'valid'} {name}", *found])))
            damaged += [name] if found else []
        if damaged:
            raise RunError(
                f"{len(damaged)} damaged: {', '.join(map(one_line, damaged))}; the next run that needs them makes them "
                "again, or names the file that it cannot make again"
            )
        say(f"{counted(len(artifacts), 'artifact')}, all valid")


@store_app.command()
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is listed.", show_default="only list it")
    ] = False,
    forget: Annotated[
        list[str],
        typer.Option(metavar="RUN", help="Release what only this missing run folder used. Repeatable."),
    ] = [],  # noqa: B006  (typer copies it)
    paid: Annotated[
        bool, typer.Option("--paid", help="Include answers of APIs, which cost money.", show_default="keep them")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """List what no run needs, or delete it: artifacts that no run folder uses, and files that killed processes left.

    A run registers every artifact before it makes or reads it. A registered
    artifact is kept. A run folder that is missing may have been moved, and
    folders of other machines cannot be seen: their artifacts are kept until
    you --forget them. Answers of APIs are kept until you add --paid. Artifacts
    that a process is working on are skipped.
    """
    with reported(debug):
        inventory = Inventory(store)
        runs = inventory.runs()
        forgotten = _forgotten(runs, forget)
        kept = [run for run in runs if run.name not in forgotten]
        if delete and not kept:
            raise InputError(
                f"--delete: no run folder is known that uses {shown(inventory.root)}, so all would go; run your "
                "recipes again (what is found is registered too), or delete the store yourself"
            )
        collected = collect(inventory, delete=delete, forgotten=forgotten, paid=paid)
        found = collected.garbage
        lines = [(str(item.path).removeprefix(f"{inventory.root}/"), size_text(size), item.why) for item, size in found]
        print_table(("garbage", ">size", "why"), lines)
        for run in runs:
            if run.name in forgotten:
                say(one_line(f"forgotten: {run.name}"))
                if delete:
                    run.file.unlink(missing_ok=True)
            elif run.missing:
                hint = f"if it was deleted, add --forget {run.name}"
                say(one_line(f"kept: what {run.name} uses, which is missing; {hint}"))
            elif run.remote:
                say(one_line(f"kept: what {run.run_dir} of {run.host} uses, which cannot be seen from here"))
        for name, size in collected.paid:
            say(
                f"kept: {name} ({size_text(size)}), which no run uses: its answers cost money; add --paid to include it"
            )
        for name in collected.busy:
            say(f"skipped: {name}, which a process is at work on")
        if not kept:
            say("no run folder is known that uses the store: run your recipes again before --delete")
        total = size_text(sum(size for _, size in found))
        done = f"{total} freed" if delete else f"{total} would be freed by --delete"
        say(done if found else "nothing to delete")


@store_app.command()
def diff(
    a: NameArgument,
    b: NameArgument,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """Show why two artifacts of one kind differ: the fields of their specs that are not equal."""
    with reported(debug):
        inventory = Inventory(store)
        one, other = inventory.find(a), inventory.find(b)
        if one.kind != other.kind:
            raise InputError(f"{one.name} and {other.name} are of different kinds; name two of one kind")
        for artifact in (one, other):
            if artifact.spec is None:
                raise InputError(f"{artifact.name}: its spec.json is gone or unreadable")
        summaries = Summaries(inventory)
        places = list(differences(one.spec, other.spec))
        for path, before, after in places:
            say(one_line(f"{path}: {cut(summaries.value(before), 100)} -> {cut(summaries.value(after), 100)}"))
        if not places:
            say(f"{one.name} and {other.name}: the specs are equal")


# ── what the commands share ──────────────────────────────────────────────────────────────────────────────────────


def _runs(inventory: Inventory) -> Mapping[str, Sequence[Registration]]:
    """Return the runs that use each artifact."""
    runs: dict[str, list[Registration]] = defaultdict(list)
    registered, damaged = inventory.registrations()
    for run in registered:
        for name in run.artifacts:
            runs[name].append(run)
    for file in damaged:
        log.warning(
            "%s is damaged, so what its run uses is not known; the next run of its recipe writes it again", file
        )
    return runs


def _others(inventory: Inventory) -> Iterator[tuple[str, list[str]]]:
    """Yield the names and faults of resume states, registrations and run folders."""
    for state in inventory.in_progress():
        fault = checksums.fault(state)
        if state.exists():  # else the training continued meanwhile, or ended
            name = "/".join(state.parts[-4:])
            remedy = "the next run of that training moves it aside and starts it again"
            yield name, [f"{fault}; {remedy}"] if fault else []
    runs, damaged = inventory.registrations()
    for file in damaged:
        yield str(file), ["unreadable, so what its run uses is not known; the next run of its recipe writes it again"]
    for run in runs:
        if not run.remote and not run.missing:
            yield str(run.run_dir), list(run_faults(run))


def _forgotten(runs: Sequence[Registration], named: Sequence[str]) -> set[str]:
    """Return the names of the runs that the user wants forgotten.

    Raises:
        InputError: no such run, or its folder exists.
    """
    names = {run.name: run for run in runs}
    for name in named:
        if name not in names:
            hint = nearest(name, names) or f"there are {', '.join(names) or 'none'}"
            raise InputError(f"--forget {name}: no such run folder uses the store; {hint}")
        if not names[name].missing and not names[name].remote:
            raise InputError(f"--forget {name}: the folder still exists; delete it first, or keep its artifacts")
    return set(named)


def _record(artifact: ArtifactFolder, summaries: Summaries, runs: Sequence[Registration]) -> dict[str, Any]:
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "hash": artifact.path.name,
        "what": _what(artifact, summaries, runs),
        "rows": artifact.rows,
        "files": len(artifact.files),
        "bytes": artifact.size,
        "written": artifact.written,
        "runs": [{"run_dir": str(run.run_dir), "host": run.host, "missing": run.missing} for run in runs],
        "spec": artifact.spec,
    }


def _line(artifact: ArtifactFolder, summaries: Summaries, runs: Sequence[Registration]) -> list[str]:
    name, between = artifact.name, ","
    if sys.stdout.isatty():  # a terminal has little room, and a few digits of a hash suffice
        name, between = f"{artifact.kind}/{artifact.path.name[:SHORT]}", "\n"
    rows = "-" if artifact.rows is None else f"{artifact.rows:,}"
    size, written = size_text(artifact.size), time_text(artifact.written)
    used_by = between.join(run.label + run.state for run in runs) or "-"
    return [name, rows, str(len(artifact.files)), size, written, used_by, _what(artifact, summaries, runs)]


def _what(artifact: ArtifactFolder, summaries: Summaries, runs: Iterable[Registration]) -> str:
    """Return what an artifact is; of a checkpoint also how the runs call its training."""
    names = dict.fromkeys(name for run in runs for name in run.trainings.get(artifact.name, ()))
    summary = summaries.summary(artifact)
    return f"training {', '.join(names)}; {summary}" if names else summary


def _facts(artifact: ArtifactFolder, summaries: Summaries, runs: Iterable[Registration]) -> Iterator[tuple[str, Any]]:
    if artifact.rows is not None:
        yield "rows", artifact.rows
    yield "size", size_text(artifact.size)
    yield "written", time_text(artifact.written)
    yield "folder", shown(artifact.path)
    yield "runs", [f"{run.run_dir}{run.state}" for run in runs] or "none"


def _first_rows(artifact: ArtifactFolder, count: int) -> Iterator[tuple[str, Any]]:
    """Yield the first rows of an artifact's tables, or of the first shard."""
    tables = [name for name in artifact.files if name.endswith(".parquet")]
    for name in tables[:1] if artifact.table else tables:
        try:
            with (artifact.path / name).open("rb") as file, pq.ParquetFile(file) as parquet:
                batch = next(parquet.iter_batches(batch_size=count), None)
        except (OSError, ValueError) as error:  # ValueError: Arrow's
            yield name, f"unreadable ({cause(error)}); `cpo-pipe store verify {artifact.name}` says more"
            continue
        if batch is not None:
            yield name, [abridged(row) for row in batch.to_pylist()]
