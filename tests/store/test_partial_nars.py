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
from fusesnap.store.partial_nars import PartialNar, PartialNars, remove_unwanted
from fusesnap.store.state_database import Pin

from .conftest import make_path, path_named

BOOT, NEXT_BOOT = UUID(int=1), UUID(int=2)
SIZES = (100, 1, 4096, 70)
NAR = bytes(i % 251 for i in range(sum(SIZES)))
INDEX = b"an index"
PATH = path_named("partial")


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
        put(PartialNars.in_state(state, BOOT).open(pin(), INDEX, table()), 0, 2, 1)
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
        partial.close()
        if ended:
            assert (found, steps > 8) == ([0, 1, 2], True)
            break
    else:
        pytest.fail("it never came to its end")
