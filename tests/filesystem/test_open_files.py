"""Descriptors: bounded, and none lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusesnap.filesystem.open_files import OpenFiles


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[bytes]]:
    made = []
    for number in range(3):
        path = tmp_path / str(number)
        path.write_bytes(b"%d" % number)
        made.append(os.fsencode(path))
    yield made


def held(directory: Path) -> int:
    """How many descriptors of this process are open on files of ``directory``."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += str(link.readlink()).startswith(f"{directory}/")
        except FileNotFoundError:  # the descriptor that listed them
            continue
    return found


def test_two_readers_that_open_the_same_file_share_its_descriptor(
    files: list[bytes], tmp_path: Path
) -> None:
    open_files = OpenFiles()
    first = open_files.open(7, files[0], 1)
    assert open_files.open(7, files[0], 1) == first
    assert held(tmp_path) == 1
    open_files.close()
    assert held(tmp_path) == 0


def test_the_least_recently_read_is_closed_first(files: list[bytes], tmp_path: Path) -> None:
    open_files = OpenFiles(capacity=2)
    open_files.open(0, files[0], 1)
    open_files.open(1, files[1], 1)
    assert open_files.get(0) is not None
    open_files.open(2, files[2], 1)
    assert open_files.get(1) is None
    assert os.pread(open_files.get(0) or -1, 9, 0) == b"0"
    assert held(tmp_path) == 2
    open_files.close()
    assert open_files.get(0) is None


def test_a_link_is_not_followed(files: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("0")
    with pytest.raises(OSError, match="link"):
        OpenFiles().open(0, os.fsencode(tmp_path / "link"), 1)


def test_another_file_is_not_opened(files: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it is another file"):
        OpenFiles().open(0, files[0], 2)
    (tmp_path / "directory").mkdir()
    size = (tmp_path / "directory").stat().st_size
    with pytest.raises(FileNotFoundError, match="it is another file"):
        OpenFiles().open(0, os.fsencode(tmp_path / "directory"), size)
    assert held(tmp_path) == 0


def test_what_was_removed_does_not_keep_its_room_on_the_disk(
    files: list[bytes], tmp_path: Path
) -> None:
    open_files = OpenFiles()
    for number, file in enumerate(files):
        open_files.open(number, file, 1)
    (tmp_path / "1").unlink()
    open_files.close_removed()
    assert [open_files.get(number) is not None for number in range(3)] == [True, False, True]
    assert held(tmp_path) == 2
    open_files.close()
