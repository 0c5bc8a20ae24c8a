"""What was asked for ahead begins in its turn, and none of it is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fusesnap.fetch.flight import Flight, Progress
from fusesnap.fetch.link import open_link
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.requests import AHEAD, Requests
from fusesnap.fetch.scheduler import LinkLimits
from fusesnap.nix.store_path import StoreDir, StorePath


def path(name: str) -> StorePath:
    return StoreDir().parse(f"/nix/store/{'a' * 32}-{name}")


class Line:
    """Flights that stand in a link's line as soon as they are made, and depart when they are told."""

    def __init__(self, nursery: trio.Nursery, stack: ExitStack) -> None:
        self.flights: dict[str, Flight] = {}
        self._link = open_link(nursery, LinkLimits(transfers=1))
        self._stack = stack

    def begin(self, wanted: StorePath, priority: Priority) -> Flight:
        flight = Flight(wanted, Progress(), priority=priority)
        passage = self._stack.enter_context(self._link.passage(priority, "http://cache", 1 << 20))
        self._stack.enter_context(flight.crossing(passage))
        self.flights[wanted.name] = flight
        return flight

    def depart(self, name: str) -> None:
        self.flights[name].begin("http://cache", None)

    def names(self) -> list[str]:
        return list(self.flights)


@pytest.fixture
def line(nursery: trio.Nursery) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(nursery, stack)


async def test_what_is_added_while_the_last_flights_wait_begins_too(
    line: Line, nursery: trio.Nursery
) -> None:
    requests = Requests(line.begin, nursery)
    requests.add(path("first"), Priority.REST)
    await requests.begin_all()
    assert line.names() == ["first"]  # it stands in the line, and has not departed
    requests.add(path("second"), Priority.TRACE)
    await requests.begin_all()
    assert line.names() == ["first", "second"]
    assert len(requests) == 0


async def test_few_wait_in_the_line_and_the_more_urgent_do_not_wait_behind_them(
    line: Line, nursery: trio.Nursery
) -> None:
    requests = Requests(line.begin, nursery)
    names = [f"p{number:02}" for number in range(AHEAD + 1)]
    for name in names:
        requests.add(path(name), Priority.REST)
    nursery.start_soon(requests.begin_all)
    await wait_all_tasks_blocked()
    assert line.names() == names[:AHEAD]
    requests.add(path("urgent"), Priority.TRACE)
    await requests.begin_all()  # another does it already
    await wait_all_tasks_blocked()
    assert line.names() == [*names[:AHEAD], "urgent"]
    line.depart("urgent")
    await wait_all_tasks_blocked()
    assert line.names() == [*names[:AHEAD], "urgent"]  # as many as before wait
    line.depart(names[0])
    await wait_all_tasks_blocked()
    assert line.names() == [*names[:AHEAD], "urgent", names[AHEAD]]


async def test_a_path_is_begun_once_as_urgently_as_it_was_asked_for(
    line: Line, nursery: trio.Nursery
) -> None:
    requests = Requests(line.begin, nursery)
    for priority in (Priority.PREFETCH, Priority.TRACE, Priority.REST):
        requests.add(path("one"), priority)
    requests.add(path("other"), Priority.REST)
    assert requests.counts() == {Priority.TRACE: 1, Priority.REST: 1}
    await requests.begin_all()
    assert line.names() == ["one", "other"]
    assert line.flights["one"].priority is Priority.TRACE
