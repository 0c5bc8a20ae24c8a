from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusesnap.nix.nar import NarEvent, nar_bytes
from fusesnap.nix.nar_layout import Contents, NarLayout

from .trees import tree_of


@given(st.data())
def test_any_range_of_any_nar_is_made_of_its_tree_and_contents(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = b"".join(nar_bytes(data.draw(nar_events)))
    tree = tree_of(nar)
    layout = NarLayout(tree)
    assert layout.nar_size == len(nar)
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(nar)), st.integers(0, len(nar)))))
    for first, last in ((start, end), (0, len(nar)), (start, start + 1)):
        pieces = list(layout.range(first, min(last, len(nar))))
        assert all(piece.size if isinstance(piece, Contents) else piece for piece in pieces)
        made = b""
        for piece in pieces:
            if isinstance(piece, Contents):
                place = tree.entries[piece.entry].offset + piece.offset
                made += nar[place : place + piece.size]
            else:
                made += piece
        assert made == nar[first:last]


def test_contents_are_never_taken_for_what_is_known(
    nar_events: st.SearchStrategy[list[NarEvent]],
) -> None:
    """All bytes of files, and nothing else, are asked for."""

    @given(nar_events)
    def check(events: list[NarEvent]) -> None:
        nar = b"".join(nar_bytes(events))
        tree = tree_of(nar)
        asked = [p for p in NarLayout(tree).range(0, len(nar)) if isinstance(p, Contents)]
        files = [(n, e.size) for n, e in enumerate(tree.entries) if e.offset and e.size]
        assert [(each.entry, each.size) for each in asked] == files

    check()
