from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileEnd,
    NarEnd,
    NarEvent,
    NarParser,
    NeedData,
    RegularFile,
    Symlink,
    nar_bytes,
)
from fusesnap.nix.tree import Entry, EntryKind, Tree, TreeBuilder


def build(events: Iterable[NarEvent]) -> Tree:
    builder = TreeBuilder()
    for event in events:
        builder.receive(event)
    return builder.tree()


def parsed(nar: bytes) -> Iterator[NarEvent]:
    parser = NarParser()
    parser.receive_data(nar)
    while not isinstance(event := parser.next_event(), NeedData):
        yield event


@given(st.data())
def test_entries_are_in_the_order_of_the_archive(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    events = list(parsed(b"".join(nar_bytes(data.draw(nar_events)))))
    tree = build(events)
    objects = [e for e in events if isinstance(e, DirectoryStart | RegularFile | Symlink)]
    assert [entry.name for entry in tree.entries] == [e.name for e in objects]
    assert len(tree) == len(tree.entries) == len(objects)
    for entry, event in zip(tree.entries, objects, strict=True):
        match event:
            case DirectoryStart():
                assert entry.kind is EntryKind.DIRECTORY
                assert (entry.size, entry.target, entry.offset) == (0, b"", 0)
            case RegularFile(_, size, executable, offset):
                assert entry.kind is EntryKind.REGULAR
                assert (entry.size, entry.executable, entry.offset) == (size, executable, offset)
            case Symlink(_, target):
                assert entry.kind is EntryKind.SYMLINK
                assert (entry.size, entry.target, entry.offset) == (len(target), target, 0)


@given(st.data())
def test_children_and_parents_agree(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    tree = build(data.draw(nar_events))
    assert tree.entries[0].parent == 0
    assert tree.path(0) == b""
    seen = [0]
    for index, entry in enumerate(tree.entries):
        children = list(tree.children(index))
        names = [tree.entries[child].name for child in children]
        assert names == sorted(names)
        assert entry.kind is EntryKind.DIRECTORY or not children
        for child, name in zip(children, names, strict=True):
            assert tree.entries[child].parent == index
            assert tree.child(index, name) == child
            assert tree.path(child) == (tree.path(index) + b"/" + name).lstrip(b"/")
            assert tree.child(index, name + b"\xff") not in children or name + b"\xff" in names
        seen += children
    assert sorted(seen) == list(range(len(tree)))


def test_tree_is_that_of_the_directory(
    package: Path, walk: Callable[[Path], Iterator[NarEvent]]
) -> None:
    tree = build(walk(package))
    expected = []
    for directory, _, _ in os.walk(os.fsencode(package)):
        with os.scandir(directory) as entries:
            expected += [os.path.relpath(entry.path, os.fsencode(package)) for entry in entries]
    assert [tree.path(i) for i in range(1, len(tree))] == sorted(
        expected, key=lambda path: path.split(b"/")
    )
    for index in range(1, len(tree)):
        path = package / os.fsdecode(tree.path(index))
        if path.is_symlink():
            assert tree.link_target(index) == os.fsencode(path.readlink())
        else:
            assert tree.link_target(index) == b""
            assert (tree.kind(index) is EntryKind.DIRECTORY) == path.is_dir()


@given(st.data())
def test_files_are_told_without_their_names(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    tree = build(data.draw(nar_events))
    regular = [entry for entry in tree.entries if entry.kind is EntryKind.REGULAR]
    assert list(tree.files()) == [(entry.offset, entry.size) for entry in regular]


@pytest.mark.parametrize(
    ("file", "may_have"),
    [
        (RegularFile(b"module.py", 0, False, 0), False),
        (RegularFile(b"tool", 0, True, 0), True),
        (RegularFile(b"libc.so.6", 0, False, 0), True),
    ],
)
def test_a_program_is_known_by_its_mode_and_a_library_by_its_name(
    file: RegularFile, may_have: bool
) -> None:
    tree = build([DirectoryStart(b""), file, DirectoryEnd(), NarEnd()])
    assert tree.may_have_programs is may_have


def test_entries_are_a_sequence() -> None:
    tree = build([DirectoryStart(b""), Symlink(b"a", b"x"), DirectoryEnd(), NarEnd()])
    link = Entry(EntryKind.SYMLINK, b"a", 0, 1, False, b"x", 0)
    assert tree.entries[-1] == tree.entries[1] == link
    assert tree.entries[1:] == [link]
    with pytest.raises(IndexError):
        tree.entries[2]
    with pytest.raises(IndexError):
        tree.entries[-3]
    assert tree.child(0, b"b") is None
    assert tree.child(1, b"a") is None


def test_a_large_tree_is_compact() -> None:
    def events() -> Iterator[NarEvent]:
        yield DirectoryStart(b"")
        for i in range(20_000):
            yield RegularFile(b"file-%06d" % i, i, False, i)
            yield FileEnd()
        yield DirectoryEnd()
        yield NarEnd()

    tree = build(events())
    columns = tree._columns
    size = sum(sys.getsizeof(getattr(columns, name)) for name in columns.__slots__)
    assert size / len(tree) < 64


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([DirectoryStart(b""), DirectoryEnd()], "before its end"),
        ([DirectoryStart(b""), Symlink(b"b", b"x"), Symlink(b"a", b"x")], "'a' comes after 'b'"),
        ([DirectoryStart(b""), Symlink(b"a", b"x"), Symlink(b"a", b"x")], "'a' comes after 'a'"),
        ([Symlink(b"", b"x"), Symlink(b"a", b"x")], "'a' comes after the end of the root"),
    ],
)
def test_what_is_no_archive_makes_no_tree(events: list[NarEvent], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        build(events)
