from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusesnap.store.byte_ranges import ByteRanges

MOST = 24
ranges = st.tuples(st.integers(0, MOST), st.integers(0, MOST))


@given(st.lists(st.tuples(st.booleans(), ranges)), ranges)
def test_it_is_a_set_of_bytes(
    changes: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]
) -> None:
    tested, expected = ByteRanges(), set[int]()
    for adds, (start, end) in changes:
        if adds:
            tested.add(start, end)
            expected |= set(range(start, end))
        else:
            tested.remove(start, end)
            expected -= set(range(start, end))
    found = list(tested)
    assert {byte for start, end in found for byte in range(start, end)} == expected
    # Apart from one another, in order, none empty.
    edges = [edge for each in found for edge in each]
    assert edges == sorted(set(edges))
    assert bool(tested) is bool(expected)
    gaps = list(tested.gaps(*asked))
    assert {byte for start, end in gaps for byte in range(start, end)} == set(
        range(*asked)
    ) - expected
    assert all(start < end for start, end in gaps)
