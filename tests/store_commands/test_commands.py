"""`store show` and `store diff`, and what all commands of the store have in common."""

import re
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.store import Store
from cpo_pipe.data.store.inventory import Inventory
from tests.support.store_commands import names_in


def test_show_prints_spec_files_notes_runs_and_first_rows(used) -> None:
    groups = Inventory(used.store).find("groups/")
    result = used.cli("store", "show", groups.path.name[:7], "--rows", 2)
    assert result.status == 0
    assert result.out.startswith(
        f"{groups.name}\ncount 3, label autoregressive, strategy autoregressive, drop duplicates true\nrows: 16\n"
    )
    assert f"runs: [{used.run_dir}]" in result.out
    assert "    strategy: autoregressive" in result.out
    assert next(iter(groups.files)) in result.out
    assert result.out.count("- example_id:") == 2
    checkpoint = used.cli("store", "show", names_in(used, "checkpoints")[0]).out
    assert "model.safetensors: " in checkpoint
    assert re.search(r"^fingerprint: [0-9a-f]{32}$", checkpoint, re.MULTILINE)
    assert "first rows of training-metrics.parquet" in checkpoint
    assert "first rows" not in used.cli("store", "show", groups.name, "--rows", 0).out


def test_show_truncates_long_texts_and_escapes_control_characters(used) -> None:
    rows = Store(used.store).rows("generations", {"model": "x"})
    row = {"example_id": "e", "sample_index": 0, "text": "\x1b[2J" + "long " * 100, "token_ids": list(range(99)),
           "finish_reason": "stop", "seed": 1, "engine": "none"}  # fmt: skip
    with rows.lock():
        rows.append(pa.Table.from_pylist([row], schema=rows.schema))
    out = used.cli("store", "show", rows.name).out
    assert "\x1b" not in out
    assert "(504 characters)" in out
    assert "token_ids: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … (99)]" in out


def test_show_of_a_damaged_artifact_prints_the_rest(used) -> None:
    groups = Inventory(used.store).find("groups/")
    (groups.path / next(iter(groups.files))).write_bytes(b"nothing")
    (groups.path / "spec.json").unlink()
    result = used.cli("store", "show", groups.name)
    assert result.status == 0
    assert "gone or unreadable" in result.out
    assert f"cpo-pipe store verify {groups.name}" in result.out


def test_diff_lists_where_the_specs_differ(used) -> None:
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


def test_debug_shows_the_traceback(used) -> None:
    result = used.cli("store", "show", "zzzz", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err


def test_store_without_a_command_lists_its_commands(used) -> None:
    result = used.cli("store")
    assert result.status == 0
    assert all(command in result.out for command in ("ls", "show", "verify", "gc", "diff"))


def test_all_commands_accept_a_url(used, monkeypatch: pytest.MonkeyPatch) -> None:
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
