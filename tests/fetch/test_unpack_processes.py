"""Processes that unpack, and what becomes of a NAR when they die."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import trio
import trio.testing

from fusesnap.errors import ContentMismatch
from fusesnap.fetch.unpack_processes import STALLED, UnpackProcesses
from fusesnap.fetch.unpack_start import GRACE, StartedProcess
from fusesnap.fetch.unpacking import ThreadUnpackers, UnpackerDied
from fusesnap.store.local_store import LocalStore

from ..substituter.samples import sample


async def processes(store: LocalStore, nursery: trio.Nursery, count: int = 1) -> UnpackProcesses:
    """So many, ready."""
    state = str(store.layer.parent)
    command = [sys.executable, "-m", "fusesnap.daemon.unpack_worker", state, "/nix/store"]
    started = UnpackProcesses(command, count, nursery, ThreadUnpackers(store))
    started.start()
    with trio.fail_after(60):
        await started.all_ready()
    return started


async def test_many_nars_share_a_process(store: LocalStore, nursery: trio.Nursery) -> None:
    unpackers = await processes(store, nursery)
    samples = [sample(f"path-{number}", size=50_000) for number in range(12)]
    pins = store.pins([each.info for each in samples])

    async def unpack(number: int) -> None:
        each = samples[number]
        async with unpackers.unpacking(pins[number], each.info) as unpacking:
            for start in range(0, len(each.file), 9_999):
                await unpacking.feed(each.file[start : start + 9_999])
            await unpacking.commit()

    async with trio.open_nursery() as jobs:
        for number in range(len(samples)):
            jobs.start_soon(unpack, number)
    assert all(store.is_committed(each.path) for each in samples)
    assert len(unpackers.pids()) == 1


async def test_what_nobody_waits_for_is_committed_together(
    store: LocalStore, nursery: trio.Nursery
) -> None:
    """One that cannot be committed fails alone."""
    unpackers = await processes(store, nursery)
    samples = [sample(f"path-{number}") for number in range(6)]
    bad = samples[3].but(nar_hash=samples[4].info.nar_hash)
    pins = store.pins([each.info for each in [*samples[:3], bad, *samples[4:]]])
    failed: list[str] = []

    async def unpack(number: int) -> None:
        async with unpackers.unpacking(pins[number], pins[number].info) as unpacking:
            await unpacking.feed(samples[number].file)
            try:
                await unpacking.commit(together=True)
            except ContentMismatch as error:
                failed.append(str(error))

    async with trio.open_nursery() as jobs:
        for number in range(len(samples)):
            jobs.start_soon(unpack, number)
    assert len(failed) == 1
    assert "its NAR hashes to" in failed[0]
    good = [each.path for each in samples if each is not samples[3]]
    assert store.committed_among([each.path for each in samples]) == set(good)
    assert store.counts().valid == 5
    assert list((store.layer.parent / "staging").iterdir()) == []


async def test_what_was_never_begun_need_not_be_dropped(
    store: LocalStore, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """It is given up while it waits for its turn to send."""
    unpackers = await processes(store, nursery)
    (process,) = unpackers._slots
    assert process is not None
    hello = sample("hello")
    pin = store.pin(hello.info)
    given_up = trio.CancelScope()

    async def unpack() -> None:
        with given_up:
            async with unpackers.unpacking(pin, hello.info) as unpacking:
                await unpacking.feed(hello.file)
                await unpacking.commit()

    async with trio.open_nursery() as waiting, process._sending:
        waiting.start_soon(unpack)
        await trio.testing.wait_all_tasks_blocked()
        given_up.cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert process.alive
    assert process.jobs == 0
    assert not store.is_committed(hello.path)


async def test_what_is_given_up_leaves_nothing(store: LocalStore, nursery: trio.Nursery) -> None:
    unpackers = await processes(store, nursery)
    given_up, other = sample("given-up", size=100_000), sample("other")
    pins = store.pins([given_up.info, other.info])
    with trio.CancelScope() as scope:
        async with unpackers.unpacking(pins[0], given_up.info) as unpacking:
            await unpacking.feed(given_up.file[:50_000])
            scope.cancel()
            await unpacking.feed(given_up.file[50_000:])
            await trio.lowlevel.checkpoint()
    # One stream, in order: when this one is done, the other has been dropped.
    async with unpackers.unpacking(pins[1], other.info) as unpacking:
        await unpacking.feed(other.file)
        await unpacking.commit()
    assert not store.is_committed(given_up.path)
    assert list((store.layer.parent / "staging").iterdir()) == []


async def test_a_process_that_is_killed_says_so_and_is_replaced(
    store: LocalStore, nursery: trio.Nursery
) -> None:
    unpackers = await processes(store, nursery)
    hello = sample("hello", size=100_000)
    pin = store.pin(hello.info)
    with pytest.raises(UnpackerDied):
        async with unpackers.unpacking(pin, hello.info) as unpacking:
            await unpacking.feed(hello.file[:1000])
            os.kill(unpackers.pids()[0], signal.SIGKILL)
            await unpacking.feed(hello.file[1000:])
            await unpacking.commit()
    # The next one is started, and this NAR does not wait for it.
    async with unpackers.unpacking(pin, hello.info) as unpacking:
        await unpacking.feed(hello.file)
        await unpacking.commit()
    assert store.is_committed(hello.path)
    assert len(unpackers.pids()) == 1


async def test_one_that_is_stopped_is_killed_when_it_takes_no_more(
    store: LocalStore, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    unpackers = await processes(store, nursery)
    (stopped,) = unpackers.pids()
    large = sample("large", size=5_000_000)
    pin = store.pin(large.info)
    os.kill(stopped, signal.SIGSTOP)

    async def feed() -> None:
        with pytest.raises(UnpackerDied, match=f"unpack process {stopped} took nothing"):
            async with unpackers.unpacking(pin, large.info) as unpacking:
                while True:  # more than any socket buffers
                    await unpacking.feed(large.file)

    async with trio.open_nursery() as feeding:
        feeding.start_soon(feed)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(STALLED)
    assert stopped not in unpackers.pids()


async def test_one_that_is_stopped_is_killed_when_it_does_not_let_go(
    store: LocalStore, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    unpackers = await processes(store, nursery)
    (stopped,) = unpackers.pids()
    hello = sample("hello")
    pin = store.pin(hello.info)
    os.kill(stopped, signal.SIGSTOP)

    given_up = trio.CancelScope()

    async def wait_for_commit() -> None:
        with given_up:
            async with unpackers.unpacking(pin, hello.info) as unpacking:
                await unpacking.feed(hello.file)
                await unpacking.commit()

    async with trio.open_nursery() as waiting:
        waiting.start_soon(wait_for_commit)
        await trio.testing.wait_all_tasks_blocked()
        given_up.cancel()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(GRACE)
    assert stopped not in unpackers.pids()


@pytest.mark.parametrize(("options", "nicer"), [([], 5), (["0.0"], 5), (["0.1"], 0)], ids=repr)
async def test_they_leave_the_processor_to_whoever_answers_readers(
    store: LocalStore, nursery: trio.Nursery, options: list[str], nicer: int
) -> None:
    """Unless there is none, which is when they may linger."""
    command = [sys.executable, "-m", "fusesnap.daemon.unpack_worker", str(store.layer.parent)]
    unpackers = UnpackProcesses(
        [*command, "/nix/store", *options], 1, nursery, ThreadUnpackers(store)
    )
    unpackers.start()
    with trio.fail_after(60):
        await unpackers.all_ready()
    (pid,) = unpackers.pids()
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, ours + nicer)


async def test_one_that_was_started_before_takes_a_place(
    store: LocalStore, nursery: trio.Nursery
) -> None:
    state = str(store.layer.parent)
    command = [sys.executable, "-m", "fusesnap.daemon.unpack_worker", state, "/nix/store"]
    started = StartedProcess(command)
    threads = ThreadUnpackers(store)
    unpackers = UnpackProcesses(["/bin/false"], 1, nursery, threads, started=[started])
    unpackers.start()
    with trio.fail_after(60):
        await unpackers.all_ready()
    assert unpackers.pids() == [started.process.pid]
    each = sample()
    async with unpackers.unpacking(store.pin(each.info), each.info) as unpacking:
        await unpacking.feed(each.file)
        await unpacking.commit()
    assert store.is_committed(each.path)


def test_one_that_nobody_talks_to_ends(store: LocalStore) -> None:
    state = str(store.layer.parent)
    command = [sys.executable, "-m", "fusesnap.daemon.unpack_worker", state, "/nix/store"]
    assert StartedProcess(command).end() == 0


async def test_they_end_with_whoever_started_them(store: LocalStore) -> None:
    async with trio.open_nursery() as nursery:
        unpackers = await processes(store, nursery, 2)
        pids = unpackers.pids()
        nursery.cancel_scope.cancel()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
