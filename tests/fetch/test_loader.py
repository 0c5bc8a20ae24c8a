"""Following what was opened, as ld.so does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusesnap.fetch.loader import resolve
from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileEnd,
    NarEnd,
    NarEvent,
    RegularFile,
    Symlink,
)
from fusesnap.nix.tree import Tree, TreeBuilder


def events() -> Iterator[NarEvent]:
    yield DirectoryStart(b"")
    yield Symlink(b"absolute", b"/nix/store/other")
    yield DirectoryStart(b"lib")
    yield RegularFile(b"libx.so.1.2", 0, False, 0)
    yield FileEnd()
    yield Symlink(b"libx.so", b"libx.so.1")
    yield Symlink(b"libx.so.1", b"./libx.so.1.2")
    yield Symlink(b"loop", b"loop")
    yield Symlink(b"out", b"../../other/lib")
    yield Symlink(b"up", b"../lib")
    yield DirectoryEnd()
    yield DirectoryEnd()
    yield NarEnd()


@pytest.fixture
def tree() -> Tree:
    builder = TreeBuilder()
    for event in sorted_within_directories(list(events())):
        builder.receive(event)
    return builder.tree()


def sorted_within_directories(listed: list[NarEvent]) -> list[NarEvent]:
    """lib's names in NAR order: by their bytes."""
    start, end = listed.index(DirectoryStart(b"lib")) + 1, listed.index(DirectoryEnd())
    links = [event for event in listed[start:end] if isinstance(event, Symlink)]
    file: list[NarEvent] = [event for event in listed[start:end] if not isinstance(event, Symlink)]
    groups: list[tuple[bytes, list[NarEvent]]] = [(link.name, [link]) for link in links]
    groups.append((b"libx.so.1.2", file))
    inner = [event for _, group in sorted(groups, key=lambda pair: pair[0]) for event in group]
    return [*listed[:start], *inner, *listed[end:]]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], b""),
        ([b"lib"], b"lib"),
        ([b"lib", b"libx.so.1.2"], b"lib/libx.so.1.2"),
        ([b"lib", b"libx.so"], b"lib/libx.so.1.2"),
        ([b"lib", b"up", b"up", b"libx.so"], b"lib/libx.so.1.2"),
        ([b"lib", b"..", b"lib"], b"lib"),
        ([b"lib", b"none"], None),
        ([b"lib", b"libx.so.1.2", b"below"], None),
        ([b"lib", b"loop"], None),
        ([b"lib", b"out"], None),
        ([b".."], None),
        ([b"absolute"], None),
    ],
)
def test_links_within_a_path_are_followed_and_no_others(
    tree: Tree, names: list[bytes], found: bytes | None
) -> None:
    index = resolve(tree, names)
    assert (None if index is None else tree.path(index)) == found
