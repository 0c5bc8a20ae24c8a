"""Verifies the startup bundles of a published cache: signature, closure, and every byte against the NARs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from fusesnap.errors import InvalidData, PathNotFound, UntrustedPath
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.compression import decompressor
from fusesnap.nix.nar_index import parse_nar_index
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.references import reached
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_bundle import (
    BundledExtent,
    BundleEvent,
    BundleHeader,
    BundleParser,
    file_name,
    root_file_name,
)
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trust import check_trust
from fusesnap.publish.destination import Destination
from fusesnap.publish.extents import Part, contents_of

DIRECTORY = "bundle"


@dataclass(frozen=True, slots=True)
class CheckedBundle:
    """What was found of one bundle, named by its file; ``faults`` is empty where all is well. ``size`` in bytes."""

    name: str
    closure: ClosureDigest | None
    paths: int
    extents: int
    size: int
    faults: tuple[str, ...]


class BundleChecker:
    """Checks bundles of one cache against the keys that its readers trust."""

    def __init__(self, cache: Destination, keys: TrustedKeys, store_dir: StoreDir) -> None:
        self._cache = cache
        self._keys = keys
        self._store_dir = store_dir

    async def check(
        self, names: Iterable[str], tell: Callable[[CheckedBundle], None] = lambda _: None
    ) -> list[CheckedBundle]:
        """Check the bundles of these names; ``tell`` is told of each that is done.

        Raises StorageFailure and Unavailable where the cache does not answer.
        """
        results = []
        for name in dict.fromkeys(names):
            results.append(await self._check(name))
            tell(results[-1])
        return results

    async def names_of(self, roots: Iterable[StorePath]) -> list[str]:
        """The names of the bundles that there are of the closures of ``roots``, by root and by digest."""
        names: list[str] = []
        for root in roots:
            name = root_file_name(root)
            if await self._cache.size(name) is not None:
                names.append(name)
                reading = _Reading(self._keys, self._store_dir)
                await self._read(name, reading)
                if reading.header is not None:
                    names.append(file_name(reading.header.closure))
        return names

    async def _check(self, name: str) -> CheckedBundle:
        reading = _Reading(self._keys, self._store_dir)
        faults = await self._read(name, reading)
        header = reading.header
        if header is None:
            return CheckedBundle(name, None, 0, 0, reading.size, tuple(faults))
        faults += await trio.to_thread.run_sync(self._header_faults, name, header)
        faults += await self._nar_faults(header)
        return CheckedBundle(
            name,
            header.closure,
            len(header.narinfos),
            len(header.extents),
            reading.size,
            tuple(faults),
        )

    async def _read(self, name: str, reading: _Reading) -> list[str]:
        """Read a bundle to its end, or to its first fault."""
        try:
            async with aclosing(self._cache.read(name)) as pieces:
                async for piece in pieces:
                    await trio.to_thread.run_sync(reading.feed, piece)
            reading.finish()
        except (InvalidData, UntrustedPath, PathNotFound) as error:
            return [str(error)]
        return []

    def _header_faults(self, name: str, header: BundleHeader) -> list[str]:
        faults = [] if _is_named(name, header) else [f"it is of closure {header.closure}"]
        narinfos = {info.store_path: info for info in header.narinfos}
        for info in header.narinfos:
            try:
                check_trust(info, self._keys)
            except UntrustedPath as error:
                faults.append(str(error))
        for path, data in header.indexes:
            try:
                index = parse_nar_index(data, self._keys, self._store_dir)
                index.check_matches(narinfos[path])
            except (InvalidData, UntrustedPath) as error:
                faults.append(f"its index of {path}: {error}")
        return faults

    async def _nar_faults(self, header: BundleHeader) -> list[str]:
        """What is wrong with the NARs that it names, and with its bytes of them."""
        faults = []
        extents: dict[StorePath, list[BundledExtent]] = {}
        for extent in header.extents:
            extents.setdefault(extent.path, []).append(extent)
        for info in header.narinfos:
            if await self._cache.size(info.url) is None:
                faults.append(f"{info.url} of {info.store_path} is not there")
                continue
            try:
                if info.store_path in extents:
                    await self._compare(info, extents[info.store_path])
            except (InvalidData, PathNotFound) as error:
                faults.append(str(error))
        return faults

    async def _compare(self, info: NarInfo, extents: Sequence[BundledExtent]) -> None:
        parts = [Part.of(extent) for extent in extents]
        unpacking, nar = decompressor(info.compression), bytearray()

        def unpack(piece: bytes) -> None:
            for data in unpacking.decompress(piece):
                nar.extend(data)
                if len(nar) > info.nar_size:
                    raise InvalidData(f"{info.url}: its NAR has more than {info.nar_size} bytes")

        async with aclosing(self._cache.read(info.url)) as pieces:
            async for piece in pieces:
                await trio.to_thread.run_sync(unpack, piece)
        contents = await trio.to_thread.run_sync(contents_of, [bytes(nar)], parts, info)
        for part, extent, data in zip(parts, extents, contents, strict=True):
            if part.extent(data) != extent:
                raise InvalidData(
                    f"{info.store_path}: the {extent.size} bytes from {extent.offset} of its NAR are others"
                )


@dataclass(slots=True)
class _Reading:
    """A bundle on its way past its signature and hashes."""

    keys: TrustedKeys
    store_dir: StoreDir
    header: BundleHeader | None = None
    size: int = 0
    _parser: BundleParser = field(init=False)

    def __post_init__(self) -> None:
        self._parser = BundleParser(self.keys, self.store_dir)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; raises InvalidData and UntrustedPath."""
        self.size += len(piece)
        event: BundleEvent
        for event in self._parser.feed(piece):
            if isinstance(event, BundleHeader):
                self.header = event

    def finish(self) -> None:
        """The file has ended; raises InvalidData where it is cut short."""
        self._parser.finish()


def _is_named(name: str, header: BundleHeader) -> bool:
    """Whether a bundle is under a name that it may have: of its closure, or of the path whose closure that is."""
    narinfos = {info.store_path: info for info in header.narinfos}
    if name == file_name(header.closure):
        return True
    root = next((path for path in narinfos if root_file_name(path) == name), None)
    return root is not None and reached([root], narinfos) == narinfos.keys()
