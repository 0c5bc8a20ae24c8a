"""Makes store paths present: single flight, verified while streaming, committed by rename."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import trio

from fusesnap.errors import (
    ClosureUnavailable,
    FusesnapError,
    InvalidData,
    PathNotFound,
    StorageFailure,
    Unavailable,
    UntrustedPath,
)
from fusesnap.fetch.acceptance import Acceptance
from fusesnap.fetch.builder import Builder
from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.events import ObserveFetch, unobserved
from fusesnap.fetch.flight import Flight, FlightState, Progress, Reader
from fusesnap.fetch.keeping import keeping
from fusesnap.fetch.link import Link, PauseLost
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.requests import Requests
from fusesnap.fetch.reserving import Reservation, reservation
from fusesnap.fetch.trees import Trees
from fusesnap.fetch.unpacking import UnpackerDied, Unpackers
from fusesnap.nix.store_path import HashPart, StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import LocalStore, Pin
from fusesnap.store.room import is_full
from fusesnap.substituter.pool import Offer, SubstituterPool
from fusesnap.substituter.retry import CannotContinue

log = logging.getLogger(__name__)

# A thread hop costs some 50 us: what arrives is gathered until it is worth one.
GATHER = 256 * 1024
# Bytes of a file that is here soon after its first byte: for it nothing else is stopped.
MODEST = 64 * 1024
# An unpack process may be killed, by the kernel too when memory is short; a NAR that kills each one is given up.
UNPACK_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """``lookups``: narinfos at once. ``stall``: seconds without progress for a reader."""

    lookups: int = 64
    stall: float = 120.0


class Realiser:
    """The one place in a process that fetches paths; ``link`` decides whose bytes come when.

    ``nursery`` holds the transfers: they outlive the readers that asked for them, because the next reader will want
    the same path, and end with the process. ``identify`` names a process by its pid, for people to see. ``observe``
    hears what becomes of each path. ``builder``, if there is one, brings what no cache has.
    """

    def __init__(
        self,
        store: LocalStore,
        pool: SubstituterPool,
        unpackers: Unpackers,
        link: Link,
        nursery: trio.Nursery,
        limits: Limits,
        identify: Callable[[int], Reader],
        observe: ObserveFetch = unobserved,
        builder: Builder | None = None,
        chunked: ChunkedPaths | None = None,
    ) -> None:
        self._store = store
        self._builder = builder
        self._chunked = chunked
        self._acceptance = chunked.acceptance if chunked is not None else Acceptance(store, None)
        self._pool = pool
        self._unpackers = unpackers
        self._link = link
        self._nursery = nursery
        self._limits = limits
        self._identify = identify
        self._observe = observe
        self._requests = Requests(self._begin, nursery)
        self._flights: dict[StorePath, Flight] = {}
        self._progress = Progress()
        self._trees = Trees()

    # ---------------------------------------------------------------- asking

    async def admit(self, paths: Iterable[StorePath]) -> list[Pin]:
        """Find out where every one of ``paths`` can be had, and pin it.

        A path that is committed asks no cache. Raises ``ClosureUnavailable`` with one error a path that cannot be
        had; then nothing of the list is pinned.
        """
        wanted = sorted(set(paths))
        committed = await trio.to_thread.run_sync(self._store.committed_among, wanted)
        offers: dict[StorePath, Offer] = {}
        failures: dict[StorePath, FusesnapError] = {}
        limiter = trio.CapacityLimiter(self._limits.lookups)

        async def look_up(path: StorePath) -> None:
            async with limiter:
                try:
                    offer = await self._offered(path)
                    if offer is not None:
                        offers[path] = offer
                except FusesnapError as error:
                    failures[path] = error

        async with trio.open_nursery() as nursery:
            for path in wanted:
                if path not in committed:
                    nursery.start_soon(look_up, path)
        if failures:
            raise ClosureUnavailable(failures[path] for path in sorted(failures))
        return await trio.to_thread.run_sync(
            self._store.pins, [offer.narinfo for offer in offers.values()]
        )

    async def introduce(self) -> None:
        """See ``SubstituterPool.introduce``."""
        await self._pool.introduce()

    async def resolve(self, part: HashPart) -> StorePath:
        """The path that has this hash part: the store's, else what a trusted narinfo says.

        Raises as ``SubstituterPool.find``.
        """
        known = await trio.to_thread.run_sync(self._store.with_hash_part, part)
        return known if known is not None else (await self._pool.find(part)).narinfo.store_path

    async def closure(
        self, root: StorePath, keep: Callable[[Iterable[StorePath]], None] | None = None
    ) -> list[StorePath]:
        """``root`` and every path that it references, directly or not, admitted, in order of discovery.

        ``keep`` is called, in a thread, with each path before it is looked up, so that it is not collected; None: none
        is before this process ends. Raises ``ClosureUnavailable``.
        """
        found: dict[StorePath, None] = {root: None}
        frontier = [root]
        while frontier:
            await trio.to_thread.run_sync(keep or self._store.roots.keep, frontier)
            await self.admit(frontier)
            referenced = await trio.to_thread.run_sync(self._all_references, frontier)
            frontier = [path for path in referenced if path not in found]
            found |= dict.fromkeys(frontier)
        return list(found)

    # -------------------------------------------------------------- fetching

    async def realise(
        self,
        path: StorePath,
        pid: int | None = None,
        watch: Callable[[Flight], None] = lambda _: None,
        priority: Priority = Priority.READER,
    ) -> Tree:
        """The tree of ``path``, which is committed when this returns.

        Any number of callers share one transfer, which ``watch`` is told if it is waited for. Who is no reader says
        with ``priority`` how urgent it is. Raises the reason why the path cannot be had (``PathNotFound``,
        ``Unavailable``, ``UntrustedPath``, ``InvalidData``, ``StorageFailure``), or ``DeadlineExceeded``.
        """
        tree = await self._committed_tree(path)
        if tree is not None:
            return tree
        reader = self._identify(pid) if pid is not None else None
        flight = self._flight(path, priority)
        watch(flight)
        if priority is Priority.READER:
            tree = await flight.wait(self._limits.stall, reader)
        else:
            flight.want(priority)
            tree = await flight.outcome(self._limits.stall)
        return tree or await self._tree(path)

    async def have(
        self,
        path: StorePath,
        begun: Callable[[], None] = lambda: None,
        priority: Priority = Priority.PREFETCH,
    ) -> None:
        """As :meth:`realise`, for somebody who wants ``path`` to be there and does not look into it.

        ``begun`` is called when its first bytes are asked for, or there is no need, or no way. Whoever wants many
        begins the next then: the link has to choose between few.
        """
        flight = None if self._store.is_committed(path) else self._flight(path, priority)
        try:
            if flight is not None:
                flight.want(priority)
                await flight.departed()
        finally:
            begun()
        if flight is not None:
            await flight.outcome(self._limits.stall)

    def request(self, paths: Sequence[StorePath], priority: Priority = Priority.PREFETCH) -> None:
        """Start fetching what is missing of ``paths`` when it is their turn, without waiting.

        In the order given if ``priority`` keeps it, as of a startup trace; else the smallest first.
        """
        self._nursery.start_soon(self._enqueue, tuple(paths), priority)

    async def _enqueue(self, paths: Sequence[StorePath], priority: Priority) -> None:
        # A question to the database each: thousands of them are not for the loop.
        missing = await trio.to_thread.run_sync(self._missing_in_order, paths, priority)
        for path in missing:
            if path in self._flights:
                self._flights[path].want(priority)
            else:
                self._requests.add(path, priority)
        await self._requests.begin_all()

    def _begin(self, path: StorePath, priority: Priority) -> Flight | None:
        """Have a requested path fetched, unless somebody has read it before its turn."""
        return None if self._store.is_committed(path) else self._flight(path, priority)

    def _missing_in_order(
        self, paths: Sequence[StorePath], priority: Priority
    ) -> Sequence[StorePath]:
        there = self._store.committed_among(paths)
        missing = [path for path in dict.fromkeys(paths) if path not in there]
        return missing if priority.keeps_order else sorted(missing, key=self._size)

    def cached_tree(self, ordinal: int) -> Tree | None:
        """The tree behind an ordinal, if it is in memory: never waits."""
        return self._trees.get(ordinal)

    def know_tree(self, ordinal: int, tree: Tree) -> None:
        """Keep a tree that somebody has by other means, as verified."""
        self._trees.put(ordinal, tree)

    def forget_tree(self, ordinal: int) -> None:
        """Look at the path behind an ordinal again at the next question: it is not on disk as it was."""
        self._trees.drop(ordinal)

    def flights(self) -> list[FlightState]:
        """Every transfer of this moment, the longest running first."""
        parts = self._chunked.flights() if self._chunked is not None else []
        return [*(flight.state() for flight in self._flights.values()), *parts]

    def requested(self) -> dict[Priority, int]:
        """How many paths were asked for ahead and are no flights yet, by how urgent they are."""
        return self._requests.counts()

    def _size(self, path: StorePath) -> int:
        pin = self._store.pinned(path)
        return pin.info.nar_size if pin is not None else 0

    def _references(self, path: StorePath) -> tuple[StorePath, ...]:
        valid = self._store.valid_path_info(
            path
        )  # perhaps real Nix brought it, and nobody pinned it
        return valid.references if valid is not None else self._pin(path).info.references

    def _all_references(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """What any of ``paths`` references, each once."""
        return list(dict.fromkeys(each for path in paths for each in self._references(path)))

    def _pin(self, path: StorePath) -> Pin:
        pin = self._store.pinned(path)
        if pin is None:
            raise PathNotFound(f"{path}: no image on this node names it")
        return pin

    async def _committed_tree(self, path: StorePath) -> Tree | None:
        if not self._store.is_committed(path):
            return None
        tree = self._trees.get(self._pin(path).ordinal)
        if tree is None:
            tree = await trio.to_thread.run_sync(self._store.tree, path)
            if tree is not None:
                self._trees.put(self._pin(path).ordinal, tree)
        return tree

    async def _tree(self, path: StorePath) -> Tree:
        """The tree of a path that has just been committed."""
        tree = await self._committed_tree(path)
        if tree is None:
            raise Unavailable(f"{path}: somebody removed it as soon as it was committed")
        return tree

    def _flight(self, path: StorePath, priority: Priority) -> Flight:
        flight = self._flights.get(path)
        if flight is None:
            flight = Flight(path, self._progress, self._observe, priority)
            self._flights[path] = flight
            self._nursery.start_soon(self._fly, flight, name=f"fetch {path}")
        return flight

    async def _fly(self, flight: Flight) -> None:
        outcome: Tree | Exception | None = Unavailable(
            f"{flight.path}: the fetch was given up because the process ends"
        )
        try:
            flight.board()
            outcome = await self._fetch_with_room(flight)
        except Exception as error:
            log.warning(
                "%s cannot be had: %s",
                flight.path,
                error,
                exc_info=not isinstance(error, FusesnapError),
            )
            outcome = error
        finally:
            del self._flights[flight.path]
            flight.land(outcome)

    async def _fetch_with_room(self, flight: Flight) -> Tree | None:
        """Fetch; on a full disk remove what no root reaches, and fetch once more."""
        try:
            return await self._fetch_kept(flight)
        except StorageFailure as error:
            if not is_full(error):
                raise
            freed = await trio.to_thread.run_sync(self._store.room.free, self._size(flight.path))
            log.warning("%s: %s; removed %d paths", flight.path, error, len(freed.paths))
            if not freed.size:
                raise
        return await self._fetch_kept(flight)

    async def _fetch_kept(self, flight: Flight) -> Tree | None:
        async with (
            reservation(self._store.room) as room,
            keeping(self._store.roots, [flight.path]),
        ):
            return await self._fetch(flight, room)

    async def _fetch(self, flight: Flight, room: Reservation) -> Tree | None:
        """Have the path committed; parts of it are not needed afterwards. Gives its tree if somebody waits for that."""
        if not await self._complete(flight, room):
            await self._fetch_whole(flight, room)
        if self._chunked is not None:
            await self._chunked.committed(flight.path)
        return await self._tree(flight.path) if flight.priority is Priority.READER else None

    async def _complete(self, flight: Flight, room: Reservation) -> bool:
        """Fetch what is missing of a path of which parts are here; false where there is nothing to go on with."""
        chunked = await self._chunked.begun(flight.path) if self._chunked is not None else None
        if self._chunked is None or chunked is None:
            return False
        # As any path: its NAR is held against its hash while it is unpacked.
        info = replace(chunked.pin.info, compression="none", file_hash=None, file_size=None)
        await room.take(info.nar_size)
        flight.begin(chunked.source, chunked.remaining)
        try:
            async with (
                self._unpackers.unpacking(chunked.pin, info) as unpacking,
                aclosing(chunked.nar(lambda: flight.priority, flight.came)) as pieces,
            ):
                async for piece in pieces:
                    await unpacking.feed(piece)
                flight.verify()
                await unpacking.commit(together=flight.priority >= Priority.REST)
        except UnpackerDied as error:
            log.warning("%s: %s; it is fetched whole", flight.path, error)
            return False
        except (Unavailable, PathNotFound, InvalidData, UntrustedPath) as error:
            await self._chunked.give_up(chunked, error)
            return False
        return True

    async def _fetch_whole(self, flight: Flight, room: Reservation) -> None:
        """Try one offer after the other until one of them is the path."""
        failures: dict[str, FusesnapError] = {}
        forgotten: set[str] = set()
        while True:
            offer = await self._next_offer(flight.path, failures)
            if offer is None:
                return
            try:
                pin = await self._acceptance.pin(offer)
                await self._transfer(flight, offer, pin, room)
            except (Unavailable, PathNotFound, InvalidData, UntrustedPath) as error:
                log.warning("%s: %s: %s", offer.substituter.url, flight.path, error)
                await self._pool.report_bad(offer, error)
                anew = isinstance(error, PathNotFound | CannotContinue)
                if anew and offer.substituter.url not in forgotten:
                    # Its narinfo may have been remembered, and name a file that has another name by now; or the file
                    # can only be had from its start.
                    forgotten.add(offer.substituter.url)
                else:
                    failures[offer.substituter.url] = error
            else:
                return

    async def _offered(
        self, path: StorePath, exclude: frozenset[str] = frozenset()
    ) -> Offer | None:
        """A cache's offer of ``path``; None where no cache has it and it was built: then it is committed."""
        try:
            return await self._pool.find(path, exclude=exclude)
        except PathNotFound as absence:
            if self._builder is None:
                raise
            await self._builder.build(path, absence)
            return None

    async def _next_offer(
        self, path: StorePath, failures: dict[str, FusesnapError]
    ) -> Offer | None:
        try:
            return await self._offered(path, frozenset(failures))
        except FusesnapError as error:
            if not failures:
                raise
            said = "; ".join(named(url, failure) for url, failure in failures.items())
            # What a cache sent weighs more than what the others lack: it names the culprit.
            raise type(next(iter(failures.values())))(f"{path}: {said}") from error

    async def _transfer(self, flight: Flight, offer: Offer, pin: Pin, room: Reservation) -> None:
        for _ in range(UNPACK_ATTEMPTS - 1):
            try:
                await self._transfer_once(flight, offer, pin, room)
            except (UnpackerDied, PauseLost) as error:
                log.warning("%s: %s; from its start again", flight.path, error)
            else:
                return
        try:
            await self._transfer_once(flight, offer, pin, room)
        except PauseLost as error:
            raise Unavailable(str(error)) from error

    async def _transfer_once(
        self, flight: Flight, offer: Offer, pin: Pin, room: Reservation
    ) -> None:
        url, size = offer.substituter.url, offer.narinfo.file_size
        modest = size is not None and size <= MODEST
        with (
            self._link.passage(flight.priority, url, size, modest=modest) as passage,
            flight.crossing(passage),
        ):
            await passage.turn()
            await room.take(offer.narinfo.nar_size)
            flight.begin(url, size)
            stream = passage.pieces(offer.read, flight.resume)
            async with (
                self._unpackers.unpacking(pin, offer.narinfo) as unpacking,
                aclosing(stream),
                aclosing(gather(stream, flight)) as pieces,
            ):
                async for piece in pieces:
                    await unpacking.feed(piece)
                flight.verify()
                await unpacking.commit(together=flight.priority >= Priority.REST)


def named(url: str, failure: FusesnapError) -> str:
    """What went wrong, with the cache's name in front."""
    said = str(failure)
    return said if said.startswith(url) else f"{url}: {said}"


async def gather(stream: AsyncIterator[bytes], flight: Flight) -> AsyncGenerator[bytes, None]:
    """The bytes of ``stream`` in pieces of at least ``GATHER`` bytes (but for the last), counted into ``flight``."""
    held: list[bytes] = []
    size = 0
    async for piece in stream:
        flight.progress(len(piece))
        held.append(piece)
        size += len(piece)
        if size >= GATHER:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
