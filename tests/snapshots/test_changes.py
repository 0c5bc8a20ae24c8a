"""What an upper directory says of changes. Whether containerd says the same is in the end-to-end tests."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusesnap.errors import FailedPrecondition, NotOurs
from fusesnap.snapshots.changes import ChangeKind, changes
from fusesnap.snapshots.id_mapping import IdMapping, IdRange
from fusesnap.snapshots.layer_tar import PIECE, LayerTar

DELETED, LINKED, WRITTEN = ChangeKind.DELETED, ChangeKind.LINKED, ChangeKind.WRITTEN


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    (tmp_path / "upper").mkdir()
    return tmp_path / "upper"


@pytest.fixture
def below(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    return tmp_path / "below"


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def found(upper: Path, below: Path) -> list[tuple[ChangeKind, str]]:
    with opened(upper) as new, opened(below) as old:
        return [
            (change.kind, os.fsdecode(change.path)) for change in changes(new, old, overlay=True)
        ]


def write(path: Path, data: bytes = b"data", *, mtime_ns: int = 10**9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def layer(upper: Path, *, latest: int | None = None) -> list[tarfile.TarInfo]:
    with opened(upper) as new:
        data = b"".join(LayerTar(latest).pieces(changes(new, None, overlay=False)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def test_names_come_sorted_by_bytes_and_directories_before_what_is_in_them(
    upper: Path, below: Path
) -> None:
    for name in ("a.b", "a/x", "a-b", "B", "ä"):
        write(upper / name)
    assert [name for _, name in found(upper, below)] == ["B", "a", "a/x", "a-b", "a.b", "ä"]


@pytest.mark.parametrize(
    ("new", "old", "changed"),
    [
        ({}, {}, False),
        ({"data": b"atad"}, {}, True),
        ({"data": b"longer"}, {}, True),
        ({"mtime_ns": 2 * 10**9}, {}, True),
        # With nanoseconds the time alone decides, as in containerd.
        ({"data": b"atad", "mtime_ns": 10**9 + 1}, {"mtime_ns": 10**9 + 1}, False),
        ({"mtime_ns": 10**9 + 1}, {}, True),
    ],
)
def test_a_file_is_compared_by_content_only_where_its_time_says_nothing(
    upper: Path, below: Path, new: dict[str, int], old: dict[str, int], *, changed: bool
) -> None:
    write(upper / "file", **new)  # type: ignore[arg-type]
    write(below / "file", **old)  # type: ignore[arg-type]
    assert found(upper, below) == ([(WRITTEN, "file")] if changed else [])


def test_mode_owner_and_capabilities_are_changes_and_a_directorys_time_is_none(
    upper: Path, below: Path
) -> None:
    for root in (upper, below):
        for name in ("mode", "owner", "capable", "same"):
            write(root / name)
        (root / "directory").mkdir()
    (upper / "mode").chmod(0o600)
    os.chown(upper / "owner", 1, 2)
    os.setxattr(upper / "capable", "security.capability", b"\1\0\0\2" + bytes(16))
    os.utime(upper / "directory", (5, 5))
    for name in ("mode", "owner", "capable"):
        os.utime(upper / name, (1, 1))
    assert found(upper, below) == [(WRITTEN, name) for name in ("capable", "mode", "owner")]


def test_ids_and_capabilities_are_those_that_a_user_namespace_shows(
    upper: Path, below: Path
) -> None:
    ids = IdMapping((IdRange(0, 1000, 10), IdRange(20, 5000, 10)), (IdRange(0, 2000, 10),))
    for name, owner in (("same", (1000, 2000)), ("mine", (5003, 2004)), ("nobodys", (0, 0))):
        os.chown(write(upper / name), *owner)
    write(below / "same")
    os.utime(upper / "same", (1, 1))
    for name, root in (("mine", 1000), ("nobodys", 7)):
        capability = struct.pack("<I16sI", 0x0300_0001, bytes(16), root)
        os.setxattr(upper / name, "security.capability", capability)
    with opened(upper) as new, opened(below) as old:
        found = {
            change.path: (
                change.found.owner,
                change.found.capability[3],
                len(change.found.capability),
            )
            for change in changes(new, old, overlay=True, ids=ids)
            if change.found is not None
        }
    assert found == {b"mine": ((23, 4), 2, 20), b"nobodys": ((65534, 65534), 3, 24)}


def test_what_has_gone_is_said_once_and_only_if_it_was_there(upper: Path, below: Path) -> None:
    write(below / "tree/a/b")
    write(below / "kept/a")
    whiteout(upper / "tree")
    whiteout(upper / "never")
    (upper / "kept").mkdir()
    assert found(upper, below) == [(DELETED, "tree")]


def test_an_opaque_directory_hides_every_name_below_at_any_depth(upper: Path, below: Path) -> None:
    for name in ("old", "both", "deep/old", "deep/er/old"):
        write(below / "opaque" / name)
    write(upper / "opaque/both", b"new")
    write(upper / "opaque/deep/new")
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    assert found(upper, below) == [
        (WRITTEN, "opaque/both"),
        (DELETED, "opaque/deep/er"),
        (WRITTEN, "opaque/deep/new"),
        (DELETED, "opaque/deep/old"),
        (DELETED, "opaque/old"),
    ]


def test_a_kind_may_change(upper: Path, below: Path) -> None:
    write(below / "to-file/x")
    write(below / "to-directory")
    write(upper / "to-file")
    write(upper / "to-directory/y")
    assert [name for _, name in found(upper, below)] == [
        "to-directory",
        "to-directory/y",
        "to-file",
    ]


def test_an_unchanged_name_of_a_file_is_said(upper: Path, below: Path) -> None:
    write(below / "a")
    write(upper / "a")
    os.link(upper / "a", upper / "b")
    assert found(upper, below) == [(LINKED, "a"), (WRITTEN, "b")]


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("trusted.overlay.redirect", b"/elsewhere"),
        ("trusted.overlay.metacopy", b""),
        ("trusted.overlay.opaque", b"x"),
    ],
)
def test_what_the_upper_directory_alone_does_not_say_is_left_to_others(
    upper: Path, below: Path, attribute: str, value: bytes
) -> None:
    (upper / "odd").mkdir()
    os.setxattr(upper / "odd", attribute, value)
    with pytest.raises(NotOurs, match="odd"):
        found(upper, below)


def test_a_tree_may_be_deeper_than_paths_are_long(upper: Path, below: Path) -> None:
    directory = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    name = "d" * 200
    for _ in range(40):  # 8,000 bytes; a path has 4,096
        os.mkdir(name, dir_fd=directory)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)
    assert len(found(upper, below)) == 40
    assert len(layer(upper)[-1].name) == 40 * 201 - 1


def test_a_link_that_has_taken_a_directorys_place_is_not_followed(
    upper: Path, below: Path, tmp_path: Path
) -> None:
    write(tmp_path / "outside/secret")
    (upper / "a").mkdir()
    (upper / "b").mkdir()
    with opened(upper) as new, opened(below) as old:
        walk = changes(new, old, overlay=True)
        assert next(walk).path == b"a"
        (upper / "b").rmdir()
        (upper / "b").symlink_to(tmp_path / "outside")
        (link,) = walk
    assert link.found is not None
    assert stat.S_ISLNK(link.found.status.st_mode)


def test_a_file_that_has_taken_anothers_place_is_not_read(upper: Path, below: Path) -> None:
    write(upper / "file")
    with opened(upper) as new, opened(below) as old:
        walk = changes(new, old, overlay=True)
        change = next(walk)
        write(upper / "other", b"secret").rename(upper / "file")
        with pytest.raises(OSError, match="Stale"), change.open():
            pass


def test_a_file_that_gets_shorter_is_an_error_and_one_that_grows_is_cut(upper: Path) -> None:
    grows, shrinks = write(upper / "a", bytes(2 * PIECE)), write(upper / "b", bytes(2 * PIECE))
    with opened(upper) as new:
        pieces = LayerTar().pieces(changes(new, None, overlay=False))
        data = [next(pieces), next(pieces)]
        with grows.open("ab") as file:
            file.write(b"more")
        while not data[-1].startswith(b"b\0"):
            data.append(next(pieces))
        assert sum(map(len, data)) == 512 + 2 * PIECE + 512
        next(pieces)
        os.truncate(shrinks, PIECE)
        with pytest.raises(FailedPrecondition, match=f"b: expected {2 * PIECE} bytes, got {PIECE}"):
            list(pieces)


def test_no_later_time_is_written_than_was_asked_for(upper: Path) -> None:
    write(upper / "early", mtime_ns=5 * 10**9)
    write(upper / "late", mtime_ns=50 * 10**9)
    times = {one.name: one.mtime for one in layer(upper, latest=7 * 10**9)}
    assert times == {"early": 5, "late": 7}
