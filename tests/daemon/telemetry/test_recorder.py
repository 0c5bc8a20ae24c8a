"""What becomes of events: records with times, a picture of the bytes, and who waited in which container."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusesnap.daemon.telemetry.journal import Batch
from fusesnap.daemon.telemetry.recorder import UNWRITTEN, Recorder
from fusesnap.daemon.telemetry.records import HERE, Attempt, FetchRecord, Phase, Step, WaitRecord
from fusesnap.daemon.telemetry.under_way import MARKS, STEPS
from fusesnap.errors import Unavailable
from fusesnap.fetch.events import (
    Asked,
    Boarded,
    FetchEvent,
    InLine,
    Landed,
    Paused,
    Rebuilt,
    Received,
    Resumed,
    TransferBegun,
    Verifying,
)
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.priority import Priority
from fusesnap.filesystem.wait_events import Answered, Blocked, Question
from fusesnap.nix.store_path import StorePath

PATH = StorePath("0" * 32, "redis")
CACHE = "http://cache"
UPPERS = {7: "/s/1/fs", 8: None, 9: "/s/2/fs"}


class Bench:
    """A recorder with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.recorder = Recorder("one", lambda: self.now, UPPERS.get)

    def fetch_all_of(self, path: StorePath, sizes: list[int]) -> None:
        self.recorder.fetch(Asked(path, Priority.TRACE))
        for event in (Boarded(path), TransferBegun(path, CACHE, sum(sizes))):
            self.now += 1
            self.recorder.fetch(event)
        for size in sizes:
            self.now += 1
            self.recorder.fetch(Received(path, CACHE, size))
        for last in (Verifying(path), Landed(path)):
            self.now += 1
            self.recorder.fetch(last)

    def taken(self) -> Batch:
        batch = Batch()
        self.recorder.take(batch)
        return batch


def blocked(number: int, *pids: int, asked: bool = True) -> Blocked:
    question = Question("read", PATH, 1, b"bin/redis", pids[-1] if asked else None)
    return Blocked(number, question, tuple(Reader(pid, f"program-{pid}") for pid in pids))


def test_a_fetch_becomes_a_record_of_its_phases() -> None:
    bench = Bench()
    bench.fetch_all_of(PATH, [10, 20])
    assert bench.taken().fetches == [
        FetchRecord(
            session="one",
            number=1,
            path=PATH.base_name,
            priority="trace",
            asked=100,
            steps=(
                Step(100, Phase.QUEUED),
                Step(101, Phase.ASKING),
                Step(103, Phase.TRANSFER),
                Step(105, Phase.VERIFY),
            ),
            landed=106,
            expected=30,
            received=30,
            attempts=(Attempt(102, CACHE),),
            marks=((103, 10), (104, 30)),
        )
    ]
    assert not bench.taken()


def test_what_is_under_way_is_there_too_and_again_when_it_has_changed() -> None:
    bench = Bench()
    bench.recorder.fetch(Asked(PATH, Priority.READER))
    (begun,) = bench.taken().fetches
    assert begun.landed is None
    bench.recorder.fetch(Landed(PATH, Unavailable("down")))
    (ended,) = bench.taken().fetches
    assert (ended.number, ended.landed, ended.error) == (begun.number, 100, "down")


def test_a_transfer_that_is_begun_again_counts_what_was_kept() -> None:
    bench = Bench()
    bench.recorder.fetch(Asked(PATH, Priority.READER))
    bench.recorder.fetch(TransferBegun(PATH, "http://bad", 100))
    bench.recorder.fetch(Received(PATH, "http://bad", 40))
    bench.recorder.fetch(TransferBegun(PATH, CACHE, 100, kept=40))
    bench.recorder.fetch(Received(PATH, CACHE, 60))
    (record,) = bench.taken().fetches
    assert record.received == 100
    assert record.attempts == (Attempt(100, "http://bad"), Attempt(100, CACHE, 40))


def test_a_transfer_that_gives_way_is_paused_until_its_turn_comes_again() -> None:
    bench = Bench()
    bench.recorder.fetch(Asked(PATH, Priority.COMPLETION))
    steps: list[FetchEvent] = [
        Boarded(PATH),
        InLine(PATH),
        TransferBegun(PATH, CACHE, 100),
        Received(PATH, CACHE, 30),
        Paused(PATH),
        Received(PATH, CACHE, 10),  # was under way
        Resumed(PATH),
        TransferBegun(PATH, CACHE, 100, kept=40),
        Received(PATH, CACHE, 60),
        Verifying(PATH),
        Landed(PATH),
    ]
    for step in steps:
        bench.now += 1
        bench.recorder.fetch(step)
    (record,) = bench.taken().fetches
    assert [(step.at - 100, step.phase) for step in record.steps] == [
        (0, Phase.QUEUED),
        (1, Phase.ASKING),
        (2, Phase.QUEUED),
        (3, Phase.ASKING),
        (4, Phase.TRANSFER),
        (5, Phase.PAUSED),
        (7, Phase.ASKING),
        (9, Phase.TRANSFER),
        (10, Phase.VERIFY),
    ]
    assert record.received == 100


def test_parts_of_a_path_are_records_of_their_own() -> None:
    bench = Bench()
    for part in ((0, 10), (10, 30)):
        bench.recorder.fetch(Asked(PATH, Priority.READER, part))
    bench.recorder.fetch(TransferBegun(PATH, CACHE, 20, part=(10, 30)))
    bench.recorder.fetch(Received(PATH, CACHE, 20, (10, 30)))
    bench.recorder.fetch(Landed(PATH, None, (10, 30)))
    bench.recorder.fetch(Landed(PATH, Unavailable("down"), (0, 10)))
    assert [(each.part, each.received, each.error) for each in bench.taken().fetches] == [
        ((0, 10), 0, "down"),
        ((10, 30), 20, None),
    ]


def test_steps_stay_few_and_end_with_the_last() -> None:
    bench = Bench()
    bench.recorder.fetch(Asked(PATH, Priority.COMPLETION))
    for _ in range(STEPS):
        bench.recorder.fetch(Paused(PATH))
        bench.recorder.fetch(Resumed(PATH))
    bench.recorder.fetch(Verifying(PATH))
    (record,) = bench.taken().fetches
    assert len(record.steps) == STEPS
    assert record.steps[-1].phase is Phase.VERIFY


def test_a_picture_of_many_bytes_stays_small_and_ends_where_they_do() -> None:
    bench = Bench()
    bench.fetch_all_of(PATH, [1] * 5000)
    (record,) = bench.taken().fetches
    assert MARKS // 4 <= len(record.marks) <= MARKS
    assert record.received_at(record.landed or 0) == 5000
    middle = (record.attempts[0].at + record.last_byte) / 2
    assert abs(record.received_at(middle) - 2500) < 200


@given(st.lists(st.integers(min_value=1, max_value=10**6), min_size=1, max_size=200))
def test_bytes_never_go_back_in_time(sizes: list[int]) -> None:
    bench = Bench()
    bench.fetch_all_of(PATH, sizes)
    (record,) = bench.taken().fetches
    seen = [record.received_at(99 + step / 4) for step in range(4 * (len(sizes) + 10))]
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, sum(sizes))


def test_a_wait_knows_its_container_its_process_and_its_file() -> None:
    bench = Bench()
    bench.recorder.wait(blocked(1, 7))
    bench.now = 103
    bench.recorder.wait(Answered(1))
    assert bench.taken().waits == [
        WaitRecord(
            "one",
            1,
            "/s/1/fs",
            7,
            "program-7",
            asked=True,
            operation="read",
            path=PATH.base_name,
            file="bin/redis",
            began=100,
            ended=103,
        )
    ]


def test_of_several_openers_the_last_one_in_a_container_is_probable() -> None:
    bench = Bench()
    bench.recorder.wait(blocked(1, 9, 7, 8, asked=False))
    bench.recorder.wait(blocked(2, 8, asked=False))
    bench.recorder.wait(Blocked(3, Question("read", PATH, 1), ()))
    first, second, third = bench.taken().waits
    assert (first.pid, first.upper, first.asked) == (7, "/s/1/fs", False)
    assert (second.pid, second.upper) == (8, None)
    assert (third.pid, third.upper, third.command) == (None, None, "")


def test_how_a_wait_ends_is_kept() -> None:
    bench = Bench()
    for number, event in enumerate(
        (Answered(0, Unavailable("x" * 9999)), Answered(1, cancelled=True))
    ):
        bench.recorder.wait(blocked(number, 7))
        bench.recorder.wait(event)
    failed, stopped = bench.taken().waits
    assert failed.error == "x" * 500
    assert "stopped" in (stopped.error or "")


def test_what_cannot_be_written_is_kept_within_bounds_the_newest() -> None:
    bench = Bench()
    for number in range(UNWRITTEN + 10):
        bench.recorder.wait(blocked(number, 7))
        bench.recorder.wait(Answered(number))
        bench.fetch_all_of(PATH, [1])
    batch = bench.taken()
    assert (len(batch.waits), len(batch.fetches)) == (UNWRITTEN, UNWRITTEN)
    assert (batch.waits[-1].number, batch.fetches[-1].number) == (UNWRITTEN + 9, UNWRITTEN + 10)


def test_a_batch_that_is_given_back_comes_again_without_undoing_what_is_newer() -> None:
    bench = Bench()
    bench.recorder.fetch(Asked(PATH, Priority.READER))
    bench.recorder.wait(blocked(1, 7))
    batch = bench.taken()
    bench.recorder.fetch(Landed(PATH))
    bench.recorder.give_back(batch)
    again = bench.taken()
    assert [each.landed for each in again.fetches] == [100]
    assert again.waits == batch.waits


def test_what_was_made_of_other_paths_is_a_record_that_is_over_at_once() -> None:
    bench = Bench()
    bench.recorder.fetch(Asked(PATH, Priority.READER, (0, 50)))
    bench.recorder.fetch(Rebuilt(PATH, Priority.READER, 40, (0, 50)))
    _, made = bench.taken().fetches
    assert (made.landed, made.received, made.part) == (100, 40, (0, 50))
    assert made.attempts == (Attempt(100, HERE),)
    bench.recorder.fetch(
        Landed(PATH, part=(0, 50))
    )  # the request of the same part is another thing
    (fetched,) = bench.taken().fetches
    assert (fetched.number, fetched.attempts) == (1, ())
