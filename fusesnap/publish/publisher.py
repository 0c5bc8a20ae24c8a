"""Writes store paths into a cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from fusesnap.errors import ContentMismatch, InvalidConfiguration, InvalidData
from fusesnap.nix.cache_info import MAX_CACHE_INFO_SIZE, parse_cache_info
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.listing import write_listing
from fusesnap.nix.nar_index import NarIndex
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo, parse_narinfo
from fusesnap.nix.signature import SecretKey, Signature
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.publish.destination import (
    CACHE_INFO,
    INDEX,
    LISTING,
    NAR,
    NARINFO,
    Destination,
    read_whole,
    spooled,
)
from fusesnap.publish.packing import PackedNar, Packer
from fusesnap.publish.source import Source
from fusesnap.substituter.answers import narinfo_name
from fusesnap.substituter.base import CACHE_INFO_NAME

log = logging.getLogger(__name__)

# Paths at once. The compressors are shared; this many keep them and the connection busy between two of them.
PATHS_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Published:
    """What became of one path.

    ``narinfo`` is what the cache says of it now. ``kept``: it was there. ``index_size`` in bytes; ``uploaded`` is what
    was sent of NAR, index and the rest, less than their sum where some of it was there.
    """

    narinfo: NarInfo
    kept: bool
    index_size: int
    uploaded: int

    @property
    def store_path(self) -> StorePath:
        """The path."""
        return self.narinfo.store_path

    @property
    def nar_size(self) -> int:
        """Bytes of its NAR."""
        return self.narinfo.nar_size

    @property
    def file_size(self) -> int:
        """Bytes of the NAR's file in the cache."""
        return self.narinfo.file_size or 0


class Publisher:
    """Publishes to one destination, with one key."""

    def __init__(
        self,
        source: Source,
        destination: Destination,
        packer: Packer,
        key: SecretKey,
        store_dir: StoreDir,
        *,
        priority: int,
    ) -> None:
        """``priority`` is for the ``nix-cache-info`` of a cache that has none yet."""
        self._source = source
        self._destination = destination
        self._packer = packer
        self._key = key
        self._store_dir = store_dir
        self._priority = priority

    async def publish(
        self, infos: Sequence[NarInfo], tell: Callable[[Published], None] = lambda _: None
    ) -> list[Published]:
        """Publish ``infos``, which come references first; ``tell`` is told of each that is done.

        A path's narinfo is written when its NAR, and the narinfos of those of its references that are published
        along, are there: at any moment the cache is one that a reader can use. Raises the first error met with.
        """
        await self._ensure_cache_info()
        done = {info.store_path: trio.Event() for info in infos}
        results: dict[StorePath, Published] = {}
        turns = trio.CapacityLimiter(PATHS_AT_ONCE)

        async def one(info: NarInfo) -> None:
            async with turns:
                prepared = await self._prepare(info)
            for reference in info.references:
                if reference != info.store_path and reference in done:
                    await done[reference].wait()
            results[info.store_path] = published = await self._finish(prepared)
            done[info.store_path].set()
            tell(published)

        async with trio.open_nursery() as nursery:
            for info in infos:
                nursery.start_soon(one, info)
        return [results[info.store_path] for info in infos]

    async def _ensure_cache_info(self) -> None:
        """Write ``nix-cache-info`` unless it is there. Raises InvalidConfiguration for that of another store."""
        destination = self._destination
        data = await read_whole(destination, CACHE_INFO_NAME, MAX_CACHE_INFO_SIZE)
        if data is None:
            text = f"StoreDir: {self._store_dir}\nWantMassQuery: 1\nPriority: {self._priority}\n"
            await destination.put_bytes(CACHE_INFO_NAME, text.encode(), CACHE_INFO)
            return
        found = parse_cache_info(data).store_dir
        if found != self._store_dir.path:
            raise InvalidConfiguration(
                f"{destination.url}: its store directory is {found}, expected {self._store_dir}"
            )

    async def _prepare(self, info: NarInfo) -> Published:
        """Put everything of a path but its narinfo, which is said to be there."""
        there = await self._narinfo_there(info.store_path)
        if there is not None and self._is_ours(there):
            reference = IndexReference.of(there)
            size = reference.size if reference else 0
            return Published(there, kept=True, index_size=size, uploaded=0)
        if there is not None and there.nar_hash != info.nar_hash:
            raise ContentMismatch(
                f"{self._destination.url}: {info.store_path} is there with the NAR {there.nar_hash},"
                f" the source has {info.nar_hash}: remove its narinfo from the cache to replace it"
            )
        return await self._pack(info, () if there is None else there.signatures)

    async def _narinfo_there(self, path: StorePath) -> NarInfo | None:
        name = narinfo_name(path)
        data = await read_whole(self._destination, name, MAX_NARINFO_SIZE)
        try:
            return None if data is None else parse_narinfo(data, self._store_dir)
        except InvalidData as error:
            log.warning("%s: %s: %s; written anew", self._destination.url, name, error)
            return None

    def _is_ours(self, info: NarInfo) -> bool:
        """Whether a path was published with this key."""
        reference = IndexReference.of(info)
        if reference is None or reference.key_name != self._key.name:
            return False
        key, fingerprint = self._key.public_key(), info.fingerprint()
        return any(key.verify(fingerprint, signature) for signature in info.signatures)

    async def _pack(self, info: NarInfo, signatures: Iterable[Signature]) -> Published:
        destination = self._destination
        with spooled(destination.spool) as spool:
            packed = await trio.to_thread.run_sync(self._pack_into, info, spool)
            nar_name = f"nar/{packed.file_hash.nix32()}.nar.zst"
            uploaded = 0
            if await destination.size(nar_name) != packed.file_size:
                await destination.put(nar_name, spool, NAR)
                uploaded = packed.file_size
        index = NarIndex(
            info.store_path, packed.nar_hash, packed.tree, packed.chunks, self._store_dir
        )
        data = await trio.to_thread.run_sync(index.to_bytes, self._key)
        index_name = f"nar/{_sha256(data).nix32()}.narindex"
        if await destination.size(index_name) != len(data):
            await destination.put_bytes(index_name, data, INDEX)
            uploaded += len(data)
        uploaded += await self._put_listing(info.store_path, packed)
        reference = IndexReference(index_name, len(data), self._key.name)
        narinfo = self._narinfo(info, packed, nar_name, signatures)
        return Published(reference.added_to(narinfo), False, len(data), uploaded)

    def _pack_into(self, info: NarInfo, spool: Path) -> PackedNar:
        parts = [info.store_path.hash_part, *(path.hash_part for path in info.references)]
        with self._source.nar(info) as pieces, spool.open("wb") as target:
            packed = self._packer.pack(pieces, list(dict.fromkeys(parts)), target)
        if (packed.nar_hash, packed.nar_size) != (info.nar_hash, info.nar_size or packed.nar_size):
            raise ContentMismatch(
                f"{info.store_path}: its NAR has {packed.nar_size} bytes and hashes to {packed.nar_hash},"
                f" expected {info.nar_size} and {info.nar_hash}: the source is damaged"
            )
        return packed

    async def _put_listing(self, path: StorePath, packed: PackedNar) -> int:
        try:
            listing = await trio.to_thread.run_sync(write_listing, packed.tree)
        except InvalidData as error:
            log.warning("%s: has no listing in the cache: %s", path, error)
            return 0
        await self._destination.put_bytes(f"{path.hash_part}.ls", listing, LISTING)
        return len(listing)

    def _narinfo(
        self, info: NarInfo, packed: PackedNar, nar_name: str, signatures: Iterable[Signature]
    ) -> NarInfo:
        """The path as this cache offers it: the source's signatures, the cache's own so far, and ours."""
        unsigned = replace(
            info,
            url=nar_name,
            compression="zstd",
            file_hash=packed.file_hash,
            file_size=packed.file_size,
            nar_size=packed.nar_size,
        )
        ours = self._key.sign(unsigned.fingerprint())
        every = dict.fromkeys((*info.signatures, *signatures, ours))
        return replace(unsigned, signatures=tuple(every))

    async def _finish(self, prepared: Published) -> Published:
        """Put the narinfo, which alone is missing in the cache."""
        if prepared.kept:
            return prepared
        data = prepared.narinfo.to_text().encode()
        await self._destination.put_bytes(narinfo_name(prepared.store_path), data, NARINFO)
        return replace(prepared, uploaded=prepared.uploaded + len(data))


def _sha256(data: bytes) -> Hash:
    return Hash(HashAlgorithm.SHA256, hashlib.sha256(data).digest())
