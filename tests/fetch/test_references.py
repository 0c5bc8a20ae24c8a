"""What a path refers to is asked for when somebody blocks on it, once."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from fusesnap.fetch.events import Asked, Boarded
from fusesnap.fetch.flight import Flight
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.references import References
from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore

from ..substituter.samples import KEY, Sample, sample


def referring(name: str, *others: Sample) -> Sample:
    own = sample(name)
    references = tuple(sorted((*(other.path for other in others), own.path)))
    return own.but(references=references).signed_by(KEY)


async def test_a_reader_has_all_that_his_path_refers_to_asked_for(
    store: LocalStore, nursery: trio.Nursery
) -> None:
    send, asked = trio.open_memory_channel[tuple[set[StorePath], Priority]](10)

    def request(paths: Sequence[StorePath], priority: Priority) -> None:
        send.send_nowait((set(paths), priority))

    references = References(store, request, nursery)
    leaf, unknown, other = sample("leaf"), sample("unknown"), sample("other")
    middle = referring("middle", leaf, unknown)
    root, second = referring("root", middle, leaf), referring("second", middle, other)
    for each in (leaf, other, middle, root, second):
        store.pin(each.info)
    references.heard(Asked(second.path, Priority.TRACE))  # nobody blocks on it
    references.heard(Boarded(second.path))
    references.heard(Asked(root.path, Priority.READER))
    assert await asked.receive() == ({middle.path, leaf.path}, Priority.REST)
    references.heard(Asked(root.path, Priority.READER))
    references.heard(Asked(second.path, Priority.READER))
    assert await asked.receive() == ({other.path}, Priority.REST)


async def test_who_joins_what_was_asked_for_ahead_is_a_reader_too(
    store: LocalStore, nursery: trio.Nursery
) -> None:
    asked: list[Sequence[StorePath]] = []
    done = trio.Event()

    def request(paths: Sequence[StorePath], priority: Priority) -> None:
        asked.append(paths)
        done.set()

    references = References(store, request, nursery)
    leaf = sample("leaf")
    root = referring("root", leaf)
    for each in (leaf, root):
        store.pin(each.info)
    flight = Flight(root.path, observe=references.heard, priority=Priority.TRACE)
    with trio.move_on_after(10):
        async with trio.open_nursery() as own:
            own.start_soon(flight.wait, 10, None)
            await done.wait()
            flight.land(None)
    assert asked == [[leaf.path]]
