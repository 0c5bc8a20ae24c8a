"""Finds the startup bundle of a closure in binary caches, and takes over what it says.

A bundle is only ever a saving. Whatever is wrong with one is logged, and the closure is had as without: by narinfos,
indexes, chunks and traces. Its signature, by a trusted key, vouches for the narinfos in it: whoever has that key could
have signed each of them. Indexes are trusted by their own.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
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
from fusesnap.nix.references import reached
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_bundle import (
    MAX_BUNDLE_SIZE,
    BundledExtent,
    BundleHeader,
    BundleParser,
    file_name,
    root_file_name,
)
from fusesnap.nix.store_path import HashPart, StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.base import Bookmark, StoredFile

log = logging.getLogger(__name__)

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Seconds for which a cache is not asked again for a bundle that it has not, or that was no good: as for a trace.
ABSENT_FOR: Final = 3600.0
# Seconds for which a bundle that was taken is not asked for again: longer than a pod that fails is started anew.
TAKEN_FOR: Final = 600.0
# Indexes that are taken over beside those of the paths that the start reads: they take memory.
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

    def save(self) -> None:
        """Have other processes know what it remembers. Blocking."""
        ...

    def stream(
        self, file: StoredFile, bookmark: Bookmark
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read a file from where the bookmark says."""
        ...


@dataclass(frozen=True, slots=True)
class Told:
    """What a bundle says of paths that are not here: the sizes of their NARs, in bytes, which are pinned.

    ``brings``: it has bytes of a start, which were missing.
    """

    nar_sizes: Mapping[StorePath, int] = field(default_factory=dict)
    brings: bool = False


NOTHING_TOLD: Final = Told()


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
        self._searches: dict[str, _Search] = {}
        self._not_before: dict[tuple[str, str], float] = {}
        self._taken: dict[str, _Taken] = {}

    @property
    def are_coming(self) -> bool:
        """Whether any is being asked for, or on its way."""
        return bool(self._searches)

    async def find(self, closure: ClosureDigest, paths: Collection[StorePath]) -> Told:
        """Return when what a bundle of ``closure``, which are ``paths``, says is taken over, or there is none.

        Its bytes go on coming after that. Nothing is asked for a closure of which all is here, or of which a bundle,
        be it one of more, was taken not long ago.
        """
        there = await trio.to_thread.run_sync(self._store.committed_among, paths)
        missing = set(paths) - there
        if not missing:
            return NOTHING_TOLD
        taken = next((told for told in self._told() if missing <= told.nar_sizes.keys()), None)
        return taken or await self._find(_Wanted.of_closure(closure))

    async def find_of(self, root: HashPart) -> Told:
        """As :meth:`find`, for the closure of the path with this hash part, where only that is known.

        Nothing is asked where that path is here.
        """
        if await trio.to_thread.run_sync(self._is_here, root):
            return NOTHING_TOLD
        return await self._find(_Wanted.of_root(root))

    def _is_here(self, root: HashPart) -> bool:
        path = self._store.with_hash_part(root)
        return path is not None and self._store.is_committed(path)

    def _told(self) -> Iterable[Told]:
        now = trio.current_time()
        yield from (taken.told for taken in self._taken.values() if taken.until > now)
        yield from (search.told for search in self._searches.values())

    async def _find(self, wanted: _Wanted) -> Told:
        taken = self._taken.get(wanted.name)
        if taken is not None and taken.until > trio.current_time():
            return taken.told
        search = self._searches.get(wanted.name)
        if search is None:
            search = self._searches[wanted.name] = _Search()
            self._nursery.start_soon(self._search, wanted, search, name=wanted.name)
        with trio.move_on_after(self._within):
            await search.over.wait()
        return search.told

    async def _search(self, wanted: _Wanted, search: _Search) -> None:
        try:
            for cache in self._caches:
                if await self._take_from(cache, wanted, search):
                    return
        finally:
            del self._searches[wanted.name]
            search.over.set()

    async def _take_from(self, cache: BundleCache, wanted: _Wanted, search: _Search) -> bool:
        """Take the bundle that a cache has, to its end; false where it has none that can be used."""
        name = wanted.name
        if self._not_before.get((name, cache.url), 0.0) > trio.current_time():
            return False
        try:
            await self._stream(cache, wanted, search).run(
                lambda bookmark: cache.stream(BundleFile(name), bookmark)
            )
        except PathNotFound:
            self._leave_alone(name, cache)
        except FusesnapError as error:
            log.warning("%s: %s is not used any further: %s", cache.url, name, error)
            if isinstance(error, InvalidData | UntrustedPath):  # a wrong answer stays wrong
                self._leave_alone(name, cache)
        else:
            taken = _Taken(trio.current_time() + TAKEN_FOR, search.told)
            _remember(self._taken, name, taken)
        return search.over.is_set()

    def _leave_alone(self, name: str, cache: BundleCache) -> None:
        _remember(self._not_before, (name, cache.url), trio.current_time() + ABSENT_FOR)

    def _stream(self, cache: BundleCache, wanted: _Wanted, search: _Search) -> BundleStream:
        async def take(header: BundleHeader) -> Mapping[StorePath, ChunkedPath]:
            wanted.check(header)
            pinned = await trio.to_thread.run_sync(self._learn_narinfos, cache, header.narinfos)
            found = await self._take_over(header, pinned)
            search.told = Told(pinned, bool(found))
            return found

        parser = BundleParser(self._keys, self._store.store_dir)
        room, over = self._store.room, search.over.set
        return BundleStream(cache.url, parser, take, self._link, room, self._observe, over)

    # ---------------------------------------------------------------- header

    def _learn_narinfos(self, cache: BundleCache, infos: Sequence[NarInfo]) -> dict[StorePath, int]:
        """Have them known, also to other processes; returns those that are pinned, with the sizes. Blocking."""
        cache.remember(infos)
        cache.save()
        pinned = self._pin(infos)
        return {info.store_path: info.nar_size for info in infos if info.store_path in pinned}

    async def _take_over(
        self, header: BundleHeader, pinned: Collection[StorePath]
    ) -> Mapping[StorePath, ChunkedPath]:
        """Open those paths of which the bundle has bytes."""
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
        self._chunked.tell(rest[:UNTOUCHED_AT_MOST])
        await self._rebuild(header.extents, found)
        return found

    async def _rebuild(
        self, extents: Iterable[BundledExtent], found: Mapping[StorePath, ChunkedPath]
    ) -> None:
        """Make what of the start can be made of what is here: after a rebuild of something low that is nearly all."""
        ranges: dict[StorePath, list[tuple[int, int]]] = {path: [] for path in found}
        for extent in extents:
            if extent.path in ranges:
                ranges[extent.path].append((extent.offset, extent.end))
        async with trio.open_nursery() as nursery:
            for path, chunked in found.items():
                nursery.start_soon(chunked.rebuild, ranges[path])

    def _pin(self, infos: Iterable[NarInfo]) -> set[StorePath]:
        """Those of ``infos`` whose NAR is, or becomes, the one in use, and that are not here yet. Blocking."""
        wanted = {info.store_path: info for info in infos}
        for path in self._store.committed_among(wanted):
            del wanted[path]
        known = self._store.pinned_among(wanted)
        self._store.pins(info for path, info in wanted.items() if path not in known)
        others = {path for path, pin in known.items() if pin.info.nar_hash != wanted[path].nar_hash}
        return wanted.keys() - others


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Keep ``value``; of too many the oldest are forgotten."""
    known.pop(key, None)
    known[key] = value
    while len(known) > _REMEMBERED:
        del known[next(iter(known))]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A bundle that need not be asked for before ``until``."""

    until: float
    told: Told


class _Search:
    """The search for one bundle; ``over`` when what it says is here, or there is none."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.told = NOTHING_TOLD


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A bundle by the name of its file; ``check`` raises :class:`InvalidData` where a header is another's."""

    name: str
    check: Callable[[BundleHeader], None]

    @classmethod
    def of_closure(cls, closure: ClosureDigest) -> _Wanted:
        """The one of ``closure``."""

        def check(header: BundleHeader) -> None:
            if header.closure != closure:
                raise InvalidData(f"startup bundle of closure {header.closure}, expected {closure}")

        return cls(file_name(closure), check)

    @classmethod
    def of_root(cls, root: HashPart) -> _Wanted:
        """The one of the closure of the path with this hash part."""

        def check(header: BundleHeader) -> None:
            narinfos = {info.store_path: info for info in header.narinfos}
            roots = [path for path in narinfos if path.hash_part == root.hash_part]
            if not roots or reached(roots, narinfos) != narinfos.keys():
                raise InvalidData(
                    f"startup bundle of closure {header.closure}, expected that of {root}"
                )

        return cls(root_file_name(root), check)
