"""Who is on the link when: on a virtual clock, 20 Mbit/s and 80 ms away unless a test says otherwise."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from fusesnap.fetch.link import PauseLost
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.scheduler import TRIAL, LinkLimits

from .wire import PIECE, Node, Wire

LARGE = 50_000_000
SMALL = 100_000
LOWER = [each for each in Priority if each is not Priority.READER]


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def node(wire: Wire, nursery: trio.Nursery) -> Node:
    return Node(wire, nursery)


async def seconds_alone(nursery: trio.Nursery, size: int) -> float:
    node = Node(Wire(), nursery)
    began = trio.current_time()
    node.fetch("alone", size, Priority.READER)
    await node.all_done("alone")
    return node.done["alone"] - began


@pytest.mark.parametrize("priority", LOWER)
async def test_a_reader_is_served_as_if_it_were_alone(
    priority: Priority, wire: Wire, node: Node, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    alone = await seconds_alone(nursery, SMALL)
    node.fetch("large", LARGE, priority)
    await trio.sleep(5)
    began = trio.current_time()
    node.fetch("small", SMALL, Priority.READER)
    await node.all_done("small")
    assert node.done["small"] - began == pytest.approx(alone, abs=PIECE / wire.rate)


@pytest.mark.parametrize("priority", LOWER)
async def test_what_is_paused_goes_on_where_it_was(
    priority: Priority, wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    node.fetch("large", LARGE, priority)
    for number in range(3):
        await trio.sleep(4)
        node.fetch(f"small-{number}", SMALL, Priority.READER)
    await node.all_done("large")
    first, *others = wire.asked("large")
    assert first == 0
    assert others == sorted(set(others))
    assert node.resumed["large"] == others
    assert node.pauses == {
        "large": 3 * [True, False],
        **{f"small-{number}": [] for number in range(3)},
    }
    assert len(others) == 3
    # Each byte crossed once, but for what was on its way when a reader came.
    assert wire.sent == LARGE + 3 * SMALL


async def test_a_pause_that_ends_at_once_loses_nothing(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    node.fetch("rest", 5_000_000, Priority.REST)
    await trio.sleep(1)
    with node.link.passage(Priority.READER, "a", LARGE):
        assert node.passages["rest"].paused
    await node.all_done("rest")
    assert wire.sent == 5_000_000


async def test_the_link_does_not_idle_between_a_reader_and_what_it_made_pause(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    node.fetch("rest", LARGE, Priority.REST)
    await trio.sleep(2)
    node.fetch("read", 5_000_000, Priority.READER)
    await node.all_done("read")
    (again,) = [each.at for each in wire.requests if each.name == "rest" and each.start]
    assert again < node.done["read"]


async def test_what_is_nearly_here_is_not_stopped(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    node.fetch("rest", 2_500_000, Priority.REST)
    await trio.sleep(1.02)  # a round trip and a second, less what is on its way
    node.fetch("read", SMALL, Priority.READER)
    await node.all_done("rest", "read")
    assert wire.asked("rest") == [0]


async def test_a_cache_that_cannot_begin_in_the_middle_keeps_its_connection(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    wire.ranges = None
    node.fetch("large", 5_000_000, Priority.REST)
    await trio.sleep(1)
    node.fetch("read", 5_000_000, Priority.READER)
    await node.all_done("read", "large")
    assert wire.asked("large") == [0]
    assert node.done["read"] == pytest.approx(1 + 0.08 + 2, abs=4 * PIECE / wire.rate)


async def test_a_connection_that_was_closed_while_nobody_read_is_no_fault_of_the_file(
    wire: Wire, node: Node, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    wire.ranges = False
    wire.patience = 1.0
    with (
        pytest.raises(PauseLost) as caught,
        node.link.passage(Priority.REST, "a", LARGE) as passage,
    ):
        read = wire.file("large", LARGE)
        nursery.start_soon(read_soon, node)
        async for _ in passage.pieces(read, lambda kept: None):
            pass
    assert "closed the connection" in str(caught.value)


async def read_soon(node: Node) -> None:
    await trio.sleep(1)
    node.fetch("read", 10_000_000, Priority.READER)


async def test_readers_share_the_link_and_a_small_one_passes_a_large_one(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    node.fetch("large", LARGE, Priority.READER)
    await trio.sleep(1)
    node.fetch("small", SMALL, Priority.READER)
    await node.all_done("small", "large")
    assert node.done["small"] < 1.3
    assert wire.asked("large") == [0]


async def test_the_more_urgent_goes_first(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    for priority in reversed(Priority):
        node.fetch(priority.name, 5_000_000, priority)
    await node.all_done(*Priority.__members__)
    assert sorted(node.done, key=node.done.__getitem__) == list(Priority.__members__)


async def test_a_trace_comes_one_after_the_other_without_gaps(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    names = [f"path-{number}" for number in range(8)]
    with trio.CancelScope():
        for name in names:
            node.fetch(name, 2_500_000, Priority.TRACE)
            await trio.lowlevel.checkpoint()
    await node.all_done(*names)
    assert sorted(node.done, key=node.done.__getitem__) == names
    # Eight seconds' worth of bytes, and one round trip.
    assert max(node.done.values()) == pytest.approx(8 + 0.08, abs=0.1)


async def test_many_small_ones_fill_the_link(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    names = [f"path-{number}" for number in range(200)]
    for name in names:
        node.fetch(name, 20_000, Priority.COMPLETION)
    await node.all_done(*names)
    assert wire.most_open <= LinkLimits().connections
    # 1.6 s of bytes; one after the other would take 200 round trips, 16 s.
    assert max(node.done.values()) < 3


async def test_a_cache_that_holds_back_each_connection_gets_more_of_them(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    wire.share = wire.rate / 4
    names = [f"path-{number}" for number in range(16)]
    for name in names:
        node.fetch(name, 4_000_000, Priority.TRACE)
    await node.all_done(*names)
    assert wire.most_open >= 4
    assert max(node.done.values()) < 40  # one connection would take 102 s, the link 26


async def test_who_deals_slowly_with_its_bytes_leaves_the_link_to_its_like(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    for number in range(4):
        node.fetch(f"path-{number}", 2_500_000, Priority.TRACE, work=4 * PIECE / wire.rate)
    await node.all_done(*(f"path-{number}" for number in range(4)))
    assert max(node.done.values()) < 8  # in series 20


@pytest.mark.parametrize("measured", [True, False])
async def test_who_gets_nothing_does_not_keep_the_others_away(
    measured: bool, wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    if measured:
        node.fetch("measured", 10_000_000, Priority.READER)
        await node.all_done("measured")
    wire.silent.add("dead")
    node.fetch("dead", LARGE, Priority.READER, source="b")
    await trio.sleep(0.01)
    node.fetch("trace", LARGE, Priority.TRACE)
    began = trio.current_time()
    await trio.sleep(TRIAL + 2)
    (asked,) = [each.at for each in wire.requests if each.name == "trace"]
    assert asked - began == pytest.approx(TRIAL, abs=0.3)
    assert wire.asked("dead") == [0]


async def test_what_nobody_waits_for_begins_when_readers_are_quiet(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    for number in range(5):
        node.fetch(f"read-{number}", SMALL, Priority.READER)
        await trio.sleep(0.01)
        node.fetch(f"completion-{number}", SMALL, Priority.COMPLETION)
        await trio.sleep(0.3)
    await node.all_done("completion-4")
    assert min(each.at for each in wire.requests if "completion" in each.name) > max(
        each.at for each in wire.requests if "read" in each.name
    )


async def test_a_path_is_urgent_as_soon_as_somebody_blocks_on_it_and_no_longer_than_that(
    wire: Wire, node: Node, autojump_clock: MockClock
) -> None:
    node.fetch("first", LARGE, Priority.TRACE)
    await trio.sleep(1)
    node.fetch("second", LARGE, Priority.COMPLETION)
    await trio.sleep(1)
    assert wire.asked("second") == []
    node.passages["second"].become(Priority.READER)
    await trio.sleep(1)
    assert wire.asked("second") == [0]
    assert node.passages["first"].paused
    node.passages["second"].become(Priority.COMPLETION)
    assert node.passages["second"].paused
    assert not node.passages["first"].paused


async def test_no_cache_gets_more_connections_than_it_may(
    wire: Wire, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = Node(wire, nursery, LinkLimits(connections=3))
    for number in range(20):
        node.fetch(f"path-{number}", SMALL, Priority.READER)
    await node.all_done(*(f"path-{number}" for number in range(20)))
    assert wire.most_open == 3


async def test_large_ones_leave_room_for_small_ones(
    wire: Wire, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = Node(wire, nursery, LinkLimits(transfers=8))
    for number in range(8):
        node.fetch(f"large-{number}", LARGE, Priority.READER)
    await trio.sleep(1)
    assert wire.open == 2
    node.fetch("small", SMALL, Priority.READER)
    await node.all_done("small")
    assert node.done["small"] < 2


async def test_a_node_takes_no_more_than_it_may(
    wire: Wire, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = Node(wire, nursery, bandwidth=500_000)
    for number in range(4):
        node.fetch(f"path-{number}", 1_250_000, Priority.READER)
    await node.all_done(*(f"path-{number}" for number in range(4)))
    assert max(node.done.values()) == pytest.approx(10, rel=0.1)


async def test_what_is_owed_waits_for_nothing_and_what_comes_next_pays(
    wire: Wire, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = Node(wire, nursery, bandwidth=500_000)
    node.fetch("path", 5_000_000, Priority.READER)
    await trio.sleep(1)
    began = trio.current_time()
    for _ in range(1_000):  # narinfos, while the path has used up what there is
        node.bandwidth.owe(1_000)
    assert trio.current_time() == began
    await node.all_done("path")
    assert node.done["path"] == pytest.approx(12, rel=0.1)


async def test_where_nothing_is_limited_nothing_is_owed(
    wire: Wire, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = Node(wire, nursery, bandwidth=0)
    node.bandwidth.owe(1 << 40)
    node.fetch("path", 2_500_000, Priority.READER)
    await node.all_done("path")
    assert node.done["path"] == pytest.approx(1, rel=0.1)


async def test_who_is_cancelled_leaves_the_link_to_the_next(
    wire: Wire, node: Node, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(1), node.link.passage(Priority.READER, "a", LARGE) as passage:
        node.fetch("trace", SMALL, Priority.TRACE)
        async for _ in passage.pieces(wire.file("large", LARGE), lambda kept: None):
            pass
    await node.all_done("trace")
    assert wire.open == 0
