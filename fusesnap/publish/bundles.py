"""Writes startup bundles into a cache: what is published of a closure, and what its start reads, in one object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from fusesnap.errors import InvalidData, PathNotFound, UntrustedPath
from fusesnap.fetch.traces.search import file_name as trace_file_name
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.nar_index import MAX_INDEX_SIZE, parse_nar_index
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import SecretKey, TrustedKeys
from fusesnap.nix.startup_bundle import BundleHeader, BundleParser, write_bundle
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.startup_trace_text import MAX_TRACE_SIZE, check_trace_trust, parse_trace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Tree
from fusesnap.publish.closures import BundledClosure
from fusesnap.publish.destination import BUNDLE, Destination, read_whole
from fusesnap.publish.extents import Part, check_nars, contents_of, parts_of, whole
from fusesnap.publish.source import Source
from fusesnap.publish.traces import check_closures, check_complete

log = logging.getLogger(__name__)

# Indexes that a start does not need come before what it does need. As long as they are less than so much of the rest
# they are carried along, and spare a round trip to who reads there later.
UNTOUCHED_SHARE: Final = 1 / 16
_AT_ONCE: Final = 16  # indexes that are read


@dataclass(frozen=True, slots=True)
class PublishedBundle:
    """What became of the bundle of one closure.

    ``kept``: it was there. ``paths``, ``indexes`` and ``extents`` are how many it has, ``size`` its bytes, ``uploaded``
    what was sent under all ``names``.
    """

    closure: ClosureDigest
    names: tuple[str, ...]
    kept: bool
    paths: int
    indexes: int
    extents: int
    size: int
    uploaded: int


@dataclass(frozen=True, slots=True)
class _Existing:
    """A bundle that is in the cache, signed with our key; ``size`` in bytes."""

    header: BundleHeader
    size: int


class Bundler:
    """Bundles what is published at one destination, with one key.

    ``keys`` are those whose traces are taken from the cache, our own besides. A trace that does not have all that its
    start read is taken only where ``allow_partial``.
    """

    def __init__(
        self,
        source: Source,
        destination: Destination,
        key: SecretKey,
        keys: TrustedKeys,
        store_dir: StoreDir,
        *,
        allow_partial: bool,
    ) -> None:
        self._source = source
        self._destination = destination
        self._key = key
        self._own = TrustedKeys((key.public_key(),))
        self._keys = TrustedKeys((key.public_key(), *keys.keys))
        self._store_dir = store_dir
        self._allow_partial = allow_partial

    def check(
        self,
        traces: Mapping[ClosureDigest, StartupTrace],
        closures: Iterable[BundledClosure],
    ) -> None:
        """Look, before anything is published, whether ``traces`` can be used.

        Raises :class:`InvalidData` for one that is of none of ``closures``, or lacks something.
        """
        check_closures(traces, (closure.digest for closure in closures))
        for trace in traces.values():
            if not self._allow_partial:
                check_complete(trace)

    async def write(
        self,
        closures: Iterable[BundledClosure],
        traces: Mapping[ClosureDigest, StartupTrace],
        tell: Callable[[PublishedBundle], None] = lambda _: None,
    ) -> list[PublishedBundle]:
        """Write a bundle for each of ``closures``, whose paths are published, with what ``traces`` say is read.

        Of a closure without a trace, that of the cache is used, else what its bundle has by now. ``tell`` is told of
        each that is done. Raises the first error met with.
        """
        results = []
        for closure in closures:
            known = (traces[each] for each in closure.traceable if each in traces)
            results.append(await self._write(closure, next(known, None)))
            tell(results[-1])
        return results

    async def _write(self, closure: BundledClosure, trace: StartupTrace | None) -> PublishedBundle:
        there = [await self._existing(name) for name in closure.file_names]
        known = next((each for each in there if each is not None), None)
        indexes = _Indexes(self._destination, self._own, self._store_dir, closure, known)
        parts = await self._parts(closure, trace, known, indexes)
        indexed = _indexed(closure, parts)
        alike = all(known == each for each in there)
        if known is not None and alike and _is_same(known.header, closure, indexed, parts):
            return _published(closure, known.header, known.size, uploaded=0)
        header = BundleHeader(closure.digest, closure.narinfos, await indexes.all(indexed), ())
        return await self._made(closure, header, parts)

    async def _made(
        self, closure: BundledClosure, header: BundleHeader, parts: Sequence[Part]
    ) -> PublishedBundle:
        contents = await self._contents(closure, parts)
        extents = tuple(map(Part.extent, parts, contents))
        header = BundleHeader(header.closure, header.narinfos, header.indexes, extents)
        data = await trio.to_thread.run_sync(
            write_bundle, header, contents, self._key, self._store_dir
        )
        for name in closure.file_names:
            await self._destination.put_bytes(name, data, BUNDLE)
        uploaded = len(data) * len(closure.file_names)
        return _published(closure, header, len(data), uploaded)

    async def _existing(self, name: str) -> _Existing | None:
        """The bundle that is in the cache under ``name``; None where it is none of ours, and is to be replaced."""
        parser = BundleParser(self._own, self._store_dir)
        size = await self._destination.size(name)
        if size is None:
            return None
        try:
            async with aclosing(self._destination.read(name)) as pieces:
                async for piece in pieces:
                    event = await trio.to_thread.run_sync(next, parser.feed(piece), None)
                    if isinstance(event, BundleHeader):
                        return _Existing(event, size)
            parser.finish()
        except (InvalidData, UntrustedPath, PathNotFound) as error:
            log.warning("%s: %s: %s; written anew", self._destination.url, name, error)
        return None

    async def _parts(
        self,
        closure: BundledClosure,
        trace: StartupTrace | None,
        known: _Existing | None,
        indexes: _Indexes,
    ) -> list[Part]:
        """What of NARs the bundle is to carry."""
        narinfos = {info.store_path: info for info in closure.narinfos}
        trace = trace or await self._trace_there(closure, narinfos)
        if trace is not None:
            check_nars(trace, narinfos)
            trees = await indexes.trees(traced.path for traced in trace.paths)
            # An image that shows what it references is read before any of that.
            image = closure.root if trace.closure == closure.shown else None
            first = whole(narinfos[image]) if image is not None else ()
            return parts_of(trace, trees, first)
        if known is None or _nars(known.header.narinfos) != _nars(closure.narinfos):
            return []
        return [Part.of(extent) for extent in known.header.extents]

    async def _trace_there(
        self, closure: BundledClosure, narinfos: Mapping[StorePath, NarInfo]
    ) -> StartupTrace | None:
        """The trace that is published beside the closure, if it is one that can be used."""
        for digest in closure.traceable:
            trace = await self._trace_of(digest, narinfos)
            if trace is not None:
                return trace
        return None

    async def _trace_of(
        self, digest: ClosureDigest, narinfos: Mapping[StorePath, NarInfo]
    ) -> StartupTrace | None:
        name = trace_file_name(digest)
        try:
            data = await read_whole(self._destination, name, MAX_TRACE_SIZE)
            if data is None:
                return None
            trace = parse_trace(data)
            check_closures({trace.closure: trace}, [digest])
            check_trace_trust(trace, self._keys)
            check_nars(trace, narinfos)
            if not self._allow_partial:
                check_complete(trace)
        except (InvalidData, UntrustedPath) as error:
            log.warning("%s: %s is not used: %s", self._destination.url, name, error)
            return None
        return trace

    async def _contents(self, closure: BundledClosure, parts: Sequence[Part]) -> list[bytes]:
        """The bytes of ``parts``, from the source; NARs are held against what the cache says of them."""
        narinfos = {info.store_path: info for info in closure.narinfos}
        numbers: dict[StorePath, list[int]] = {}
        for number, part in enumerate(parts):
            numbers.setdefault(part.path, []).append(number)
        found: list[bytes] = [b""] * len(parts)
        for path, own in numbers.items():
            read = partial(self._read, await self._source.info(path), [parts[n] for n in own])
            contents = await trio.to_thread.run_sync(read, narinfos[path])
            for number, data in zip(own, contents, strict=True):
                found[number] = data
        return found

    def _read(self, source: NarInfo, parts: Sequence[Part], info: NarInfo) -> list[bytes]:
        with self._source.nar(source) as pieces:
            return contents_of(pieces, parts, info)


class _Indexes:
    """The NAR indexes of one closure, from the bundle that is there where that has the same, else from the cache."""

    def __init__(
        self,
        destination: Destination,
        keys: TrustedKeys,
        store_dir: StoreDir,
        closure: BundledClosure,
        known: _Existing | None,
    ) -> None:
        self._destination = destination
        self._keys = keys
        self._store_dir = store_dir
        self._narinfos = {info.store_path: info for info in closure.narinfos}
        self._there: dict[StorePath, bytes] = {}
        if known is not None:
            same = {info.store_path for info in known.header.narinfos if self._is_same(info)}
            self._there = {path: data for path, data in known.header.indexes if path in same}

    async def all(self, paths: Iterable[StorePath]) -> tuple[tuple[StorePath, bytes], ...]:
        """The indexes of ``paths``, as the cache has them."""
        found: dict[StorePath, bytes] = {}
        turns = trio.CapacityLimiter(_AT_ONCE)

        async def read(path: StorePath) -> None:
            async with turns:
                found[path] = await self._one(path)

        wanted = list(paths)
        async with trio.open_nursery() as nursery:
            for path in wanted:
                nursery.start_soon(read, path)
        return tuple((path, found[path]) for path in wanted)

    async def trees(self, paths: Iterable[StorePath]) -> dict[StorePath, Tree]:
        """What is in the NARs of ``paths``. Raises InvalidData for an index that is not of the NAR."""

        def parsed(indexes: Iterable[tuple[StorePath, bytes]]) -> dict[StorePath, Tree]:
            trees = {}
            for path, data in indexes:
                index = parse_nar_index(data, self._keys, self._store_dir)
                index.check_matches(self._narinfos[path])
                trees[path] = index.tree
            return trees

        return await trio.to_thread.run_sync(parsed, await self.all(paths))

    def _is_same(self, info: NarInfo) -> bool:
        ours = self._narinfos.get(info.store_path)
        return ours is not None and IndexReference.of(ours) == IndexReference.of(info)

    async def _one(self, path: StorePath) -> bytes:
        if path not in self._there:
            reference = _reference(self._narinfos[path])
            data = await read_whole(self._destination, reference.url, MAX_INDEX_SIZE)
            if data is None:
                raise PathNotFound(f"{self._destination.url}: {reference.url} of {path} is gone")
            self._there[path] = data
        return self._there[path]


def _indexed(closure: BundledClosure, parts: Sequence[Part]) -> list[StorePath]:
    """The paths whose indexes a bundle has: those it has extents of, and the rest where that costs little."""
    touched = {part.path for part in parts}
    sizes = {info.store_path: _reference(info).size for info in closure.narinfos}
    rest = sum(size for path, size in sizes.items() if path not in touched)
    content = sum(part.size for part in parts)
    if parts and rest > content * UNTOUCHED_SHARE:
        return sorted(touched)
    return sorted(sizes)


def _is_same(
    header: BundleHeader,
    closure: BundledClosure,
    indexed: Sequence[StorePath],
    parts: Sequence[Part],
) -> bool:
    """Whether a bundle is the one that would be made. Its indexes and bytes are told by its narinfos."""
    return (
        header.narinfos == closure.narinfos
        and [path for path, _ in header.indexes] == list(indexed)
        and [Part.of(extent) for extent in header.extents] == list(parts)
    )


def _nars(narinfos: Iterable[NarInfo]) -> list[object]:
    return [(info.store_path, info.nar_hash) for info in narinfos]


def _reference(info: NarInfo) -> IndexReference:
    reference = IndexReference.of(info)
    if reference is None:
        raise InvalidData(f"{info.store_path}: its narinfo names no index")
    return reference


def _published(
    closure: BundledClosure, header: BundleHeader, size: int, uploaded: int
) -> PublishedBundle:
    return PublishedBundle(
        closure.digest,
        closure.file_names,
        not uploaded,
        len(header.narinfos),
        len(header.indexes),
        len(header.extents),
        size,
        uploaded,
    )
