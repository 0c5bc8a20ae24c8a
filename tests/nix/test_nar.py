from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import (
    NEED_DATA,
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    NarParser,
    NeedData,
    RegularFile,
    Symlink,
    nar_bytes,
)
from fusesnap.nix.nar_grammar import NarLimits

PIECE = 64 * 1024


def parse(pieces: Iterable[bytes], limits: NarLimits | None = None) -> Iterator[NarEvent]:
    """Feed a parser and give its events; contents are joined so that the cut does not show."""
    parser = NarParser(limits) if limits else NarParser()
    contents: list[bytes] = []
    for piece in pieces:
        parser.receive_data(piece)
        while not isinstance(event := parser.next_event(), NeedData):
            if isinstance(event, FileData):
                contents.append(event.data)
                continue
            if contents:
                yield FileData(b"".join(contents))
                contents.clear()
            yield event
    parser.close()
    assert parser.at_end


def without_offsets(events: Iterable[NarEvent]) -> list[NarEvent]:
    return [replace(e, offset=0) if isinstance(e, RegularFile) else e for e in events]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.data())
def test_what_is_written_is_read_however_it_is_cut(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    events = data.draw(nar_events)
    nar = b"".join(nar_bytes(events))
    pieces = cut(nar, data.draw(st.lists(st.integers(0, len(nar)), max_size=12)))
    read = list(parse(pieces))
    assert without_offsets(read) == events
    assert b"".join(nar_bytes(read)) == nar


@given(st.data())
def test_bytes_may_come_one_by_one_or_all_before_the_first_question(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = b"".join(nar_bytes(data.draw(nar_events)))
    expected = list(parse([nar]))
    assert list(parse(nar[i : i + 1] for i in range(len(nar)))) == expected
    parser = NarParser()
    for i in range(0, len(nar), 3):
        parser.receive_data(nar[i : i + 3])
    kinds = []
    while not isinstance(event := parser.next_event(), NeedData):
        kinds.append(event)
    assert [e for e in kinds if not isinstance(e, FileData)] == [
        e for e in expected if not isinstance(e, FileData)
    ]


@given(st.data())
def test_offsets_say_where_contents_are(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = b"".join(nar_bytes(data.draw(nar_events)))
    events = list(parse([nar]))
    for event, following in pairwise(events):
        if isinstance(event, RegularFile):
            contents = following.data if isinstance(following, FileData) else b""
            assert nar[event.offset : event.offset + event.size] == contents


@given(st.data())
def test_every_cut_short_archive_is_refused(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = b"".join(nar_bytes(data.draw(nar_events)))
    length = data.draw(st.integers(0, len(nar) - 1))
    with pytest.raises(InvalidData, match=f"^NAR: cut short at byte {length}"):
        list(parse([nar[:length]]))


@given(st.data())
def test_a_flipped_bit_is_refused_or_changes_the_events(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = bytearray(b"".join(nar_bytes(data.draw(nar_events))))
    before = list(parse([bytes(nar)]))
    bit = data.draw(st.integers(0, len(nar) * 8 - 1))
    nar[bit // 8] ^= 1 << bit % 8
    try:
        after = list(parse([bytes(nar)]))
    except InvalidData:
        return
    assert after != before
    assert b"".join(nar_bytes(after)) == nar


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(InvalidData, match=r"^NAR: "):
        list(parse([noise]))


def file_archive(size: int) -> list[NarEvent]:
    return [RegularFile(b"", size, False, 0), FileData(bytes(size)), FileEnd(), NarEnd()]


def test_contents_pass_through_uncopied() -> None:
    nar = b"".join(nar_bytes(file_archive(4 * PIECE)))
    parser = NarParser()
    parser.receive_data(nar[:100])
    while parser.next_event() is not NEED_DATA:
        pass
    piece = nar[100 : 100 + PIECE]
    parser.receive_data(piece)
    event = parser.next_event()
    assert isinstance(event, FileData)
    assert event.data is piece


def test_pieces_of_other_types_are_taken() -> None:
    nar = bytearray(b"".join(nar_bytes(file_archive(10))))
    parser = NarParser()
    parser.receive_data(nar)
    nar[:] = bytes(len(nar))
    assert isinstance(parser.next_event(), RegularFile)


def test_end_is_known_once_it_was_told() -> None:
    nar = b"".join(nar_bytes([Symlink(b"", b"x"), NarEnd()]))
    parser = NarParser()
    parser.receive_data(nar)
    assert parser.next_event() == Symlink(b"", b"x")
    assert not parser.at_end
    assert parser.next_event() == NarEnd()
    assert parser.at_end
    assert parser.offset == len(nar)
    assert parser.next_event() is NEED_DATA
    parser.close()


def test_closing_before_all_events_were_read_is_refused() -> None:
    parser = NarParser()
    parser.receive_data(b"".join(nar_bytes(file_archive(1))))
    with pytest.raises(InvalidData, match="closed before its events were read"):
        parser.close()


def test_an_error_comes_again() -> None:
    parser = NarParser()
    parser.receive_data(b"x" * 100)
    for _ in range(2):
        with pytest.raises(InvalidData, match="expected 'nix-archive-1'"):
            parser.next_event()


def nested(depth: int) -> list[NarEvent]:
    names = [b"", *[b"d"] * (depth - 1)]
    return [*map(DirectoryStart, names), *[DirectoryEnd()] * depth, NarEnd()]


def test_limits_are_exact() -> None:
    limits = NarLimits(max_depth=3, max_entries=4)
    assert len(list(parse(nar_bytes(nested(3)), limits))) == 7
    with pytest.raises(InvalidData, match="near 'd/d/d': nested deeper than 3 directories"):
        list(parse(nar_bytes(nested(4)), limits))
    links: list[NarEvent] = [Symlink(name, b"x") for name in (b"a", b"b", b"c", b"d")]
    few: list[NarEvent] = [DirectoryStart(b""), *links[:3], DirectoryEnd(), NarEnd()]
    assert len(list(parse(nar_bytes(few), limits))) == 6
    many: list[NarEvent] = [DirectoryStart(b""), *links, DirectoryEnd(), NarEnd()]
    with pytest.raises(InvalidData, match="near 'd': more than 4 entries"):
        list(parse(nar_bytes(many), limits))


def test_the_longest_names_and_targets_are_taken() -> None:
    events: list[NarEvent] = [
        DirectoryStart(b""),
        Symlink(b"n" * 255, b"t" * 4095),
        DirectoryEnd(),
        NarEnd(),
    ]
    nar = b"".join(nar_bytes(events))
    assert list(parse([nar])) == events
    assert list(parse(nar[i : i + 1] for i in range(len(nar)))) == events


START = DirectoryStart(b"")
FILE = RegularFile(b"", 2, False, 0)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "events end before the archive does"),
        ([START, DirectoryEnd()], "events end before the archive does"),
        ([DirectoryEnd()], "does not belong here"),
        ([NarEnd()], "does not belong here"),
        ([START, NarEnd()], "does not belong here"),
        ([FILE, NarEnd()], "does not belong here"),
        ([FILE, DirectoryEnd()], "does not belong here"),
        ([FILE, Symlink(b"a", b"b")], "entry 'a' does not belong here"),
        ([START, DirectoryEnd(), Symlink(b"a", b"b")], "entry 'a' does not belong here"),
        ([FileData(b"x")], "contents outside a file"),
        ([START, FileEnd()], "contents outside a file"),
        ([FILE, FileData(b"x"), FileEnd()], "file of 2 bytes has 1 too few"),
        ([FILE, FileData(b"xyz"), FileEnd()], "file of 2 bytes has 1 too many"),
        ([START, Symlink(b"b", b"x"), Symlink(b"a", b"x")], "name 'a' comes after 'b'"),
        ([START, Symlink(b"a", b"x"), Symlink(b"a", b"x")], "name 'a' comes twice"),
        ([START, Symlink(b"a/b", b"x")], "has a slash or a NUL"),
        ([START, Symlink(b"a", b"")], "target '' is empty"),
        ([START, Symlink(b"a", b"x" * 4096)], "4096 bytes, expected at most 4095"),
        ([START, Symlink(b"a" * 256, b"x")], "256 bytes, expected at most 255"),
    ],
)
def test_what_is_no_archive_is_not_written(events: list[NarEvent], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        list(nar_bytes(events))
