"""`store verify`: what it reports, and that it changes nothing."""

from cpo_pipe.data.store import checksums
from cpo_pipe.data.store.inventory import Inventory
from tests.support.store_commands import names_in, path_of


def test_verify_of_a_valid_store(used) -> None:
    result = used.cli("store", "verify")
    assert result.status == 0
    lines = result.out.splitlines()
    checked = [*names_in(used), str(used.run_dir)]
    assert [line.split()[:2] for line in lines[:-1]] == [["valid", name] for name in checked]
    assert lines[-1] == f"{len(lines) - 2} artifacts, all valid"


def test_verify_names_what_is_damaged_and_changes_nothing_and_a_run_repairs_it(used) -> None:
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


def test_verify_checks_resume_checkpoints(used) -> None:
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


def test_verify_names_changed_files_of_a_run_folder(made) -> None:
    assert made.cli("run", "tiny.yaml").status == 0
    run = made.run_dir
    (run / "metrics.md").write_text("better")
    (run / "model_outputs/cpo/greedy.json").unlink()
    result = made.cli("store", "verify")
    assert result.status == 1
    assert f"DAMAGED {run}" in result.out
    assert "metrics.md: gone or changed" in result.out
    assert "model_outputs/cpo/greedy.json: gone or changed" in result.out
