from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import NarEnd, nar_bytes
from fusesnap.nix.tree import EntryKind
from fusesnap.publish.chunking import Chunker

from ..store.conftest import Tree, tree_events

SIZE = 1000
_names = st.text("abcdefgh", min_size=1, max_size=6)
_trees: st.SearchStrategy[Tree] = st.recursive(
    st.integers(0, 4500).map(lambda size: random.Random(size).randbytes(size))  # noqa: S311
    | st.just("target"),
    lambda inner: st.dictionaries(_names, inner, max_size=6),
    max_leaves=20,
)


def nar_of(tree: Tree) -> bytes:
    return b"".join(nar_bytes([*tree_events(tree), NarEnd()]))


def pieces_of(nar: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(nar), size):
        yield nar[start : start + size]


@given(_trees, st.integers(1, 5000))
def test_chunks_make_the_nar_and_are_not_too_large(tree: Tree, piece: int) -> None:
    nar = nar_of(tree)
    chunker = Chunker(SIZE)
    chunks = list(chunker.chunks(pieces_of(nar, piece)))
    assert b"".join(chunks) == nar
    assert all(0 < len(chunk) <= SIZE + 512 for chunk in chunks)
    assert chunks == list(Chunker(SIZE).chunks([nar]))


@given(_trees)
def test_large_files_begin_chunks_and_small_ones_are_whole(tree: Tree) -> None:
    chunker = Chunker(SIZE)
    chunks = list(chunker.chunks([nar_of(tree)]))
    starts = list(accumulate((len(chunk) for chunk in chunks), initial=0))
    for entry in chunker.tree().entries:
        if entry.kind is not EntryKind.REGULAR or not entry.size:
            continue
        end = entry.offset + entry.size
        inside = [start for start in starts if entry.offset < start < end]
        if entry.size > SIZE:
            assert entry.offset in starts
            assert inside == list(range(entry.offset + SIZE, end, SIZE))
        else:
            assert inside == []


def test_small_files_share_chunks() -> None:
    tree: Tree = {f"{i:03}": b"x" * 50 for i in range(100)}
    chunks = list(Chunker(SIZE).chunks([nar_of(tree)]))
    whole = sum(map(len, chunks))
    assert whole / SIZE <= len(chunks) < whole / SIZE * 1.5


def test_a_tree_without_files_is_cut_too() -> None:
    tree: Tree = {f"{i:03}": "target" * 20 for i in range(100)}
    chunks = list(Chunker(SIZE).chunks([nar_of(tree)]))
    assert all(len(chunk) <= SIZE + 512 for chunk in chunks)


def test_a_file_that_is_the_same_has_the_same_chunks_wherever_it_is() -> None:
    large = random.Random(3).randbytes(3500)  # noqa: S311
    one = Chunker(SIZE).chunks([nar_of({"a": b"x" * 10, "large": large})])
    other = Chunker(SIZE).chunks([nar_of({"bb": b"x" * 777, "large": large, "z": b"1"})])
    assert len(set(one) & set(other)) == 3


@pytest.mark.parametrize("wrong", [b"no NAR", nar_of(b"x")[:-1], nar_of(b"x") + b"x"])
def test_what_is_no_nar_is_refused(wrong: bytes) -> None:
    with pytest.raises(InvalidData):
        list(Chunker(SIZE).chunks([wrong]))


def test_cuts_come_in_order() -> None:
    tree: Tree = {"a": b"x" * 5000, "b": b"", "c": {"d": b"y" * 999, "e": b"z" * 2001}}
    starts = list(accumulate(map(len, Chunker(SIZE).chunks([nar_of(tree)]))))
    assert all(one < other for one, other in pairwise(starts))
