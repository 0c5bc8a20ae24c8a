"""Finds the startup bundle of a closure in binary caches, and takes over what it says.

A bundle is only ever a saving. Whatever is wrong with one is logged, and the closure is had as without: by narinfos,
indexes, chunks and traces. Narinfos and indexes of a bundle are trusted by their own signatures, as if they had been
asked for.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import trio

from fusesnap.errors import FusesnapError, InvalidData, PathNotFound, UntrustedPath
from fusesnap.fetch.bundle_stream import BundleStream
from fusesnap.fetch.chunked_path import ChunkedPath
from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.events import ObserveFetch, unobserved
from fusesnap.fetch.link import Link
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_bundle import MAX_BUNDLE_SIZE, BundleHeader, BundleParser, file_name
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.trust import check_trust
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.base import Bookmark, StoredFile

log = logging.getLogger(__name__)

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Seconds for which a cache is not asked again for a bundle that it has not, or that was no good: as for a trace.
ABSENT_FOR: Final = 3600.0
# Seconds for which a bundle that was taken is not asked for again: longer than a pod that fails is started anew.
TAKEN_FOR: Final = 600.0
# Indexes that are taken over beside those of the paths that the start reads: each is two descriptors, and memory.
UNTOUCHED_AT_MOST: Final = 200
# Closures that are remembered: as many as a node has images, and far more.
_REMEMBERED: Final = 4096


class BundleCache(Protocol):
    """A binary cache, as far as it matters here; see ``WatchedSubstituter``."""

    @property
    def url(self) -> str:
        """Its name in messages."""
        ...

    def remember(self, infos: Iterable[NarInfo]) -> None:
        """These narinfos are its own."""
        ...

    def stream(
        self, file: StoredFile, bookmark: Bookmark
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read a file from where the bookmark says."""
        ...


@dataclass(frozen=True, slots=True)
class BundleFile:
    """The file of a bundle: nobody says how large it is before it comes."""

    url: str
    file_size: int | None = None
    nar_size: int = MAX_BUNDLE_SIZE


class Bundles:
    """Those of one process. ``nursery`` holds the streams; ``within``: seconds that a header is waited for."""

    def __init__(
        self,
        caches: Sequence[BundleCache],
        store: LocalStore,
        chunked: ChunkedPaths,
        keys: TrustedKeys,
        link: Link,
        nursery: trio.Nursery,
        within: float,
        observe: ObserveFetch = unobserved,
    ) -> None:
        self._caches = caches
        self._store = store
        self._chunked = chunked
        self._keys = keys
        self._link = link
        self._nursery = nursery
        self._within = within
        self._observe = observe
        self._searches: dict[ClosureDigest, _Search] = {}
        self._not_before: dict[tuple[ClosureDigest, str], float] = {}
        self._taken: dict[ClosureDigest, _Taken] = {}

    @property
    def are_coming(self) -> bool:
        """Whether any is being asked for, or on its way."""
        return bool(self._searches)

    async def find(self, closure: ClosureDigest, paths: Collection[StorePath]) -> bool:
        """Return when what a bundle of ``closure`` says is taken over, or there is none. True where it brings a start.

        Its bytes go on coming after that. Nothing is asked for a closure of which all is here, or of which a bundle
        was taken not long ago.
        """
        search = self._searches.get(closure)
        if search is None:
            taken = self._taken.get(closure)
            if taken is not None and taken.until > trio.current_time():
                return taken.brings
            there = await trio.to_thread.run_sync(self._store.committed_among, paths)
            if len(there) == len(paths):
                return False
            search = self._searches.get(closure)
        if search is None:
            search = self._searches[closure] = _Search()
            self._nursery.start_soon(self._search, closure, search, name=f"bundle of {closure}")
        with trio.move_on_after(self._within):
            await search.told.wait()
        return search.brings

    async def _search(self, closure: ClosureDigest, search: _Search) -> None:
        try:
            for cache in self._caches:
                if await self._take_from(cache, closure, search):
                    return
        finally:
            del self._searches[closure]
            search.told.set()

    async def _take_from(self, cache: BundleCache, closure: ClosureDigest, search: _Search) -> bool:
        """Take the bundle that a cache has, to its end; false where it has none that can be used."""
        if self._not_before.get((closure, cache.url), 0.0) > trio.current_time():
            return False
        name = file_name(closure)
        try:
            await self._stream(cache, closure, search).run(
                lambda bookmark: cache.stream(BundleFile(name), bookmark)
            )
        except PathNotFound:
            self._leave_alone(closure, cache)
        except FusesnapError as error:
            log.warning("%s: %s is not used any further: %s", cache.url, name, error)
            if isinstance(error, InvalidData | UntrustedPath):  # a wrong answer stays wrong
                self._leave_alone(closure, cache)
        else:
            taken = _Taken(trio.current_time() + TAKEN_FOR, search.brings)
            _remember(self._taken, closure, taken)
        return search.told.is_set()

    def _leave_alone(self, closure: ClosureDigest, cache: BundleCache) -> None:
        until = trio.current_time() + ABSENT_FOR
        _remember(self._not_before, (closure, cache.url), until)

    def _stream(self, cache: BundleCache, closure: ClosureDigest, search: _Search) -> BundleStream:
        async def take(header: BundleHeader) -> Mapping[StorePath, ChunkedPath]:
            if header.closure != closure:
                raise InvalidData(f"startup bundle of closure {header.closure}, expected {closure}")
            cache.remember(header.narinfos)
            found = await self._take_over(header)
            search.brings = bool(found)
            return found

        parser = BundleParser(self._keys, self._store.store_dir)
        room, told = self._store.room, search.told.set
        return BundleStream(cache.url, parser, take, self._link, room, self._observe, told)

    # ---------------------------------------------------------------- header

    async def _take_over(self, header: BundleHeader) -> Mapping[StorePath, ChunkedPath]:
        """Pin what is trusted, and open those paths of which the bundle has bytes."""
        pinned = await trio.to_thread.run_sync(self._pin, header.narinfos)
        touched = {extent.path for extent in header.extents}
        found: dict[StorePath, ChunkedPath] = {}
        rest: list[tuple[StorePath, bytes]] = []
        for path, index in header.indexes:
            if path not in pinned:
                continue
            if path not in touched:
                rest.append((path, index))
            elif (chunked := await self._chunked.given(path, index)) is not None:
                found[path] = chunked
        self._nursery.start_soon(self._learn, rest[:UNTOUCHED_AT_MOST])
        return found

    async def _learn(self, indexes: Iterable[tuple[StorePath, bytes]]) -> None:
        for path, index in indexes:
            await self._chunked.given(path, index)

    def _pin(self, infos: Iterable[NarInfo]) -> set[StorePath]:
        """Those of ``infos`` whose NAR is, or becomes, the one in use, and that are not here yet. Blocking."""
        wanted = {info.store_path: info for info in infos}
        for path in self._store.committed_among(wanted):
            del wanted[path]
        known = {path: self._store.pinned(path) for path in wanted}
        new = [
            info for path, info in wanted.items() if known[path] is None and self._is_trusted(info)
        ]
        self._store.pins(new)
        pinned = {info.store_path for info in new}
        for path, pin in known.items():
            if pin is not None and pin.info.nar_hash == wanted[path].nar_hash:
                pinned.add(path)
        return pinned

    def _is_trusted(self, info: NarInfo) -> bool:
        try:
            check_trust(info, self._keys)
        except UntrustedPath as error:
            log.warning("startup bundle: a narinfo is not used: %s", error)
            return False
        return True


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Keep ``value``; of too many the oldest are forgotten."""
    known.pop(key, None)
    known[key] = value
    while len(known) > _REMEMBERED:
        del known[next(iter(known))]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A bundle that need not be asked for before ``until``; ``brings``: it had bytes of a start, which were missing."""

    until: float
    brings: bool


class _Search:
    """The search for the bundle of one closure; ``told`` when what it says is here, or there is none."""

    def __init__(self) -> None:
        self.told = trio.Event()
        self.brings = False
