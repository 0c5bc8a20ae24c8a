"""A slow link on loopback: a TCP relay with a delay and a bandwidth that all its connections share.

It can be silent, cut, and break some of its connections, as a bad link does. It stands in for netem, which not every
kernel has. A byte leaves when the link has sent everything before it, and
arrives the one-way delay later. A connection's first byte waits one round trip more, as TCP's handshake takes. What it
leaves out are loss and TCP's slow start: it is kinder than a real link of the same figures, to everyone alike.
"""

from __future__ import annotations

import math
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

CHUNK = 16 * 1024  # bytes taken at a time; connections take turns by chunks
QUEUE_SECONDS = (
    0.01  # how far ahead a connection queues, so that a late wake-up leaves no gap on the link
)


class TokenBucket:
    """When bytes have left a link of ``rate`` bits a second, of which ``burst`` bytes go at once after a pause."""

    def __init__(self, rate: float, burst: int = 0) -> None:
        self._seconds_per_byte = 8 / rate
        self._burst_seconds = burst * self._seconds_per_byte
        self._busy_until = -math.inf

    def departure(self, now: float, size: int) -> float:
        """Take ``size`` bytes at the time ``now``; returns the time at which the last of them has left.

        Times are in seconds and ``now`` never goes back. Whoever comes first is served first.
        """
        idle_since = now - self._burst_seconds
        self._busy_until = max(self._busy_until, idle_since) + size * self._seconds_per_byte
        return max(now, self._busy_until)


@dataclass(slots=True)
class Traffic:
    """What crossed one forward so far: ``down`` are bytes that clients were given, ``up`` bytes that servers were.

    ``resets`` counts the connections that the link has broken.
    """

    connections: int = 0
    up: int = 0
    down: int = 0
    resets: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """The figures of a link: ``rate`` in bits a second each way, ``round_trip`` in seconds, ``burst`` in bytes.

    ``reset`` is the share of connections, from 0 to 1, that are reset at some point of their first 64 KiB; ``seed``
    makes the same ones be chosen again.
    """

    rate: float
    round_trip: float
    burst: int = 0
    reset: float = 0.0
    seed: int = 1

    @property
    def window(self) -> int:
        """How many chunks one connection may have underway: what fills the link, and a receiver's buffer."""
        return math.ceil(self.rate / 8 * self.round_trip / CHUNK) + 64


# Bytes down within which a connection is reset that is to be: somewhere between, small numbers as often as large ones,
# because most answers are small.
FIRST, EARLY = 64, 64 * 1024


@dataclass(eq=False, slots=True)
class Connection:
    """One connection that is carried; ``reset_after`` bytes down it is broken."""

    client: trio.abc.HalfCloseableStream
    traffic: Traffic
    reset_after: int | None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    down: int = 0

    def reset(self) -> None:
        """Break it, so that the client is told so (RST)."""
        if isinstance(self.client, trio.SocketStream):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.traffic.resets += 1
        self.scope.cancel()

    def count_up(self, size: int) -> None:
        self.traffic.up += size

    def count_down(self, size: int) -> None:
        self.traffic.down += size
        self.down += size
        if self.reset_after is not None and self.down >= self.reset_after:
            self.reset()


class SlowLink:
    """A link that any number of forwards share. Needs no sockets: it carries whatever streams it is given."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._up = TokenBucket(link.rate, link.burst)
        self._down = TokenBucket(link.rate, link.burst)
        self._random = random.Random(link.seed)  # noqa: S311 - a drill's, not a secret
        self._connections: set[Connection] = set()
        self._passable = trio.Event()
        self._passable.set()
        self._is_cut = False
        self.traffic: dict[str, Traffic] = {}

    def silence(self) -> None:
        """From now on nothing crosses: packets are lost, and nobody is told."""
        self._passable = trio.Event()

    def cut(self) -> None:
        """From now on every connection is reset, those that are there and those that are tried."""
        self._is_cut = True
        for connection in list(self._connections):
            connection.reset()

    def mend(self) -> None:
        """From now on it is as it was."""
        self._is_cut = False
        self._passable.set()

    async def relay(
        self,
        name: str,
        client: trio.abc.HalfCloseableStream,
        connect: Callable[[], Awaitable[trio.abc.HalfCloseableStream]],
    ) -> None:
        """Carry one connection of the forward ``name`` to its end; ``connect`` opens the way to the server."""
        accepted = trio.current_time()
        traffic = self.traffic.setdefault(name, Traffic())
        traffic.connections += 1
        connection = Connection(client, traffic, self._chance())
        self._connections.add(connection)
        if self._is_cut:
            connection.reset()
        try:
            async with client:
                with connection.scope:
                    try:
                        server = await connect()
                    except OSError:
                        return  # the client sees its connection closed
                    async with server:
                        await self._carry_both(accepted, connection, server)
        finally:
            self._connections.discard(connection)

    def _chance(self) -> int | None:
        if self._random.random() >= self._link.reset:
            return None
        return int(FIRST * (EARLY / FIRST) ** self._random.random())

    async def _carry_both(
        self, accepted: float, connection: Connection, server: trio.abc.HalfCloseableStream
    ) -> None:
        round_trip, client = self._link.round_trip, connection.client
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                # A real server accepts when the handshake's third packet has come.
                opened = accepted + 1.5 * round_trip
                heard = await self._carry(self._down, opened, server, client, connection.count_down)
                if not heard:
                    nursery.cancel_scope.cancel()  # nobody is there to be sent the rest

            nursery.start_soon(answer)
            await self._carry(self._up, accepted + round_trip, client, server, connection.count_up)

    async def _carry(
        self,
        bucket: TokenBucket,
        opened: float,
        source: trio.abc.ReceiveStream,
        target: trio.abc.HalfCloseableStream,
        count: Callable[[int], None],
    ) -> bool:
        """Carry one direction to its end. Returns whether the target took everything."""
        underway, arriving = trio.open_memory_channel[tuple[float, bytes]](self._link.window)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, bucket, opened, source, underway)
            taken = await self._deliver(arriving, target, count)
            nursery.cancel_scope.cancel()
        return taken

    async def _send(
        self,
        bucket: TokenBucket,
        opened: float,
        source: trio.abc.ReceiveStream,
        underway: trio.MemorySendChannel[tuple[float, bytes]],
    ) -> None:
        """Put chunks on the link as fast as it takes them; an empty one stands for the end."""
        async with underway:
            while True:
                data = await _receive(source)
                await trio.sleep_until(opened)
                departure = bucket.departure(trio.current_time(), len(data))
                await underway.send((departure + self._link.round_trip / 2, data))
                if not data:
                    return
                # The next chunk queues behind those that other connections have put on the link by then.
                await trio.sleep_until(departure - QUEUE_SECONDS)

    async def _deliver(
        self,
        arriving: trio.MemoryReceiveChannel[tuple[float, bytes]],
        target: trio.abc.HalfCloseableStream,
        count: Callable[[int], None],
    ) -> bool:
        """Hand chunks over as they arrive, and the end of the stream as an end.

        Returns whether the target took them.
        """
        async for arrival, data in arriving:
            await trio.sleep_until(arrival)
            await self._passable.wait()
            try:
                if data:
                    await target.send_all(data)
                    count(len(data))
                else:
                    await target.send_eof()
            except trio.BrokenResourceError:
                return False
        return True


async def _receive(source: trio.abc.ReceiveStream) -> bytes:
    try:
        return bytes(await source.receive_some(CHUNK))
    except trio.BrokenResourceError:
        return b""
