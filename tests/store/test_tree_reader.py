from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import InvalidData, StorageFailure
from fusesnap.nix.nar import FileData, RegularFile, nar_bytes
from fusesnap.store.tree_reader import nar_events, scan_tree


@pytest.fixture
def package(tmp_path: Path) -> Path:
    package = tmp_path / "package"
    (package / "b" / "empty").mkdir(parents=True)
    (package / "b-c").write_bytes(b"1234567")
    (package / "b" / "x").write_bytes(b"#!")
    (package / "b" / "x").chmod(0o555)
    (package / "b" / "none").write_bytes(b"")
    (package / "large").write_bytes(bytes(600_001))
    (package / "link").symlink_to("b/x")
    return package


def test_events_are_the_nar_that_nix_dumps(
    package: Path, nix: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    nar = b"".join(nar_bytes(nar_events(package)))
    code, printed, said = nix("nix-hash", "--type", "sha256", package, home=tmp_path)
    assert code == 0, said
    assert hashlib.sha256(nar).hexdigest() == printed.strip()


def test_events_are_those_of_the_parser(package: Path, parse: Callable[[bytes], list[Any]]) -> None:
    """Offsets, too; contents come in pieces of a bounded size."""
    events = list(nar_events(package))
    assert max(len(event.data) for event in events if isinstance(event, FileData)) == 256 * 1024
    parsed = parse(b"".join(nar_bytes(events)))
    without_data = [event for event in events if not isinstance(event, FileData)]
    assert without_data == [event for event in parsed if not isinstance(event, FileData)]


def test_a_tree_has_the_offsets_of_its_nar(package: Path) -> None:
    nar = b"".join(nar_bytes(nar_events(package)))
    tree = scan_tree(package)
    for index, entry in enumerate(tree.entries):
        file = package / os.fsdecode(tree.path(index))
        if file.is_file() and not file.is_symlink():
            assert nar[entry.offset : entry.offset + entry.size] == file.read_bytes()
            assert entry.executable == (entry.name == b"x")
    assert [entry.name for entry in tree.entries] == [
        b"", b"b", b"empty", b"none", b"x", b"b-c", b"large", b"link",
    ]  # fmt: skip


def test_a_file_that_shrank_is_not_padded(package: Path) -> None:
    events = nar_events(package)
    for event in events:
        if isinstance(event, RegularFile) and event.name == b"b-c":
            os.truncate(package / "b-c", 3)
            break
    with pytest.raises(InvalidData, match="'b-c' ends 4 bytes before its size 7"):
        list(events)


def test_what_no_nar_can_hold_is_named(package: Path) -> None:
    os.mkfifo(package / "pipe")
    for read in (scan_tree, lambda location: list(nar_events(location))):
        with pytest.raises(InvalidData, match="'pipe' is neither file, directory nor link"):
            read(package)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match=r"cannot read .*/absent: No such file"):
        scan_tree(tmp_path / "absent")


def test_an_iterator_that_is_given_up_closes_its_files(package: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    events = nar_events(package)
    for event in events:
        if isinstance(event, FileData):
            break
    events.close()  # type: ignore[attr-defined]
    assert len(list(descriptors.iterdir())) == before
