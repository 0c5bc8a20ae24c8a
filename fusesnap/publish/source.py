"""Where store paths to publish come from: a Nix store, our own store, or another binary cache."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final, Protocol, Self

import trio

from fusesnap.errors import InvalidConfiguration, InvalidData, PathNotFound
from fusesnap.nix.compression import decompressor
from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.layout import StateLayout
from fusesnap.store.nix_database import NixDatabase
from fusesnap.store.tree_reader import nar_events
from fusesnap.substituter.pool import Offer, SubstituterPool

# Pieces of a NAR that are on their way from a cache to the thread that packs it, 64 KiB to 1 MiB each.
_AHEAD: Final = 16
_AT_ONCE: Final = 64  # questions for narinfos


class Source(Protocol):
    """What store paths are read from. Any number of tasks may ask at once."""

    async def info(self, path: StorePath) -> NarInfo:
        """What is known of ``path``, its signatures included; raises PathNotFound, UntrustedPath, Unavailable."""

    def nar(self, info: NarInfo) -> AbstractContextManager[Iterator[bytes]]:
        """The NAR of ``info`` in pieces, to be read in a thread of trio's.

        What comes is not checked yet. Raises what reading it met with.
        """


class StoreSource:
    """A store on this machine, by Nix's database: Nix's own, or that of a state directory of ours."""

    def __init__(self, real: Path, nix_state: Path, store_dir: StoreDir) -> None:
        """``real`` holds the store paths, ``nix_state`` Nix's directory ``db``."""
        self._real = real
        self._store_dir = store_dir
        self._database = NixDatabase(nix_state, store_dir)

    @classmethod
    def at(cls, directory: Path, store_dir: StoreDir) -> Self:
        """Open the store whose root directory, or whose state directory, is ``directory``.

        Raises InvalidConfiguration where there is none, StorageFailure and Unsupported.
        """
        directory = directory.absolute()
        ours = StateLayout(directory)
        inner = store_dir.path.lstrip("/")
        state = directory / "nix/var/nix"
        for real, nix_state in ((ours.real, ours.nix), (directory / inner, state)):
            if (nix_state / "db/db.sqlite").exists() and real.is_dir():
                return cls(real, nix_state, store_dir)
        raise InvalidConfiguration(
            f"{directory}: no store there: expected a root directory with {inner} and"
            f" nix/var/nix/db/db.sqlite, or a state directory of fusesnap's; --from names it"
        )

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    async def info(self, path: StorePath) -> NarInfo:
        valid = await trio.to_thread.run_sync(self._database.valid_path_info, path)
        if valid is None:
            raise PathNotFound(f"{self._store_dir.format(path)}: not valid in {self._real}")
        return valid.as_narinfo(self._store_dir)

    @contextlib.contextmanager
    def nar(self, info: NarInfo) -> Iterator[Iterator[bytes]]:
        with contextlib.closing(nar_events(self._real / info.store_path.base_name)) as events:  # type: ignore[type-var]
            yield nar_bytes(events)


class CacheSource:
    """Another binary cache, whose paths must be signed by a key that is trusted."""

    def __init__(
        self, pool: SubstituterPool, nursery: trio.Nursery, pay: Callable[[int], Awaitable[None]]
    ) -> None:
        """``nursery`` holds the downloads; ``pay`` is called for so many bytes, and returns when more may come."""
        self._pool = pool
        self._nursery = nursery
        self._pay = pay
        self._offers: dict[StorePath, Offer] = {}

    async def info(self, path: StorePath) -> NarInfo:
        offer = self._offers[path] = await self._pool.find(path)
        return offer.narinfo

    @contextlib.contextmanager
    def nar(self, info: NarInfo) -> Iterator[Iterator[bytes]]:
        send, receive = trio.open_memory_channel[bytes | Exception](_AHEAD)
        cancel = trio.CancelScope()
        trio.from_thread.run_sync(
            self._nursery.start_soon, self._download, self._offers[info.store_path], send, cancel
        )
        try:
            yield _unpacked(info.compression, lambda: trio.from_thread.run(_next, receive))
        finally:
            trio.from_thread.run_sync(cancel.cancel)

    async def _download(
        self,
        offer: Offer,
        send: trio.MemorySendChannel[bytes | Exception],
        cancel: trio.CancelScope,
    ) -> None:
        with cancel:
            async with send:
                try:
                    async with offer.substituter.nar(offer.narinfo) as pieces:
                        async for piece in pieces:
                            await self._pay(len(piece))
                            await send.send(piece)
                except Exception as error:  # noqa: BLE001 - it is raised where the bytes are read
                    await send.send(error)


async def _next(receive: trio.MemoryReceiveChannel[bytes | Exception]) -> bytes:
    try:
        piece = await receive.receive()
    except trio.EndOfChannel:
        return b""
    if isinstance(piece, Exception):
        raise piece
    return piece


def _unpacked(compression: str, read: Callable[[], bytes]) -> Iterator[bytes]:
    unpacking = decompressor(compression)
    while data := read():
        yield from unpacking.decompress(data)
    unpacking.finish()


async def closure_of(source: Source, roots: Iterable[StorePath]) -> list[NarInfo]:
    """What is known of ``roots`` and all that they reference, references before referrers.

    Raises what ``info`` raises.
    """
    found: dict[StorePath, NarInfo] = {}
    frontier = set(roots)
    while frontier:
        infos = await infos_of(source, frontier)
        found |= {info.store_path: info for info in infos}
        frontier = {path for info in infos for path in info.references} - found.keys()
    return in_order(found.values())


async def infos_of(source: Source, paths: Iterable[StorePath]) -> list[NarInfo]:
    """What is known of ``paths``, in order. Raises what ``info`` raises."""
    found: dict[StorePath, NarInfo] = {}
    turns = trio.CapacityLimiter(_AT_ONCE)

    async def ask(path: StorePath) -> None:
        async with turns:
            found[path] = await source.info(path)

    async with trio.open_nursery() as nursery:
        for path in dict.fromkeys(paths):
            nursery.start_soon(ask, path)
    return in_order(found.values())


def in_order(infos: Iterable[NarInfo]) -> list[NarInfo]:
    """Sort so that references come before referrers. References that are not among ``infos`` do not count.

    Raises InvalidData where references go round in a circle.
    """
    by_path = {info.store_path: info for info in infos}
    sorter = TopologicalSorter(
        {
            path: sorted(set(info.references).intersection(by_path) - {path})
            for path, info in sorted(by_path.items())
        }
    )
    try:
        return [by_path[path] for path in sorter.static_order()]
    except CycleError as error:
        raise InvalidData(f"store paths reference one another: {error.args[1]}") from None
