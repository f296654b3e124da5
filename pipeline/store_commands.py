"""`cpo-pipe store`: what is in a store, whether it is sound, what no run needs, why two artifacts are not one."""

import json
import logging
import re
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
import yaml
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cpo_pipe.data import checksums
from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.data.fingerprint import Spec, address
from cpo_pipe.data.inventory import ABSENT, Artifact, Garbage, Inventory, differences, faults, run_faults
from cpo_pipe.data.progress import track
from cpo_pipe.data.recipe import nearest
from cpo_pipe.data.records import CHECKSUM, Registration
from cpo_pipe.data.roots import shown
from cpo_pipe.data.text import one_line, say
from cpo_pipe.pipeline.terminal import DEFAULT_STORE, DebugOption, StoreOption, reported

log = logging.getLogger(__name__)

store_app = typer.Typer()

NameArgument = Annotated[str, typer.Argument(help="KIND/ADDRESS, or as much of the address as makes it the only one.")]

SHORT = 8
"""Digits of a hash that people are shown."""
LONGEST = 60
"""Characters that are shown of a text in a spec, such as an instruction's template."""
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
    as_json: Annotated[bool, typer.Option("--json", help="For scripts, with the specs.", show_default="off")] = False,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """List the artifacts: what each one is, how large, and which runs use it."""
    with reported(debug):
        inventory = Inventory(store)
        artifacts, words, runs = inventory.artifacts(kind), Words(inventory), _runs(inventory)
        if as_json:
            say(json.dumps([_record(a, words, runs[a.name]) for a in artifacts], indent=2))
            return
        columns = ("artifact", ">rows", ">files", ">size", "written", "runs", "what")
        _print_table(columns, [_line(artifact, words, runs[artifact.name]) for artifact in artifacts])
        total, kinds = sum(artifact.size for artifact in artifacts), len({artifact.kind for artifact in artifacts})
        say(f"{_count(len(artifacts), 'artifact')} of {_count(kinds, 'kind')}, {_bytes(total)}")


@store_app.command()
def show(
    name: NameArgument,
    rows: Annotated[int, typer.Option("--rows", min=0, help="First rows of each table to show.")] = 3,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """Show one artifact: its spec, its files, what was noted when it was made, its first rows."""
    with reported(debug):
        inventory = Inventory(store)
        artifact, words = inventory.find(name), Words(inventory)
        Console(soft_wrap=True).print(Text(one_line(artifact.name), style="bold"))
        say(words.summary(artifact))
        _print_block("", dict(_facts(artifact, words, _runs(inventory)[artifact.name])))
        _print_block("spec", artifact.spec or "gone or unreadable")
        noted = {key: value for key, value in artifact.manifest.items() if key not in ("artifact", "files", CHECKSUM)}
        if noted:
            _print_block("noted when it was made", noted)
        listed = {file: _bytes(size) for file, size in list(artifact.files.items())[:LISTED]}
        more = len(artifact.files) - len(listed)
        _print_block("files", listed | ({"…": f"{more} more"} if more else {}))
        for file, first in _first_rows(artifact, rows) if rows else ():
            _print_block(f"first rows of {file}", first)


@store_app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Artifacts, as for show.", show_default="all")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """Read everything again: checksums, row counts, keys, schemas, specs. Changes nothing; exit 1 if any is damaged."""
    with reported(debug):
        inventory = Inventory(store)
        artifacts = [inventory.find(name) for name in names] if names else inventory.artifacts()
        damaged = []
        # While a bar is on the screen, rich leads all that is printed there: good on a terminal, but not into a pipe.
        out = None if sys.stdout.isatty() else sys.stdout
        with track("verify (MB)", sum(_megabytes(size) for a in artifacts for size in a.files.values())) as meter:
            for artifact in artifacts:
                found = list(faults(artifact, lambda size: meter.advance(_megabytes(size))))
                lines = [f"{'DAMAGED' if found else 'sound'} {artifact.name} {_bytes(artifact.size)}", *found]
                say("\n        ".join(map(one_line, lines)), file=out)
                damaged += [artifact.name] if found else []
        for name, found in [] if names else _others(inventory):
            say("\n        ".join(map(one_line, [f"{'DAMAGED' if found else 'sound'} {name}", *found])))
            damaged += [name] if found else []
        if damaged:
            raise RunError(
                f"{len(damaged)} damaged: {', '.join(map(one_line, damaged))}; the next run that needs them makes them "
                "again, or names the file that it cannot make again"
            )
        say(f"{_count(len(artifacts), 'artifact')}, all sound")


@store_app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Delete it.", show_default="only list it")] = False,
    forget: Annotated[
        list[str],
        typer.Option(metavar="RUN", help="A run folder that is missing, to release what only it used. Repeatable."),
    ] = [],  # noqa: B006  (typer copies it)
    paid: Annotated[
        bool, typer.Option("--paid", help="Also answers of APIs, which cost money.", show_default="keep them")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """List what no run needs, or delete it: artifacts that no run folder uses, and what killed processes left.

    A run registers what it uses before it makes or reads it, also where nothing
    is missing: an artifact, however new, stays as long as that is registered.
    A run folder that is missing may have been moved, and folders of other
    machines cannot be seen: what they use stays until you --forget them.
    Answers of APIs stay until you add --paid. What a process is at work on is
    skipped.
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
        found, busy, costly = _collect(inventory, delete, forgotten, paid)
        lines = [(str(item.path).removeprefix(f"{inventory.root}/"), _bytes(size), item.why) for item, size in found]
        _print_table(("garbage", ">size", "why"), lines)
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
        for name, size in costly:
            say(f"kept: {name} ({_bytes(size)}), which no run uses: its answers cost money; add --paid to include it")
        for name in busy:
            say(f"skipped: {name}, which a process is at work on")
        if not kept:
            say("no run folder is known that uses the store: run your recipes again before --delete")
        total = _bytes(sum(size for _, size in found))
        done = f"{total} freed" if delete else f"{total} would be freed by --delete"
        say(done if found else "nothing to delete")


@store_app.command()
def diff(
    a: NameArgument,
    b: NameArgument,
    store: StoreOption = DEFAULT_STORE,
    debug: DebugOption = False,
) -> None:
    """Say why two artifacts of one kind are not the same: where their specs differ."""
    with reported(debug):
        inventory = Inventory(store)
        one, other = inventory.find(a), inventory.find(b)
        if one.kind != other.kind:
            raise InputError(f"{one.name} and {other.name} are of two kinds, whose specs have nothing in common")
        for artifact in (one, other):
            if artifact.spec is None:
                raise InputError(f"{artifact.name}: its spec.json is gone or unreadable")
        words = Words(inventory)
        places = list(differences(one.spec, other.spec))
        for path, before, after in places:
            say(one_line(f"{path}: {_cut(words.value(before), 100)} -> {_cut(words.value(after), 100)}"))
        if not places:
            say(f"{one.name} and {other.name}: the specs are equal")


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Words:
    """Says what specs mean. A model that is a checkpoint of the store goes by the checkpoint's address."""

    def __init__(self, inventory: Inventory):
        checkpoints = (inventory.root / "checkpoints").is_dir()
        self._models = {
            artifact.manifest.get("fingerprint"): artifact.path.name
            for artifact in (inventory.artifacts("checkpoints") if checkpoints else ())
        }

    def summary(self, artifact: Artifact) -> str:
        """What an artifact is, in a line."""
        if artifact.spec is None:
            return "its spec.json is gone or unreadable"
        try:
            return one_line(", ".join(_SUMMARIES.get(artifact.kind, Words._other)(self, artifact.spec)))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):  # made by another version
            return one_line(", ".join(self._other(artifact.spec)))

    def value(self, value: Any) -> str:
        """A value of a spec, hashes cut."""
        if value is ABSENT:
            return "absent"
        if isinstance(value, str):
            if value in self._models:
                return f"checkpoint {self._models[value][:SHORT]}"
            return value[:SHORT] if re.fullmatch(r"[0-9a-f]{16,64}", value) else value
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {self.value(part)}" for key, part in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.value, value)) + "]"
        return json.dumps(value)

    def _model(self, value: Any) -> str:
        text = self.value(value)
        return text if text.startswith(("checkpoint ", "{")) else f"model {text}"

    def _other(self, spec: Spec) -> Iterator[str]:
        """The plain fields of any spec."""
        for key, value in spec.items():
            if not isinstance(value, dict | list) and value is not None:
                yield f"{key.replace('_', ' ')} {shorten(self.value(value), LONGEST, placeholder='…')}"

    def _examples(self, spec: Spec) -> Iterator[str]:
        source, split, rendering = spec["source"], spec["split"], spec["rendering"]
        content = source.get("sha256") or source.get("commit") or source.get("docs") or address(source)
        yield f"{source['kind'].removeprefix('.')} {content[:SHORT]}"
        yield f"template {rendering['template']}, tokenizer {self.value(rendering['tokenizer'])}"
        yield "split " + "/".join(str(split[name] or "rest") for name in ("train", "validation", "test"))

    def _tokenizers(self, spec: Spec) -> Iterator[str]:
        yield f"{spec['algorithm']} of {spec['vocab_size']:,} entries"
        yield f"trained on {spec['corpus']['source']['kind'].removeprefix('.')}"

    def _negatives(self, spec: Spec) -> Iterator[str]:
        generator = spec.get("generator")
        yield spec["strategy"] + (f" from {self._model(generator)}" if generator else "")
        if "sampling" in spec:
            yield from self._sampling(spec["sampling"])
        rest = {key: value for key, value in spec.items() if key not in ("strategy", "generator")}
        yield from self._other(rest)

    def _sampling(self, sampling: Spec) -> Iterator[str]:
        if sampling["temperature"] == 0:
            yield f"{sampling['beams']} beams" if "beams" in sampling else "greedy"
        else:
            yield f"temperature {sampling['temperature']:g}, top-k {sampling['top_k'] or 'off'}"
            if "top_p" in sampling:
                yield f"top-p {sampling['top_p']:g}"
        yield f"at most {sampling['max_new_tokens']} tokens"

    def _groups(self, spec: Spec) -> Iterator[str]:
        parts = [(part["count"], part.get("label") or part["negatives"]["strategy"]) for part in spec["candidates"]]
        yield " + ".join(f"{count} {label}" for count, label in parts)
        yield f"ranked by {self.value(spec['embedder'])}" if spec["embedder"] else "unranked"
        if not spec["drop_duplicates"]:
            yield "duplicates kept"

    def _rejected(self, spec: Spec) -> Iterator[str]:
        kind = "groups" if "candidates" in spec["of"] else "negatives" if "strategy" in spec["of"] else "generations"
        yield f"refused for {kind}/{address(spec['of'])[:SHORT]}"

    def _logprobs(self, spec: Spec) -> Iterator[str]:
        yield f"under {self._model(spec['model'])}"
        yield spec["dtype"]

    def _checkpoints(self, spec: Spec) -> Iterator[str]:
        if "merge" in spec:
            yield " + ".join(f"{weight:g} × {self._model(model)}" for model, weight in spec["merge"])
            return
        if "adapter" in spec:
            yield f"{self._model(spec['base'])} with the LoRA adapter {self.value(spec['adapter'])}"
            return
        settings, init = spec["settings"], spec["init"]
        weight = settings.get("mle_weight")
        yield settings["objective"] + (f" + {weight:g} mle" if weight else "")
        if "beta" in settings:
            yield f"β {settings['beta']:g}"
        yield f"lr {settings['lr']:g}, {_count(settings['steps'], 'step')}, batch {settings['batch_size']}"
        yield f"from {self._model(init['model']) if 'model' in init else 'scratch'}"
        if settings["lora"]:
            yield "LoRA"
        yield f"seed {settings['seed']}"

    def _generations(self, spec: Spec) -> Iterator[str]:
        yield f"by {self._model(spec['model'])}"
        yield from self._sampling(spec["sampling"])
        if "seed" in spec:
            yield f"seed {spec['seed']}"

    def _verdicts(self, spec: Spec) -> Iterator[str]:
        yield f"judge {spec['judge']}"
        yield from self._other({key: value for key, value in spec.items() if key != "judge"})

    def _metrics(self, spec: Spec) -> Iterator[str]:
        others = [name for name in spec["systems"] if name != spec["baseline"]]
        yield f"{' and '.join(others)} against {spec['baseline']}" if others else f"{spec['baseline']} alone"
        yield " and ".join(dict.fromkeys(decoding for _, decoding, _ in spec["generations"]))
        yield f"judged by {' and '.join(judge.get('name', judge['judge']) for judge in spec['judges']) or 'none'}"


_SUMMARIES = {
    "examples": Words._examples,
    "tokenizers": Words._tokenizers,
    "negatives": Words._negatives,
    "groups": Words._groups,
    "rejected": Words._rejected,
    "reference-logprobs": Words._logprobs,
    "checkpoints": Words._checkpoints,
    "generations": Words._generations,
    "verdicts": Words._verdicts,
    "metrics": Words._metrics,
}


# ── what the commands share ──────────────────────────────────────────────────────────────────────────────────────


def _runs(inventory: Inventory) -> Mapping[str, Sequence[Registration]]:
    """The runs that use each artifact."""
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
    """What is no artifact, with what is wrong with it: states of unfinished trainings, registrations, run folders."""
    for state in inventory.in_progress():
        fault = checksums.fault(state)
        if state.exists():  # else the training went on meanwhile, or ended
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
    """The names of the runs that the user wants forgotten.

    Raises:
        InputError: there is no such run, or its folder is there.
    """
    names = {run.name: run for run in runs}
    for name in named:
        if name not in names:
            hint = nearest(name, names) or f"there are {', '.join(names) or 'none'}"
            raise InputError(f"--forget {name}: no such run folder uses the store; {hint}")
        if not names[name].missing and not names[name].remote:
            raise InputError(f"--forget {name}: the folder is there; delete it first, or keep what it uses")
    return set(named)


def _record(artifact: Artifact, words: Words, runs: Iterable[Registration]) -> dict[str, Any]:
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "address": artifact.path.name,
        "what": words.summary(artifact),
        "rows": artifact.rows,
        "files": len(artifact.files),
        "bytes": artifact.size,
        "written": artifact.written,
        "runs": [{"run_dir": str(run.run_dir), "host": run.host, "missing": run.missing} for run in runs],
        "spec": artifact.spec,
    }


def _line(artifact: Artifact, words: Words, runs: Sequence[Registration]) -> list[str]:
    name, between = artifact.name, ","
    if sys.stdout.isatty():  # which has little room, and an address is not ambiguous so soon
        name, between = f"{artifact.kind}/{artifact.path.name[:SHORT]}", "\n"
    rows = "-" if artifact.rows is None else f"{artifact.rows:,}"
    size, written = _bytes(artifact.size), _time(artifact.written)
    used_by = between.join(run.run_dir.name + run.state for run in runs) or "-"
    return [name, rows, str(len(artifact.files)), size, written, used_by, words.summary(artifact)]


def _facts(artifact: Artifact, words: Words, runs: Iterable[Registration]) -> Iterator[tuple[str, Any]]:
    if artifact.rows is not None:
        yield "rows", artifact.rows
    yield "size", _bytes(artifact.size)
    yield "written", _time(artifact.written)
    yield "folder", shown(artifact.path)
    yield "runs", [f"{run.run_dir}{run.state}" for run in runs] or "none"


def _first_rows(artifact: Artifact, count: int) -> Iterator[tuple[str, Any]]:
    """The first rows of a product's tables, or of the first shard."""
    tables = [name for name in artifact.files if name.endswith(".parquet")]
    for name in tables[:1] if artifact.table else tables:
        try:
            with (artifact.path / name).open("rb") as file, pq.ParquetFile(file) as parquet:
                batch = next(parquet.iter_batches(batch_size=count), None)
        except (OSError, ValueError) as error:  # ValueError: Arrow's
            yield name, f"unreadable ({cause(error)}); `cpo-pipe store verify {artifact.name}` says more"
            continue
        if batch is not None:
            yield name, [_abridged(row) for row in batch.to_pylist()]


def _abridged(value: Any) -> Any:
    """A value of a row, long texts and lists cut."""
    if isinstance(value, str):
        return _cut(value, 200)
    if isinstance(value, dict):
        return {key: _abridged(part) for key, part in value.items()}
    if isinstance(value, list) and len(value) > 12 and not isinstance(value[0], dict):
        return [*value[:10], f"… ({len(value):,})"]
    return [_abridged(part) for part in value] if isinstance(value, list) else value


def _collect(
    inventory: Inventory, delete: bool, forgotten: Collection[str], paid: bool
) -> tuple[list[tuple[Garbage, int]], list[str], list[tuple[str, int]]]:
    """What can go, with its size; what could not be looked at; what stays because it cost money. Deletes if asked."""
    found: list[tuple[Garbage, int]] = []
    busy, costly = [], []
    used = inventory.used(forgotten)
    for unit in inventory.units():
        keep = unit.name in used
        if not keep and not paid and unit.paid:
            costly.append((unit.name, Artifact(unit.path).size))
            keep = True
        if not unit.garbage(keep):
            continue
        with unit.held(make=delete) as held:
            if not held:
                busy.append(unit.name)
                continue
            # Again, now that nobody can begin to make it: what was registered or recorded meanwhile stays.
            garbage = unit.garbage(keep or unit.name in inventory.used(forgotten))
            found += [(item, item.size) for item in garbage]
            if delete:
                unit.delete(garbage)
    return found, busy, costly


# ── on the screen ────────────────────────────────────────────────────────────────────────────────────────────────


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show lines of cells: elsewhere than on a terminal as aligned text, so that lines can be searched and cut.

    Args:
        columns: names; `>name` is set to the right. The last one is in words: on a terminal it stands below the first.
        rows: cells of each line.
    """
    if not rows:
        return
    rows = [["\n".join(map(one_line, cell.split("\n"))) for cell in row] for row in rows]
    names, right = [column.removeprefix(">") for column in columns], [column.startswith(">") for column in columns]
    console = Console()
    if console.is_terminal:
        _print_rich(console, names, right, rows)
        return
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in [[name.upper() for name in names], *rows]:
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        say("  ".join(cells).rstrip())


def _print_rich(console: Console, names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for place, name in enumerate(names[:-1]):
        widest = max(len(part) for row in rows for part in row[place].split("\n"))
        table.add_column(name, justify="right" if right[place] else "left", min_width=widest)
    for first, *cells, words in rows:
        table.add_row(Text.assemble(first, "\n", (words, "dim")), *map(Text, cells))
    # What needs more room than the terminal has is wrapped by it, never cut.
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    console.print(table, width=max(needed, console.width), crop=False)


def _print_block(title: str, content: Any) -> None:
    """Show JSON values under a title as YAML, in which nothing that could control a terminal stands as it is."""
    if title:
        say()
        Console(soft_wrap=True).print(Text(one_line(title), style="bold"))
    text = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf")
    )
    say(text.removesuffix("...\n").removesuffix("\n"))


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values in one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, not any(isinstance(part, dict | list) for part in sequence))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(size: float) -> str:
    """A size in one word, so that columns can be told apart at spaces."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g}{units[0]}"


def _megabytes(size: int) -> int:
    return -(-size // 10**6)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
