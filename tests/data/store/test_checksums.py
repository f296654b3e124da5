"""Checksums of a folder: any change of any file is found."""

import os
from pathlib import Path

import pytest

from cpo_pipe.data.store import checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "inner" / ".metadata").write_bytes(b"hidden")
    (tmp_path / "empty").touch()
    checksums.record(tmp_path)
    return tmp_path


def test_what_is_as_it_was_has_no_fault(folder: Path) -> None:
    assert checksums.fault(folder) is None
    checksums.record(folder)
    assert checksums.fault(folder) is None


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("name", ["a.bin", "inner/.metadata", "checksums.json"])
def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, name: str, bit: int) -> None:
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), 5):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        (folder / name).write_bytes(content)
        # What stays the same text: white space in the list of checksums.
        if name != "checksums.json" or content.split() != whole.split():
            assert checksums.fault(folder) is not None, (place, bit)


@pytest.mark.parametrize("name", ["a.bin", "inner/.metadata", "checksums.json"])
def test_a_file_that_is_cut_short_or_gone_is_found(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    for length in (size - 1, 1, 0):
        os.truncate(folder / name, length)
        assert checksums.fault(folder) is not None
    (folder / name).unlink()
    assert checksums.fault(folder) == f"{name} is gone"
    assert checksums.fault(folder / "absent") == "checksums.json is gone"


@pytest.mark.parametrize("content", ["{}", "[]", "null", "3", '["ab"]', '{"a.bin": 3}', '{"..": "x"}', "\x00"])
def test_checksums_that_say_nothing_are_a_fault(folder: Path, content: str) -> None:
    (folder / "checksums.json").write_text(content)
    assert checksums.fault(folder) is not None
