from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import StorageFailure
from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.store.partial_nars import Extent, PartialNar, PartialNars, remove_unwanted
from fusesnap.store.state_database import Pin

from .conftest import make_path, path_named

BOOT, NEXT_BOOT = UUID(int=1), UUID(int=2)
SIZES = (100, 1, 4096, 70)
NAR = bytes(i % 251 for i in range(sum(SIZES)))
INDEX = b"an index"
PATH = path_named("partial")
EXTENTS = [(4200, 4220), (4230, 4260)]  # of the last chunk


def table(nar: bytes = NAR) -> ChunkTable:
    edges = [sum(SIZES[:n]) for n in range(len(SIZES) + 1)]
    digests = [hashlib.sha256(nar[a:b]).digest() for a, b in pairwise(edges)]
    return ChunkTable(SIZES, SIZES, b"".join(digests))


def pin(nar_hash: bytes = b"\1" * 32) -> Pin:
    info, _ = make_path("partial")
    changed = {"nar_hash": Hash(HashAlgorithm.SHA256, nar_hash), "nar_size": len(NAR)}
    return Pin(1, type(info)(**{**{f: getattr(info, f) for f in info.__slots__}, **changed}))


def put(partial: PartialNar, *numbers: int) -> None:
    for number in numbers:
        chunk = table()[number]
        partial.write(chunk, NAR[chunk.start : chunk.end])
        partial.note(number)


def put_extents(partial: PartialNar, *ranges: tuple[int, int]) -> None:
    for start, end in ranges:
        extent = Extent(start, end - start, hashlib.sha256(NAR[start:end]).digest())
        partial.write_extent(extent, NAR[start:end])
        partial.note_extent(extent)


@pytest.fixture
def partials(tmp_path: Path) -> PartialNars:
    return PartialNars.in_state(tmp_path, BOOT)


def test_what_is_written_is_there_for_the_next_owner(partials: PartialNars, tmp_path: Path) -> None:
    first = partials.open(pin(), INDEX, table())
    assert first.is_empty
    put(first, 1, 2)
    assert first.missing(range(4)) == [0, 3]
    assert first.size == 4097
    first.close()
    again = PartialNars.in_state(tmp_path, BOOT).open(pin(), INDEX, table())
    assert [again.has(number) for number in range(4)] == [False, True, True, False]
    assert again.read(100, 4097) == NAR[100:4197]
    put(again, 0, 3)
    assert again.is_complete
    assert again.read(0, len(NAR)) == NAR
    assert partials.index(PATH) == INDEX
    again.close()


def test_extents_and_chunks_fill_each_others_gaps(partials: PartialNars, tmp_path: Path) -> None:
    first = partials.open(pin(), INDEX, table())
    put_extents(first, (50, 100), (110, 200), (4190, len(NAR)))
    put(first, 1)
    assert first.gaps(0, len(NAR)) == [(0, 50), (101, 110), (200, 4190)]
    assert first.gaps(60, 101) == first.gaps(110, 200) == []
    assert [chunk.number for chunk in first.made_of_extents()] == [3]
    first.close()
    again = PartialNars.in_state(tmp_path, BOOT).open(pin(), INDEX, table())
    assert again.gaps(0, len(NAR)) == [(0, 50), (101, 110), (200, 4190)]
    assert again.read(110, 90) == NAR[110:200]
    put_extents(again, (0, 50))  # behind those that are there
    assert again.adopt(table()[0])
    again.note(0)
    again.close()
    third = PartialNars.in_state(tmp_path, BOOT).open(pin(), INDEX, table())
    assert third.has(0)
    assert third.gaps(0, 200) == [(101, 110)]
    third.close()


def test_a_chunk_that_extents_do_not_make_is_not_adopted(partials: PartialNars) -> None:
    partial = partials.open(pin(), INDEX, table(bytes(len(NAR))))
    put_extents(partial, (0, 100))
    (chunk,) = partial.made_of_extents()
    assert not partial.adopt(chunk)
    partial.close()


def test_after_a_loss_of_power_only_extents_that_hash_right_count(tmp_path: Path) -> None:
    first = PartialNars.in_state(tmp_path, BOOT).open(pin(), INDEX, table())
    put_extents(first, (110, 300), (500, 600), (1000, 1100))
    first.close()
    with (tmp_path / "partial" / f"{PATH}.nar").open("r+b") as file:
        file.seek(550)
        file.write(b"lost")
    for _ in range(2):
        again = PartialNars.in_state(tmp_path, NEXT_BOOT).open(pin(), INDEX, table())
        assert again.gaps(110, 1100) == [(300, 1000)]
        again.close()


def test_a_record_that_was_not_written_to_its_end_says_nothing(
    partials: PartialNars, tmp_path: Path
) -> None:
    first = partials.open(pin(), INDEX, table())
    put_extents(first, (0, 50))
    first.close()
    file = tmp_path / "partial" / f"{PATH}.map"
    good = file.read_bytes()
    record = len(good) - 96 - len(SIZES)
    for cut in range(record):
        for torn in (
            good[:-record] + good[-record:][:cut],
            good[:-record] + good[-record:][:cut].ljust(record, b"\0"),
        ):
            file.write_bytes(torn)
            again = partials.open(pin(), INDEX, table())
            assert again.gaps(0, 50) == [(0, 50)]
            put_extents(again, (60, 70))  # which must not be taken for its end
            again.close()
            once_more = partials.open(pin(), INDEX, table())
            assert once_more.gaps(0, 100) == [(0, 60), (70, 100)]
            once_more.close()


def test_a_hole_takes_no_room(partials: PartialNars, tmp_path: Path) -> None:
    size = 1 << 20
    large = ChunkTable([size] * 64, [9] * 64, bytes(64 * 32))
    partials.open(pin(), INDEX, large).close()
    status = (tmp_path / "partial" / f"{PATH}.nar").stat()
    assert (status.st_size, status.st_blocks) == (64 * size, 0)


@pytest.mark.parametrize("boot", [BOOT, NEXT_BOOT])
def test_after_a_loss_of_power_only_what_hashes_right_counts(tmp_path: Path, boot: UUID) -> None:
    first = PartialNars.in_state(tmp_path, BOOT).open(pin(), INDEX, table())
    put(first, 0, 2, 3)
    first.close()
    with (tmp_path / "partial" / f"{PATH}.nar").open("r+b") as file:
        file.seek(200)
        file.write(b"lost")
    again = PartialNars.in_state(tmp_path, boot).open(pin(), INDEX, table())
    # In the same boot nothing can have been lost, and nobody but root may write there.
    assert again.has(2) is (boot == BOOT)
    assert again.has(0)
    again.close()
    third = PartialNars.in_state(tmp_path, boot).open(pin(), INDEX, table())
    assert third.has(2) is (boot == BOOT)
    third.close()


def test_another_nar_or_another_index_begins_anew(partials: PartialNars) -> None:
    for other, index in ((pin(b"\2" * 32), INDEX), (pin(b"\2" * 32), b"another index")):
        partial = partials.open(pin(), INDEX, table())
        put(partial, 0)
        partial.close()
        changed = partials.open(other, index, table())
        assert changed.is_empty
        assert changed.read(0, 100) == bytes(100)
        assert partials.index(PATH) == index
        changed.close()


@given(st.data())
def test_a_map_that_was_cut_or_damaged_says_nothing_wrong(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever becomes of the map, no chunk counts that is not there."""
    directory = tmp_path_factory.mktemp("state")
    partials = PartialNars.in_state(directory, BOOT)
    partial = partials.open(pin(), INDEX, table())
    put(partial, 1)
    partial.close()
    file = directory / "partial" / f"{PATH}.map"
    good = file.read_bytes()
    cut = data.draw(st.integers(0, len(good) - 5))  # with at least one chunk's state missing
    file.write_bytes(good[:cut])
    again = partials.open(pin(), INDEX, table())
    assert again.is_empty
    again.close()


def test_two_processes_do_not_share_one(partials: PartialNars, tmp_path: Path) -> None:
    partial = partials.open(pin(), INDEX, table())
    with pytest.raises(StorageFailure, match="in use by another process"):
        partials.open(pin(), INDEX, table())
    assert remove_unwanted(tmp_path / "partial", lambda path: False) == []
    partial.close()
    partials.open(pin(), INDEX, table()).close()


def test_what_nobody_wants_is_removed(partials: PartialNars, tmp_path: Path) -> None:
    partials.open(pin(), INDEX, table()).close()
    (tmp_path / "partial" / "no store path.nar").touch()
    assert remove_unwanted(tmp_path / "partial", lambda path: True) == []
    assert remove_unwanted(tmp_path / "partial", lambda path: False) == [PATH]
    assert os.listdir(tmp_path / "partial") == ["no store path.nar"]
    assert partials.index(PATH) is None


def test_a_full_disk_is_told(partials: PartialNars, tmp_path: Path) -> None:
    (tmp_path / "partial" / f"{PATH}.nar").mkdir()
    with pytest.raises(StorageFailure):
        partials.open(pin(), INDEX, table())


def killed_after(state: Path, steps: int) -> bool:
    """Open and fill one in a process that is killed before its step of that number; whether it came to its end."""
    child = os.fork()
    if child == 0:
        left = steps

        def step(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        for name in ("pwrite", "ftruncate", "open", "rename"):
            setattr(os, name, step(getattr(os, name)))
        partial = PartialNars.in_state(state, BOOT).open(pin(), INDEX, table())
        put(partial, 0, 2, 1)
        put_extents(partial, *EXTENTS)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_killed_before_any_step_nothing_wrong_is_believed(tmp_path: Path) -> None:
    for steps in range(40):
        state = tmp_path / str(steps)
        ended = killed_after(state, steps)
        partial = PartialNars.in_state(state, BOOT).open(pin(), INDEX, table())
        for chunk in table():
            if partial.has(chunk.number):
                assert partial.read(chunk.start, chunk.size) == NAR[chunk.start : chunk.end]
        found = [number for number in range(4) if partial.has(number)]
        assert found in ([], [0], [0, 2], [0, 1, 2])
        extents = [(start, end) for start, end in EXTENTS if not partial.gaps(start, end)]
        assert all(partial.read(start, end - start) == NAR[start:end] for start, end in extents)
        partial.close()
        if ended:
            assert (found, extents, steps > 12) == ([0, 1, 2], EXTENTS, True)
            break
    else:
        pytest.fail("it never came to its end")
