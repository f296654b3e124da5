"""`store ls`: what it says of each artifact, for people and for scripts."""

import json
import re
from typing import Any

import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.store.inventory import Inventory
from tests.support.store_commands import HERE, names_in, register

BOX = re.compile("[\u2500-\u257f\x1b]")


def test_ls_describes_every_artifact(used) -> None:
    result = used.cli("store", "ls")
    head, *lines, total = result.out.splitlines()
    start, cpo = (a.path.name[:8] for a in sorted(Inventory(used.store).artifacts("checkpoints"), key=by_objective))
    assert result.status == 0
    assert head.split() == ["ARTIFACT", "ROWS", "FILES", "SIZE", "WRITTEN", "RUNS", "WHAT"]
    assert [line.split()[0] for line in lines] == names_in(used)
    assert {line.split()[6] for line in lines} == {f"tiny/{used.run_dir.name}"}
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
        "training cpo; objective cpo, mle weight 0.0, beta 0.1, learning rate 0.01, max steps 2, batch size 4, "
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
        assert record["runs"] == [{"run_dir": str(used.run_dir), "host": HERE, "missing": False}]
        assert record["bytes"] > 0
        assert record["files"] > 0
    assert json.loads(used.cli("store", "ls", "groups", "--json").out)[0]["rows"] == 16


def test_ls_names_the_runs_that_use_an_artifact(used) -> None:
    name = names_in(used, "examples")[0]
    register(used, used.root / "runs/lost", name)
    register(used, used.root / "runs/far", name, host="gpu7")
    (line,) = used.cli("store", "ls", "examples").out.splitlines()[1:-1]
    assert set(line.split()[6].split(",")) == {f"tiny/{used.run_dir.name}", "runs/lost(missing)", "runs/far@gpu7"}


def test_boxes_are_drawn_in_a_terminal_only(used, monkeypatch: pytest.MonkeyPatch) -> None:
    (used.store / "groups" / "x").mkdir()
    commands = [("ls",), ("show", names_in(used)[0]), ("verify",), ("gc",)]
    assert not any(BOX.search(used.cli("store", *command).out) for command in commands)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert BOX.search(used.cli("store", "ls").out)


def test_a_narrow_terminal_truncates_nothing(used, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    out = used.cli("store", "ls").out
    assert "…" not in out
    assert all(name in out for name in names_in(used))
