"""Which store paths are fetched by the chunk: those of which a cache has an index that a trusted key has signed.

Whatever is wrong with an index or with a chunk, the path is fetched whole instead, from whichever cache has it, and is
not asked for by the chunk again for a while.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import trio

from fusesnap.errors import FusesnapError, InvalidData, PathNotFound, UntrustedPath
from fusesnap.fetch.acceptance import Acceptance
from fusesnap.fetch.chunked_path import ChunkedPath
from fusesnap.fetch.events import ObserveFetch, unobserved
from fusesnap.fetch.flight import FlightState
from fusesnap.fetch.guesses import Guesses, SmallFiles
from fusesnap.fetch.link import Link
from fusesnap.fetch.rebuilding import Rebuilding
from fusesnap.fetch.seeds import Seeds
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.nar_index import MAX_INDEX_SIZE, NarIndex, parse_nar_index
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore, Pin
from fusesnap.store.partial_nars import PartialNar, PartialNars
from fusesnap.substituter.pool import Offer, SubstituterPool
from fusesnap.substituter.retry import PartsUnsupported

log = logging.getLogger(__name__)

# Two descriptors each, and an index in memory.
OPEN_AT_MOST: Final = 256
# Indexes that are kept in memory until their path is looked for, a few KiB each.
TOLD_AT_MOST: Final = 1024
# Seconds for which a path is fetched whole after its index, or a chunk, was no good.
WHOLE_FOR: Final = 300.0
# The part of a path that may be left to fetch for it to be worth to go by the chunk: one stream has fewer round trips.
LEFT_AT_MOST: Final = 0.75
# How large an index may be, as a part of the file, to be fetched only to know what can be made of what is here.
INDEX_AT_MOST: Final = 0.25
# Threads that make chunks, for all paths: it is work for the disk and for SHA-256.
REBUILDERS: Final = 2
# Seconds for which a cache that sends files whole is not asked for parts.
NO_PARTS_FOR: Final = 3600.0


class ChunkedPaths:
    """Those of one process. ``scattered``: small files are fetched that nobody has asked for, see ``Guesses``."""

    def __init__(
        self,
        store: LocalStore,
        pool: SubstituterPool,
        partials: PartialNars,
        keys: TrustedKeys,
        link: Link,
        nursery: trio.Nursery,
        stall: float,
        observe: ObserveFetch = unobserved,
        *,
        scattered: bool = True,
    ) -> None:
        self._store = store
        self._scattered = scattered
        self._observe = observe
        self._pool = pool
        self._partials = partials
        self.acceptance = Acceptance(store, partials)
        self._keys = keys
        self._link = link
        self._nursery = nursery
        self._stall = stall
        self._seeds = Seeds(store, partials, keys)
        self._rebuilders = trio.CapacityLimiter(REBUILDERS)
        self._open: OrderedDict[StorePath, ChunkedPath] = OrderedDict()
        self._finding: dict[StorePath, trio.Event] = {}
        self._whole_until: dict[StorePath, float] = {}
        self._no_parts_until: dict[str, float] = {}
        self._told: OrderedDict[StorePath, bytes] = OrderedDict()

    def flights(self) -> list[FlightState]:
        """What is being fetched of this moment."""
        flights = [path.flight for path in self._open.values()]
        return [flight.state() for flight in flights if flight is not None]

    async def find(self, path: StorePath) -> ChunkedPath | None:
        """``path``, if it can be fetched by the chunk; None where it is to be fetched whole.

        No cache is asked unless the path was pinned as one that has an index.
        """
        while (event := self._finding.get(path)) is not None:
            await event.wait()
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
            return known
        if self._whole_until.get(path, 0.0) > trio.current_time():
            return None
        async with self._alone(path):
            found = await self._find(path)
            if found is not None:
                self._keep(path, found)
            return found

    def opened(self, path: StorePath) -> ChunkedPath | None:
        """``path``, if it was found before and is still open."""
        return self._open.get(path)

    def tell(self, indexes: Iterable[tuple[StorePath, bytes]]) -> None:
        """Remember these indexes, so that no cache is asked for them. They are checked when they are needed."""
        for path, data in indexes:
            if path not in self._open:
                self._told[path] = data
        while len(self._told) > TOLD_AT_MOST:
            self._told.popitem(last=False)

    async def given(self, path: StorePath, data: bytes) -> ChunkedPath | None:
        """``path``, which is pinned, by the index that ``data`` are; None where that is no good, or it is here whole.

        What is known of it already counts for more.
        """
        while (event := self._finding.get(path)) is not None:
            await event.wait()
        known, pin = self._open.get(path), self._store.pinned(path)
        if known is not None or pin is None or self._store.is_committed(path):
            return known
        async with self._alone(path):
            try:
                found = await self._saved(pin) or await self._by_index(pin, data)
            except FusesnapError as error:
                log.warning("%s: its index in a startup bundle is not used: %s", path, error)
                return None
            self._keep(path, found)
            return found

    async def begun(self, path: StorePath) -> ChunkedPath | None:
        """``path``, if enough of it is here that the rest is better had by the chunk.

        That is anything that was fetched of it, or is being fetched; and what can be made of other paths, if that is a
        quarter. It takes an index to know, which is not asked for where nothing is here that has a name like it.
        """
        known = path in self._open or self._partials.is_begun(path)
        if not known and not await self._promises(path):
            return None
        found = await self.find(path)
        if found is None:
            return None
        await found.adopt()
        if not (found.is_empty and found.is_idle):  # what is on its way need not come twice
            return found
        await found.rebuild()
        worth = not found.is_empty and found.remaining <= found.file_size * LEFT_AT_MOST
        return found if worth else None

    async def _promises(self, path: StorePath) -> bool:
        """Whether an index of ``path`` is small enough, and there is something that may be like it."""
        pin = self._store.pinned(path)
        if pin is None or not self._is_indexed(pin.info):
            return False
        reference, size = _reference(pin.info), pin.info.file_size or pin.info.nar_size
        if reference is None or reference.size > size * INDEX_AT_MOST:
            return False
        return bool(await self._seeds.named_like(path))

    async def give_up(self, chunked: ChunkedPath, error: FusesnapError) -> None:
        """A chunk could not be had: fetch the path whole for a while. What was shown stays what it is."""
        path, now = chunked.path, trio.current_time()
        # Of many who read at once each may meet with it.
        level = logging.DEBUG if self._whole_until.get(path, 0.0) > now else logging.WARNING
        log.log(level, "%s: is fetched whole: %s", path, error)
        self._whole_until[path] = now + WHOLE_FOR
        await self._report(path, error)
        if self._open.get(path) is chunked:
            del self._open[path]
            chunked.close()

    async def committed(self, path: StorePath) -> None:
        """The path is in the store: its parts are not needed any more."""
        self._whole_until.pop(path, None)
        chunked = self._open.pop(path, None)
        if chunked is None and not self._partials.is_begun(path):
            return
        if chunked is not None:
            chunked.close()
        await trio.to_thread.run_sync(self._partials.remove, path)

    def close_unused(self, seconds: float) -> None:
        """Let go of the files of paths that were not read for so long: collectors leave open ones alone."""
        before = trio.current_time() - seconds
        for chunked in [each for each in self._open.values() if each.is_idle]:
            if chunked.used <= before:
                del self._open[chunked.path]
                chunked.close()

    # ------------------------------------------------------------ private

    @asynccontextmanager
    async def _alone(self, path: StorePath) -> AsyncIterator[None]:
        event = self._finding[path] = trio.Event()
        try:
            yield
        finally:
            del self._finding[path]
            event.set()

    async def _find(self, path: StorePath) -> ChunkedPath | None:
        pin = self._store.pinned(path)
        if pin is None or not self._is_indexed(pin.info):
            return None
        try:
            known = await self._saved(pin) or await self._told_of(pin)
            return known or await self._offered(path)
        except FusesnapError as error:
            log.warning("%s: is fetched whole: %s", path, error)
            self._whole_until[path] = trio.current_time() + WHOLE_FOR
            return None

    def _is_indexed(self, info: NarInfo) -> bool:
        """Whether there is an index that a trusted key may have signed."""
        reference = _reference(info)
        return reference is not None and bool(self._keys.named(reference.key_name))

    async def _saved(self, pin: Pin) -> ChunkedPath | None:
        """By the index that is here from an earlier time; no cache is asked."""
        path = pin.info.store_path
        data = await trio.to_thread.run_sync(self._partials.index, path)
        if data is None:
            return None
        try:
            index = await self._parse(data, pin.info)
        except (InvalidData, UntrustedPath) as error:
            log.warning("%s: the index that is here is of no use any more: %s", path, error)
            return None
        return await self._opened(pin, index, data)

    async def _told_of(self, pin: Pin) -> ChunkedPath | None:
        """By the index that somebody told, if it is any good."""
        data = self._told.pop(pin.info.store_path, None)
        try:
            return None if data is None else await self._by_index(pin, data)
        except (InvalidData, UntrustedPath) as error:
            log.warning("%s: an index that was told is not used: %s", pin.info.store_path, error)
            return None

    async def _by_index(self, pin: Pin, data: bytes) -> ChunkedPath:
        return await self._opened(pin, await self._parse(data, pin.info), data)

    async def _offered(self, path: StorePath) -> ChunkedPath | None:
        """By the index that the cache has which is asked first; raises what is wrong with it."""
        offer = await self._pool.find(path)
        url, reference = offer.substituter.url, _reference(offer.narinfo)
        if reference is None or not self._is_indexed(offer.narinfo):
            return None
        if self._no_parts_until.get(url, 0.0) > trio.current_time():
            return None
        pin = await self.acceptance.pin(offer)
        data = await offer.substituter.small_file(
            reference.url, min(reference.size, MAX_INDEX_SIZE)
        )
        try:
            index = await self._parse(data, offer.narinfo)
        except (InvalidData, UntrustedPath) as error:
            raise type(error)(f"{url}: {error}") from None
        return await self._opened(pin, index, data)

    async def _parse(self, data: bytes, info: NarInfo) -> NarIndex:
        """The index, which is of the NAR that ``info`` describes."""
        index = await trio.to_thread.run_sync(
            parse_nar_index, data, self._keys, self._store.store_dir
        )
        index.check_matches(info)
        return index

    async def _opened(self, pin: Pin, index: NarIndex, data: bytes) -> ChunkedPath:
        rebuilding = Rebuilding(index, self._seeds, self._rebuilders)
        await rebuilding.look()

        def open_() -> tuple[PartialNar, SmallFiles | None]:
            small = SmallFiles.of(index) if self._scattered else None
            return self._partials.open(pin, data, index.chunks), small

        nar, small = await trio.to_thread.run_sync(open_)
        offers = _Offers(self._pool, pin)
        return ChunkedPath(
            pin,
            index,
            nar,
            offers.find,
            self._link,
            self._nursery,
            self._stall,
            self._observe,
            room=self._store.room,
            rebuilding=rebuilding,
            guesses=Guesses(index.chunks, small),
        )

    def _keep(self, path: StorePath, found: ChunkedPath) -> None:
        self._open[path] = found
        self._seeds.begun(path)
        for old in [each for each in self._open.values() if each.is_idle]:
            if len(self._open) <= OPEN_AT_MOST or old is found:
                break
            del self._open[old.path]
            old.close()

    async def _report(self, path: StorePath, error: FusesnapError) -> None:
        try:
            offer = await self._pool.find(path)
        except FusesnapError:
            return
        if isinstance(error, PartsUnsupported):
            self._no_parts_until[offer.substituter.url] = trio.current_time() + NO_PARTS_FOR
        elif isinstance(error, InvalidData | PathNotFound):
            await self._pool.report_bad(offer, error)


class _Offers:
    """Who has the NAR of one pin: asked for once, when the first chunk is."""

    def __init__(self, pool: SubstituterPool, pin: Pin) -> None:
        self._pool = pool
        self._pin = pin
        self._offer: Offer | None = None

    async def find(self) -> Offer:
        if self._offer is None:
            offer = await self._pool.find(self._pin.info.store_path)
            if offer.narinfo.nar_hash != self._pin.info.nar_hash:
                raise InvalidData(
                    f"{offer.substituter.url}: {self._pin.info.store_path}: offers a NAR that hashes to"
                    f" {offer.narinfo.nar_hash}, but the path is in use as {self._pin.info.nar_hash}"
                )
            self._offer = offer
        return self._offer


def _reference(info: NarInfo) -> IndexReference | None:
    try:
        return IndexReference.of(info)
    except InvalidData as error:
        log.warning("%s: has no index: %s", info.store_path, error)
        return None
