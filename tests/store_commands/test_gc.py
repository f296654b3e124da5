"""`store gc`: what it deletes, what it keeps, and that a run always finds what it uses."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from filelock import FileLock

from cpo_pipe.data.store import Rows, Store, gc
from cpo_pipe.data.store.inventory import Inventory
from tests.support.marks import slow_except
from tests.support.store_commands import names_in, path_of, register


def test_gc_deletes_unused_artifacts_only_with_delete(used) -> None:
    kept = names_in(used, "examples", "negatives", "groups")
    register(used, used.run_dir, *kept)
    before = used.made()
    dry = used.cli("store", "gc")
    assert dry.status == 0
    assert used.made() == before
    gone = [name for name in names_in(used) if name not in kept]
    assert [line.split()[0] for line in dry.out.splitlines()[1:-1]] == gone
    assert dry.out.splitlines()[-1].endswith("would be freed by --delete")
    done = used.cli("store", "gc", "--delete")
    assert done.status == 0
    assert done.out.splitlines()[:-1] == dry.out.splitlines()[:-1]
    assert names_in(used) == kept
    assert used.made().items() <= before.items()
    assert {name.split("/")[0] for name in used.made()} - {".runs"} == {"examples", "negatives", "groups"}
    assert used.cli("store", "gc", "--delete").out == "nothing to delete\n"
    assert "0 made, 48 reused" in used.cli("run", "tiny.yaml").err


def test_gc_releases_what_only_a_forgotten_run_used(used) -> None:
    examples = names_in(used, "examples")
    register(used, used.run_dir, *examples)
    register(used, used.root / "runs/lost", *names_in(used))
    (used.root / "runs/lost").mkdir()
    assert used.cli("store", "gc").out == "nothing to delete\n"
    (used.root / "runs/lost").rmdir()
    before, lost = names_in(used), str(used.root / "runs/lost")
    kept = used.cli("store", "gc", "--delete")
    assert f"kept: what {lost} uses, which is missing; if it was deleted, add --forget {lost}" in kept.out
    assert names_in(used) == before
    dry = used.cli("store", "gc", "--forget", lost).out
    assert f"forgotten: {lost}" in dry
    assert all(f"{name} " in dry for name in before if name not in examples)
    assert names_in(used) == before
    assert f"forgotten: {lost}" in used.cli("store", "gc", "--forget", lost, "--delete").out
    assert names_in(used) == examples
    assert used.cli("store", "gc").out == "nothing to delete\n"  # and is reported once


def test_gc_keeps_what_a_run_of_another_machine_uses(used) -> None:
    shutil.rmtree(used.store / ".runs")
    register(used, Path("/no/such/folder"), *names_in(used), host="gpu7")
    result = used.cli("store", "gc", "--delete")
    assert result.status == 0
    assert "kept: what /no/such/folder of gpu7 uses" in result.out
    assert used.cli("store", "verify").status == 0


def test_gc_refuses_to_delete_when_no_run_is_known(used) -> None:
    before = names_in(used)
    shutil.rmtree(used.store / ".runs")
    dry = used.cli("store", "gc")
    assert (dry.status, len(dry.out.splitlines())) == (0, len(before) + 3)
    assert "no run folder is known" in dry.out
    refused = used.cli("store", "gc", "--delete")
    assert refused.status == 2
    assert "run your recipes again" in refused.error()
    assert names_in(used) == before


def test_gc_deletes_nothing_when_a_registration_is_unreadable(used) -> None:
    before = names_in(used)
    (used.store / ".runs/broken.json").write_text("{")
    refused = used.cli("store", "gc", "--delete")
    assert refused.status == 2
    assert "broken.json: damaged" in refused.error()
    assert names_in(used) == before
    listed = used.cli("store", "ls")
    assert listed.status == 0
    assert "broken.json is damaged" in listed.err
    assert "broken.json" in used.cli("store", "verify").error()


@pytest.mark.slow
def test_gc_in_a_moved_project_keeps_what_runs_need_that_were_not_repeated(used) -> None:
    """The store moves with its run folders, so no registered path exists any more."""
    other = ["--run-dir", "runs/other", "--set", "negatives.seed=1"]
    assert used.cli("run", "tiny.yaml", *other).status == 0
    before = used.made()
    for name in ("runs", "cpo-store"):
        (used.root / "moved").mkdir(exist_ok=True)
        (used.root / name).rename(used.root / "moved" / name)
    at = ["--store", "moved/cpo-store"]
    assert used.cli("run", "tiny.yaml", *at, "--run-dir", "moved/runs/tiny").status == 0
    result = used.cli("store", "gc", "--delete", *at)
    assert result.status == 0
    assert result.out.count("which is missing; if it was deleted, add --forget ") == 2
    again = used.cli("run", "tiny.yaml", *at, *["--run-dir", "moved/runs/other", *other[2:]])
    assert "0 made, 48 reused" in again.err
    assert "train cpo: reused" in again.err
    used.store = used.root / "moved/cpo-store"
    assert before.items() <= used.made().items()


def api_rows(store: Store, kind: str, spec: dict[str, Any]) -> Rows:
    """Return rows of a kind with one row, as if an API had answered."""
    values = {pa.string(): "x", pa.int32(): 0, pa.int64(): 0, pa.float32(): 0.0, pa.float64(): 0.0, pa.bool_(): True}
    rows = store.rows(kind, spec)
    row = {field.name: values.get(field.type, []) for field in rows.schema}
    rows.append(pa.Table.from_pylist([row], schema=rows.schema))
    return rows


def test_gc_keeps_paid_answers_without_paid(used) -> None:
    api, store = {"url": "http://host/v1", "model": "m"}, Store(used.store)
    paid = [
        api_rows(store, "negatives", {"strategy": "prompted", "generator": api}),
        api_rows(store, "generations", {"model": api}),
        api_rows(store, "rejected", {"of": {"strategy": "prompted", "generator": api}}),
        api_rows(store, "verdicts", {"judge": "openai", "api": api}),
        api_rows(store, "generations", {"model": "unknown"}),
    ]
    (paid[-1].path / "spec.json").write_text("{")
    free = api_rows(store, "negatives", {"strategy": "autoregressive", "generator": "ab" * 16})
    for arguments in (), ("--delete",):
        result = used.cli("store", "gc", *arguments)
        assert result.status == 0
        assert [line.split()[0] for line in result.out.splitlines()[1:2]] == [free.name]
        for rows in paid:
            assert f"kept: {rows.name} (" in result.out
        assert result.out.count("its answers cost money; add --paid to include it") == len(paid)
    assert not free.files()
    assert all(rows.files() for rows in paid)
    assert used.cli("store", "gc", "--delete", "--paid").status == 0
    assert not any(rows.files() for rows in paid)


def test_only_a_missing_run_can_be_forgotten(used) -> None:
    there = str(used.run_dir)
    assert "the folder still exists; delete it first" in used.cli("store", "gc", "--forget", there).error()
    wrong = used.cli("store", "gc", "--forget", f"{there}y").error()
    assert f"--forget {there}y: no such run folder uses the store; " in wrong
    assert there in wrong.partition("; ")[2]
    register(used, Path("/far/run"), *names_in(used), host="gpu7")
    shutil.rmtree(used.run_dir)
    refused = used.cli("store", "gc", "--delete", "--forget", there, "--forget", "/far/run@gpu7")
    assert "so all would go" in refused.error()
    assert used.cli("store", "gc", "--delete", "--forget", there).status == 0


def test_gc_skips_locked_artifacts(used) -> None:
    negatives, groups = names_in(used, "negatives")[0], names_in(used, "groups")[0]
    register(used, used.run_dir, *(name for name in names_in(used) if name not in (negatives, groups)))
    with FileLock(used.store / negatives / "lock"):
        for arguments in (), ("--delete",):
            result = used.cli("store", "gc", *arguments)
            assert result.status == 0
            assert f"skipped: {negatives}, which a process is at work on" in result.out
            assert [line.split()[0] for line in result.out.splitlines()[1:-2]] == [groups]
        assert negatives in names_in(used)
        assert groups not in names_in(used)
    assert used.cli("store", "gc", "--delete").status == 0
    assert negatives not in names_in(used)


def test_gc_keeps_what_is_registered_while_it_searches(used, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins after gc has seen an artifact and before gc locks it."""
    register(used, used.run_dir, *names_in(used, "examples"))
    before, try_lock = names_in(used), gc.try_lock

    def begun(file: Path, *, make: bool):
        register(used, used.run_dir, *before)
        return try_lock(file, make=make)

    monkeypatch.setattr(gc, "try_lock", begun)
    assert used.cli("store", "gc", "--delete").status == 0
    assert names_in(used) == before


def test_gc_deletes_leftovers_of_artifacts_that_it_keeps(used) -> None:
    negatives, checkpoint = path_of(used, "negatives"), path_of(used, "checkpoints")
    before = used.made()
    leftovers = [
        negatives / "shards/.tmp-0a-x.parquet",
        negatives / "shards/1795233281902678770-0badcafe.parquet",
        negatives / "damaged/1.parquet",
        checkpoint.with_name(f".tmp-0a-{checkpoint.name}") / "model.safetensors",
        checkpoint.with_name(f"{checkpoint.name}.damaged-1") / "model.safetensors",
        checkpoint.parent / ".in-progress" / checkpoint.name / "1/state.safetensors",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    dry = used.cli("store", "gc")
    assert len(dry.out.splitlines()) == len(leftovers) + 2
    assert dry.out.splitlines()[-1] == "6kB would be freed by --delete"
    assert used.cli("store", "gc", "--delete").out.splitlines()[-1] == "6kB freed"
    assert used.made() == before
    assert not any(path.exists() for path in leftovers)


@pytest.mark.slow
def test_a_run_registers_what_it_uses_before_it_makes_it(project, monkeypatch: pytest.MonkeyPatch) -> None:
    """gc relies on this: nothing that a run uses is garbage, even in the middle of a stage."""
    append, registered = Rows.append, []

    def checked(rows: Rows, table: pa.Table) -> None:
        registered.append(rows.name in Inventory(project.store).used())
        append(rows, table)

    monkeypatch.setattr(Rows, "append", checked)
    assert project.cli("run", "tiny.yaml").status == 0
    assert registered
    assert all(registered)
    assert project.cli("store", "gc").out == "nothing to delete\n"


@pytest.mark.parametrize("allowed", slow_except([1, 4, 11, 16], 4))
def test_a_run_finishes_after_a_killed_gc(used, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    register(used, used.run_dir, *names_in(used, "examples"))
    unlink, left = Path.unlink, iter(range(allowed))

    def killing(path: Path, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killing)
        assert used.cli("store", "gc", "--delete").status == 130
    result = used.cli("run", "tiny.yaml")
    assert result.status == 0, result.err
    assert used.cli("store", "verify", *names_in(used, "examples", "negatives", "groups", "metrics")).status == 0
