"""Inode numbers say everything, and nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.filesystem.inode import MAX_ENTRY, MAX_ORDINAL, MAX_VIEW, Inode, InodeKind

INODES = st.builds(
    Inode,
    kind=st.sampled_from(InodeKind),
    entry=st.integers(0, MAX_ENTRY),
    ordinal=st.integers(0, MAX_ORDINAL),
    view=st.integers(0, MAX_VIEW),
)


@given(INODES)
def test_a_number_gives_back_its_parts(inode: Inode) -> None:
    assert Inode.parse(inode.number) == inode


@given(INODES, INODES)
def test_different_inodes_have_different_numbers(one: Inode, other: Inode) -> None:
    assert (one == other) == (one.number == other.number)


@given(INODES)
def test_the_sign_bit_stays_clear(inode: Inode) -> None:
    assert 0 <= inode.number < 2**63


def test_the_fuse_root_is_one_of_ours() -> None:
    assert Inode.parse(1) == Inode(InodeKind.FIXED, 1)


@pytest.mark.parametrize(
    "inode",
    [
        Inode(InodeKind.STORE, MAX_ENTRY + 1),
        Inode(InodeKind.STORE, 0, MAX_ORDINAL + 1),
        Inode(InodeKind.STORE, 0, 0, MAX_VIEW + 1),
    ],
)
def test_a_part_that_does_not_fit_is_refused_and_never_spills(inode: Inode) -> None:
    with pytest.raises(InvalidData, match="an inode holds at most"):
        _ = inode.number
