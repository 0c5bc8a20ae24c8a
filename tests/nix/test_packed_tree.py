from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import NarEvent, nar_bytes
from fusesnap.nix.nar_grammar import NarLimits
from fusesnap.nix.packed_tree import PackedTree, pack_tree, unpack_tree
from fusesnap.store.tree_reader import measured_tree

from .trees import tree_of


@given(st.data())
def test_a_tree_is_the_same_whether_it_comes_from_the_nar_or_was_packed(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = b"".join(nar_bytes(data.draw(nar_events)))
    tree = tree_of(nar)
    unpacked, nar_size = unpack_tree(pack_tree(tree))
    assert list(unpacked.entries) == list(tree.entries)
    assert nar_size == len(nar)


def test_nar_packed_tree_and_directory_number_their_entries_alike(
    package: Path, walk: Callable[[Path], Iterator[NarEvent]]
) -> None:
    nar = b"".join(nar_bytes(walk(package)))
    unpacked, nar_size = unpack_tree(pack_tree(tree_of(nar)))
    scanned, scanned_size = measured_tree(package)
    assert list(unpacked.entries) == list(tree_of(nar).entries) == list(scanned.entries)
    assert nar_size == len(nar) == scanned_size


DIRECTORY, FILE, LINK = b"\0", b"\1", b"\3"
SMALL = PackedTree(DIRECTORY + FILE + LINK, b"a\0b\0", [2], [5], b"a\0")


def named(*names: bytes) -> PackedTree:
    joined = b"".join(name + b"\0" for name in names)
    return PackedTree(DIRECTORY + FILE * len(names), joined, [len(names)], [0] * len(names), b"")


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (named(b"b", b"a"), "tree near 'b': name 'a' comes after 'b': not sorted"),
        (named(b"a", b"a"), "name 'a' comes twice"),
        (named(b"."), "name '.' is reserved"),
        (named(b".."), "name '..' is reserved"),
        (named(b"a/b"), "name 'a/b' has a slash or a NUL"),
        (named(b""), "empty name"),
        (named(b"x" * 256), "name of 256 bytes, expected at most 255"),
        (replace(SMALL, targets=b"\0"), "target '' is empty or has a NUL"),
        (
            replace(SMALL, targets=b"x" * 4096 + b"\0"),
            "target of 4096 bytes, expected at most 4095",
        ),
        (replace(SMALL, targets=b""), "too few targets"),
        (replace(SMALL, targets=b"a"), "the last of its targets is cut short"),
        (replace(SMALL, targets=b"a\0b\0"), "too many targets"),
        (replace(SMALL, names=b"a\0"), "too few names"),
        (replace(SMALL, names=b"a\0b"), "the last of its names is cut short"),
        (replace(SMALL, names=b"a\0b\0c\0"), "too many names"),
        (replace(SMALL, sizes=[]), "too few sizes of files"),
        (replace(SMALL, sizes=[1, 2]), "too many sizes of files"),
        (replace(SMALL, sizes=[2**63]), f"file of {2**63} bytes, expected at most {2**63 - 1}"),
        (replace(SMALL, children=[]), "too few counts of directories"),
        (replace(SMALL, children=[2, 0]), "too many counts of directories"),
        (replace(SMALL, children=[1]), "more entries follow the end of the root"),
        (replace(SMALL, children=[3]), "1 entries are missing"),
        (replace(SMALL, kinds=b""), "has no root"),
        (replace(SMALL, kinds=b"\0\4\3"), "kind is 4, expected 0 to 3"),
        (PackedTree(FILE * 2, b"a\0", [], [0, 0], b""), "more entries follow the end of the root"),
    ],
)
def test_what_no_nar_can_hold_is_refused(packed: PackedTree, said: str) -> None:
    with pytest.raises(InvalidData) as caught:
        unpack_tree(packed)
    assert said in str(caught.value)


@given(st.data())
def test_what_is_unpacked_is_what_a_nar_could_say(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    """However the columns are shuffled, what is not refused is the tree of a NAR, and is packed as it came."""
    packed = pack_tree(tree_of(b"".join(nar_bytes(data.draw(nar_events)))))
    changed = replace(
        packed,
        kinds=bytes(data.draw(st.permutations(packed.kinds))),
        names=_shuffled(data, packed.names),
        children=data.draw(st.permutations(packed.children)),
    )
    try:
        tree, _ = unpack_tree(changed)
    except InvalidData:
        return
    assert pack_tree(tree) == changed


def _shuffled(data: st.DataObject, texts: bytes) -> bytes:
    items: Iterable[bytes] = data.draw(st.permutations(texts.split(b"\0")[:-1]))
    return b"".join(item + b"\0" for item in items)


def test_limits_are_those_of_a_nar() -> None:
    deep = PackedTree(DIRECTORY * 513, b"d\0" * 512, [1] * 512 + [0], [], b"")
    with pytest.raises(InvalidData, match="nested deeper than 512 directories"):
        unpack_tree(deep)
    with pytest.raises(InvalidData, match="more than 2 entries"):
        unpack_tree(SMALL, NarLimits(max_entries=2))
