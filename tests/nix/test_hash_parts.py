from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fusesnap.nix.hash_parts import HashPartScanner, Occurrence, blanked, with_hash_parts

OWN = "0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx"
OTHER = "1111111111111111111111111111111x"
PARTS = (OWN, OTHER)


def scan(pieces: Iterable[bytes]) -> list[Occurrence]:
    scanner = HashPartScanner(PARTS)
    return [found for piece in pieces for found in scanner.feed(piece)]


def test_hash_parts_are_found_wherever_they_stand() -> None:
    text = f"/nix/store/{OWN}-a\0{OTHER}{OWN}zz{OTHER[:-1]} {OTHER}".encode()
    assert scan([text]) == [
        Occurrence(11, 0),
        Occurrence(46, 1),
        Occurrence(78, 0),
        Occurrence(len(text) - 32, 1),
    ]


@given(
    st.lists(st.sampled_from([OWN, OTHER, OWN[:5], "0", "e", "/"]), max_size=20),
    st.lists(st.integers(0, 700), max_size=8),
)
def test_pieces_do_not_show(words: list[str], places: list[int]) -> None:
    data = "".join(words).encode()
    edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges)]
    found = scan(pieces)
    assert found == scan([data])
    for occurrence in found:
        text = data[occurrence.position : occurrence.end].decode()
        assert text == PARTS[occurrence.which]


@given(st.integers(0, 100), st.integers(0, 100))
def test_what_is_blanked_is_filled_in_again(start: int, size: int) -> None:
    whole = f"before {OWN} between {OTHER}/bin".encode()
    found = scan([whole])
    data = whole[start : start + size]
    inside = [f for f in found if f.position < start + len(data) and f.end > start]
    blank = blanked(data, start, inside)
    assert len(blank) == len(data)
    assert blank == blanked(whole, 0, found)[start : start + size]
    assert with_hash_parts(blank, start, inside, PARTS) == data
