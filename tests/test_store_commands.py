"""`cpo-pipe store`: what it says of a real small store, what it finds damaged, what it deletes and what it keeps."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from cpo_pipe.data.store import Rows, Store, checksums, gc
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.store_commands.summary import Summaries

BOX = re.compile("[\u2500-\u257f\x1b]")
HERE = socket.gethostname()


def register(project, run_dir: Path, *names: str, host: str = HERE) -> None:
    folder = project.store / ".runs"
    folder.mkdir(exist_ok=True)
    content = {"run_dir": str(run_dir), "host": host, "artifacts": names}
    (folder / f"{run_dir.name}-{host}.json").write_text(json.dumps(content))


def names_in(project, *kinds: str) -> list[str]:
    return [a.name for a in Inventory(project.store).artifacts() if not kinds or a.kind in kinds]


def path_of(project, kind: str) -> Path:
    return Inventory(project.store).artifacts(kind)[0].path


@pytest.fixture
def used(made):
    """A store of which one run uses everything."""
    shutil.rmtree(made.store / ".runs", ignore_errors=True)
    register(made, made.root / "runs/tiny", *names_in(made))
    return made


# ── ls ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ls_says_what_everything_is(used) -> None:
    result = used.cli("store", "ls")
    head, *lines, total = result.out.splitlines()
    start, cpo = (a.path.name[:8] for a in sorted(Inventory(used.store).artifacts("checkpoints"), key=by_objective))
    assert result.status == 0
    assert head.split() == ["ARTIFACT", "ROWS", "FILES", "SIZE", "WRITTEN", "RUNS", "WHAT"]
    assert [line.split()[0] for line in lines] == names_in(used)
    assert {line.split()[6] for line in lines} == {"tiny"}
    what = {line[: line.index("/")]: line.split(maxsplit=7)[7] for line in lines if start not in line[:30]}
    assert re.fullmatch(
        r"kind \.jsonl, sha256 [0-9a-f]{8}, template plain, tokenizer [0-9a-f]{8}, train 16, validation 4, test 4",
        what["examples"],
    )
    assert what["negatives"] == (
        f"strategy autoregressive, generator checkpoint {start}, temperature 1.0, top k 50, max new tokens 8, seed 0"
    )
    assert what["groups"] == "count 3, label autoregressive, strategy autoregressive, drop duplicates true"
    assert what["checkpoints"] == (
        "objective cpo, mle weight 0.0, beta 0.1, learning rate 0.01, max steps 2, batch size 4, "
        f"model checkpoint {start}, seed 0"
    )
    assert what["generations"] in (f"model checkpoint {name}, temperature 0, max new tokens 8" for name in (start, cpo))
    assert what["reference-logprobs"] in (f"dtype float32, model checkpoint {name}" for name in (start, cpo))
    assert what["verdicts"] == "judge exact, rules 3"
    assert what["metrics"] == (
        f"baseline start, systems {{cpo: checkpoint {cpo}, start: checkpoint {start}}}, judge exact"
    )
    assert re.fullmatch(rf"{len(lines)} artifacts of 8 kinds, [\d.]+kB", total)


def by_objective(artifact) -> bool:
    return artifact.spec["settings"]["objective"] == "cpo"


def test_ls_of_one_kind(used) -> None:
    result = used.cli("store", "ls", "checkpoints")
    assert [line.split()[0] for line in result.out.splitlines()[1:-1]] == names_in(used, "checkpoints")
    assert used.cli("store", "ls", "chekpoints").error().endswith("did you mean checkpoints?")


def test_ls_counts_the_rows_of_the_tables(used) -> None:
    lines = [line.split() for line in used.cli("store", "ls").out.splitlines()[1:-1]]
    rows = {name: shown for name, shown, *_ in lines}
    for name in rows:
        tables = list((used.store / name).glob("shards/*.parquet")) or list(
            (used.store / name).glob("examples.parquet")
        )
        count = sum(pq.read_metadata(table).num_rows for table in tables)
        assert rows[name] == (str(count) if tables else "-")


def test_ls_for_scripts(used) -> None:
    records: list[dict[str, Any]] = json.loads(used.cli("store", "ls", "--json").out)
    assert [record["name"] for record in records] == names_in(used)
    for record in records:
        assert record["name"] == f"{record['kind']}/{record['hash']}"
        assert record["spec"] == json.loads((used.store / record["name"] / "spec.json").read_text())
        assert record["runs"] == [{"run_dir": str(used.root / "runs/tiny"), "host": HERE, "missing": False}]
        assert record["bytes"] > 0
        assert record["files"] > 0
    assert json.loads(used.cli("store", "ls", "groups", "--json").out)[0]["rows"] == 16


def test_ls_says_which_runs_use_it(used) -> None:
    name = names_in(used, "examples")[0]
    register(used, used.root / "runs/lost", name)
    register(used, used.root / "runs/far", name, host="gpu7")
    (line,) = used.cli("store", "ls", "examples").out.splitlines()[1:-1]
    assert set(line.split()[6].split(",")) == {"tiny", "lost(missing)", "far@gpu7"}


def test_what_is_piped_has_no_drawing_and_a_terminal_does(used, monkeypatch: pytest.MonkeyPatch) -> None:
    (used.store / "groups" / "x").mkdir()
    commands = [("ls",), ("show", names_in(used)[0]), ("verify",), ("gc",)]
    assert not any(BOX.search(used.cli("store", *command).out) for command in commands)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert BOX.search(used.cli("store", "ls").out)


def test_a_narrow_terminal_cuts_nothing(used, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    out = used.cli("store", "ls").out
    assert "…" not in out
    assert all(name in out for name in names_in(used))


SPECS = [
    (
        "negatives",
        {"strategy": "batch", "seed": 1, "pool": "ab" * 16, "prompt": {}},
        "strategy batch, seed 1, pool abababab",
    ),
    (
        "negatives",
        {"strategy": "meanfield", "generator": "cd" * 16, "share": 0.15, "stop_ids": [0], "seed": 0, "prompt": {}},
        "strategy meanfield, generator cdcdcdcd, share 0.15, seed 0",
    ),
    (
        "groups",
        {
            "candidates": [
                {"count": 3, "negatives": {"strategy": "autoregressive"}, "label": "autoregressive"},
                {"count": 1, "negatives": {"strategy": "pool"}, "label": "gpt2"},
            ],
            "scorer": {"embedder": "ef" * 16},
            "drop_duplicates": False,
        },
        "count 3 + 1, label autoregressive + gpt2, strategy autoregressive + pool, embedder efefefef, "
        "drop duplicates false",
    ),
    (
        "checkpoints",
        {"merge": [["ab" * 16, 0.25], ["cd" * 16, 0.75]], "tokenizer": "ef" * 16},
        "merge [[abababab, 0.25], [cdcdcdcd, 0.75]]",
    ),
    (
        "checkpoints",
        {"base": "ab" * 16, "adapter": "cd" * 16},
        "base abababab, adapter cdcdcdcd",
    ),
    (
        "generations",
        {"model": "ab" * 16, "sampling": {"temperature": 0.7, "top_k": 0, "max_new_tokens": 9}, "seed": 4},
        "model abababab, temperature 0.7, top k 0, max new tokens 9, seed 4",
    ),
    (
        "generations",
        {"model": "ab" * 16, "sampling": {"temperature": 1, "top_k": 5, "top_p": 0.9, "max_new_tokens": 9}, "seed": 4},
        "model abababab, temperature 1, top k 5, top p 0.9, max new tokens 9, seed 4",
    ),
    (
        "generations",
        {"model": "ab" * 16, "sampling": {"temperature": 0, "beams": 4, "max_new_tokens": 9}},
        "model abababab, temperature 0, beams 4, max new tokens 9",
    ),
    ("verdicts", {"judge": "similarity", "embedder": "ab" * 16}, "judge similarity, embedder abababab"),
    (
        "tokenizers",
        {"corpus": {"sources": [{"source": {"kind": ".csv"}}]}, "vocab_size": 4096, "algorithm": "byte-level-bpe"},
        "algorithm byte-level-bpe, vocab size 4096, kind .csv",
    ),
    ("checkpoints", {"a_field": 3, "made": "by another version"}, "a field 3, made by another version"),
    ("a-kind-of-the-future", {"x": 1.5, "deep": {}}, "x 1.5"),
    (
        "negatives",
        {"strategy": "prompted", "generator": "cd" * 16, "instruction": "Make it worse. " * 9},
        "strategy prompted, generator cdcdcdcd, instruction "
        "Make it worse. Make it worse. Make it worse. Make it worse.…",
    ),
    ("verdicts", {"judge": "exact", "pattern": "a\x1b[2J\nb"}, r"judge exact, pattern a\x1b[2J b"),
]


@pytest.mark.parametrize(("kind", "spec", "words"), SPECS)
def test_specs_in_words(tmp_path: Path, kind: str, spec: dict[str, Any], words: str) -> None:
    path = tmp_path / kind / "0123456789abcdef"
    path.mkdir(parents=True)
    (path / "spec.json").write_text(json.dumps(spec))
    inventory = Inventory(tmp_path)
    (artifact,) = inventory.artifacts()
    assert Summaries(inventory).summary(artifact) == words


# ── show ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_show_has_spec_files_notes_runs_and_first_rows(used) -> None:
    groups = Inventory(used.store).find("groups/")
    result = used.cli("store", "show", groups.path.name[:7], "--rows", 2)
    assert result.status == 0
    assert result.out.startswith(
        f"{groups.name}\ncount 3, label autoregressive, strategy autoregressive, drop duplicates true\nrows: 16\n"
    )
    assert f"runs: [{used.root / 'runs/tiny'}]" in result.out
    assert "    strategy: autoregressive" in result.out
    assert next(iter(groups.files)) in result.out
    assert result.out.count("- example_id:") == 2
    checkpoint = used.cli("store", "show", names_in(used, "checkpoints")[0]).out
    assert "model.safetensors: " in checkpoint
    assert re.search(r"^fingerprint: [0-9a-f]{32}$", checkpoint, re.MULTILINE)
    assert "first rows of training-metrics.parquet" in checkpoint
    assert "first rows" not in used.cli("store", "show", groups.name, "--rows", 0).out


def test_show_cuts_long_texts_and_lets_nothing_control_the_terminal(used) -> None:
    rows = Store(used.store).rows("generations", {"model": "x"})
    row = {"example_id": "e", "sample_index": 0, "text": "\x1b[2J" + "long " * 100, "token_ids": list(range(99)),
           "finish_reason": "stop", "seed": 1, "engine": "none"}  # fmt: skip
    with rows.lock():
        rows.append(pa.Table.from_pylist([row], schema=rows.schema))
    out = used.cli("store", "show", rows.name).out
    assert "\x1b" not in out
    assert "(504 characters)" in out
    assert "token_ids: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … (99)]" in out


def test_show_of_what_is_damaged_shows_the_rest(used) -> None:
    groups = Inventory(used.store).find("groups/")
    (groups.path / next(iter(groups.files))).write_bytes(b"nothing")
    (groups.path / "spec.json").unlink()
    result = used.cli("store", "show", groups.name)
    assert result.status == 0
    assert "gone or unreadable" in result.out
    assert f"cpo-pipe store verify {groups.name}" in result.out


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verify_of_a_valid_store(used) -> None:
    result = used.cli("store", "verify")
    assert result.status == 0
    lines = result.out.splitlines()
    checked = [*names_in(used), str(used.root / "runs/tiny")]
    assert [line.split()[:2] for line in lines[:-1]] == [["valid", name] for name in checked]
    assert lines[-1] == f"{len(lines) - 2} artifacts, all valid"


def test_verify_names_what_is_damaged_changes_nothing_and_a_run_makes_it_again(used) -> None:
    negatives, checkpoint = Inventory(used.store).find("negatives/"), path_of(used, "checkpoints")
    with (negatives.path / next(iter(negatives.files))).open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    (checkpoint / "model.safetensors").unlink()
    before = used.made()
    result = used.cli("store", "verify")
    assert result.status == 1
    damaged = {negatives.name, f"checkpoints/{checkpoint.name}"}
    assert {line.split()[1] for line in result.out.splitlines() if line.startswith("DAMAGED")} == damaged
    assert "its checksum differs" in result.out
    assert "model.safetensors: it is gone" in result.out
    assert all(name in result.error() for name in damaged)
    assert used.made() == before
    assert used.cli("store", "verify", negatives.path.name[:6]).status == 1
    assert used.cli("store", "verify", *(names_in(used, "groups", "metrics"))).status == 0
    assert used.cli("run", "tiny.yaml").status == 0
    assert used.cli("store", "verify").status == 0


def test_verify_reads_the_states_of_unfinished_trainings(used) -> None:
    state = path_of(used, "checkpoints").parent / ".in-progress/0123456789abcdef/5"
    state.mkdir(parents=True)
    (state / "state.safetensors").write_bytes(b"12345")
    checksums.record(state)
    (state.parent / ".tmp-10").mkdir()
    name = "checkpoints/.in-progress/0123456789abcdef/5"
    assert f"valid {name}" in used.cli("store", "verify").out.splitlines()
    (state / "state.safetensors").write_bytes(b"12344")
    result = used.cli("store", "verify")
    assert (result.status, f"DAMAGED {name}" in result.out.splitlines()) == (1, True)
    assert "the checksum of state.safetensors differs; the next run of that training moves it aside" in result.out


# ── gc ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gc_deletes_what_no_run_uses_and_only_when_told_to(used) -> None:
    kept = names_in(used, "examples", "negatives", "groups")
    register(used, used.root / "runs/tiny", *kept)
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


def test_gc_releases_what_only_a_run_used_that_the_user_forgets(used) -> None:
    examples = names_in(used, "examples")
    register(used, used.root / "runs/tiny", *examples)
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
    assert used.cli("store", "gc").out == "nothing to delete\n"  # and it is said once


def test_gc_keeps_what_a_run_of_another_machine_uses(used) -> None:
    shutil.rmtree(used.store / ".runs")
    register(used, Path("/no/such/folder"), *names_in(used), host="gpu7")
    result = used.cli("store", "gc", "--delete")
    assert result.status == 0
    assert "kept: what /no/such/folder of gpu7 uses" in result.out
    assert used.cli("store", "verify").status == 0


def test_gc_does_not_delete_a_store_of_which_no_run_is_known(used) -> None:
    before = names_in(used)
    shutil.rmtree(used.store / ".runs")
    dry = used.cli("store", "gc")
    assert (dry.status, len(dry.out.splitlines())) == (0, len(before) + 3)
    assert "no run folder is known" in dry.out
    refused = used.cli("store", "gc", "--delete")
    assert refused.status == 2
    assert "run your recipes again" in refused.error()
    assert names_in(used) == before


def test_gc_does_nothing_where_a_registration_cannot_be_read(used) -> None:
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


def test_gc_after_a_project_was_moved_keeps_what_the_runs_need_that_were_not_run_again(used) -> None:
    """The store and its run folders together: none of the registered paths is there any more."""
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
    """Rows of a kind, such as an API answered."""
    values = {pa.string(): "x", pa.int32(): 0, pa.int64(): 0, pa.float32(): 0.0, pa.float64(): 0.0, pa.bool_(): True}
    rows = store.rows(kind, spec)
    row = {field.name: values.get(field.type, []) for field in rows.schema}
    rows.append(pa.Table.from_pylist([row], schema=rows.schema))
    return rows


def test_gc_keeps_answers_that_cost_money_unless_told_otherwise(used) -> None:
    api, store = {"url": "http://host/v1", "model": "m"}, Store(used.store)
    paid = [
        api_rows(store, "negatives", {"strategy": "prompted", "generator": api}),
        api_rows(store, "generations", {"model": api}),
        api_rows(store, "rejected", {"of": {"strategy": "prompted", "generator": api}}),
        api_rows(store, "verdicts", {"judge": "openai", "api": api}),
        api_rows(store, "generations", {"model": "what nothing says any more"}),
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


def test_only_a_run_that_is_missing_can_be_forgotten(used) -> None:
    there = str(used.root / "runs/tiny")
    assert "the folder still exists; delete it first" in used.cli("store", "gc", "--forget", there).error()
    wrong = used.cli("store", "gc", "--forget", f"{there}y").error()
    assert f"no such run folder uses the store; did you mean {there}?" in wrong
    register(used, Path("/far/run"), *names_in(used), host="gpu7")
    shutil.rmtree(used.root / "runs/tiny")
    refused = used.cli("store", "gc", "--delete", "--forget", there, "--forget", "/far/run@gpu7")
    assert "so all would go" in refused.error()
    assert used.cli("store", "gc", "--delete", "--forget", there).status == 0


def test_verify_names_files_of_a_run_folder_that_changed(made) -> None:
    assert made.cli("run", "tiny.yaml").status == 0
    run = made.root / "runs/tiny"
    (run / "metrics.md").write_text("better")
    (run / "model_outputs/cpo/greedy.json").unlink()
    result = made.cli("store", "verify")
    assert result.status == 1
    assert f"DAMAGED {run}" in result.out
    assert "metrics.md: gone or changed" in result.out
    assert "model_outputs/cpo/greedy.json: gone or changed" in result.out


def test_gc_skips_what_a_process_is_at_work_on(used) -> None:
    negatives, groups = names_in(used, "negatives")[0], names_in(used, "groups")[0]
    register(used, used.root / "runs/tiny", *(name for name in names_in(used) if name not in (negatives, groups)))
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


def test_what_is_registered_while_gc_looks_stays(used, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins between the first look at an artifact and the moment its lock is taken."""
    register(used, used.root / "runs/tiny", *names_in(used, "examples"))
    before, try_lock = names_in(used), gc.try_lock

    def begun(file: Path, *, make: bool):
        register(used, used.root / "runs/tiny", *before)
        return try_lock(file, make=make)

    monkeypatch.setattr(gc, "try_lock", begun)
    assert used.cli("store", "gc", "--delete").status == 0
    assert names_in(used) == before


def test_gc_deletes_leftovers_beside_what_it_keeps(used) -> None:
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


def test_a_run_registers_what_it_uses_before_it_makes_it(project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gc relies on: also in the middle of a stage nothing that a run uses is garbage."""
    append, registered = Rows.append, []

    def checked(rows: Rows, table: pa.Table) -> None:
        registered.append(rows.name in Inventory(project.store).used())
        append(rows, table)

    monkeypatch.setattr(Rows, "append", checked)
    assert project.cli("run", "tiny.yaml").status == 0
    assert registered
    assert all(registered)
    assert project.cli("store", "gc").out == "nothing to delete\n"


@pytest.mark.parametrize("allowed", [1, 4, 11, 16])
def test_after_a_gc_that_was_killed_a_run_finishes(used, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    register(used, used.root / "runs/tiny", *names_in(used, "examples"))
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


# ── diff ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_diff_says_where_the_specs_differ(used) -> None:
    prompt = {"template": "plain"}
    sampling = {"temperature": 1.0, "top_k": 50, "max_new_tokens": 8, "stop_ids": [0]}
    fingerprint = Inventory(used.store).find(names_in(used, "checkpoints")[0]).manifest["fingerprint"]
    specs = [
        {"model": fingerprint, "prompt": prompt, "sampling": sampling, "seed": 0},
        {"model": "ab" * 16, "prompt": prompt, "sampling": sampling | {"temperature": 0.7, "stop_ids": [0, 5]}},
    ]
    names = []
    for spec in specs:
        rows = Store(used.store).rows("generations", spec)
        row = {"example_id": "e", "sample_index": 0, "text": "", "token_ids": [0], "finish_reason": "stop", "seed": 1,
               "engine": "none"}  # fmt: skip
        with rows.lock():
            rows.append(pa.Table.from_pylist([row], schema=rows.schema))
        names.append(rows.name)
    result = used.cli("store", "diff", *names)
    assert result.status == 0
    assert sorted(result.out.splitlines()) == [
        f"model: checkpoint {names_in(used, 'checkpoints')[0].split('/')[1][:8]} -> abababab",
        "sampling.stop_ids: [0] -> [0, 5]",
        "sampling.temperature: 1.0 -> 0.7",
        "seed: 0 -> absent",
    ]
    assert "the specs are equal" in used.cli("store", "diff", names[0], names[0]).out


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "nothing"], "kind nothing: nothing of it in"),
        (["ls", "--store", "absent"], "--store absent: no such folder"),
        (["ls", "--store", "tiny.yaml"], "--store tiny.yaml: no such folder"),
        (["show", "zzzz"], "artifact zzzz: not in"),
        (["show", "checkpoints/"], "artifact checkpoints/: 2 have that name (checkpoints/"),
        (["show"], "Missing argument"),
        (["show", "groups/", "--rows", "-1"], "--rows"),
        (["verify", "groups/", "nothing/at-all"], "artifact nothing/at-all: not in"),
        (["gc", "--delete", "--store", "absent"], "--store absent: no such folder"),
        (["diff", "groups/"], "Missing argument"),
        (["diff", "groups/", "negatives/"], "are of different kinds; name two of one kind"),
        (["tidy"], "No such command"),
    ],
)
def test_bad_input_gets_one_line(used, arguments: list[str], message: str) -> None:
    before = used.made()
    result = used.cli("store", *arguments)
    assert result.status == 2
    assert message in result.error()
    assert used.made() == before
    assert not (used.root / "absent").exists()


def test_the_traceback_is_shown_when_asked_for(used) -> None:
    result = used.cli("store", "show", "zzzz", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err


def test_store_alone_shows_its_commands(used) -> None:
    result = used.cli("store")
    assert result.status == 0
    assert all(command in result.out for command in ("ls", "show", "verify", "gc", "diff"))


def test_all_commands_take_a_url(used, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("upath")
    monkeypatch.setenv("CPO_PIPE_CACHE", str(used.root / "cache"))
    url: Any = f"memory://bucket/{used.root.name}"
    store = Store(url)
    with (artifact := store.artifact("checkpoints", {"max_steps": 2})).lock(), artifact.create() as writer:
        (writer.path / "weights").write_bytes(b"12345")
    rows = store.rows("reference-logprobs", {"dtype": "float32"})
    rows.append(
        pa.Table.from_pylist(
            [{"example_id": "a", "candidate_id": "b", "logprob": 0.5, "num_tokens": 1}], schema=rows.schema
        )
    )
    assert [line.split()[0] for line in used.cli("store", "ls", "--store", url).out.splitlines()[1:-1]] == [
        rows.name,
        artifact.name,
    ]
    assert "logprob: 0.5" in used.cli("store", "show", "reference-logprobs/", "--store", url).out
    assert used.cli("store", "verify", "--store", url).status == 0
    store = Store(url)
    store.artifact("checkpoints", {"max_steps": 2})
    store.register_run(used.root)
    for arguments in (), ("--delete",):
        out = used.cli("store", "gc", "--store", url, *arguments).out
        assert [line.split()[0] for line in out.splitlines()[1:-1]] == [rows.name]
    assert [artifact.name for artifact in Inventory(url).artifacts()] == [artifact.name]
