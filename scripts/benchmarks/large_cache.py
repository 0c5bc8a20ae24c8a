"""A signed binary cache of a given size, made quickly by our own writer: large NARs of known content.

Real Nix would have to build, hash and compress what is only there to be large. The format is the same, and the tests
of ``nix/`` hold our writer against Nix's.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard
from testbed.binary_cache import CacheFiles, SigningKey

from fusesnap.nix.hash import Hash, HashAlgorithm, compress_digest, nix32_encode
from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    RegularFile,
    nar_bytes,
)
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import SecretKey
from fusesnap.nix.store_path import StoreDir, StorePath

BLOCK = 64 * 1024
# A quarter of each block is new: the NARs become a quarter of their size, as those of programs do.
NEW_IN_BLOCK = BLOCK // 4
LARGE, SMALL = b"large", b"small"
# What it takes to decompress depends on the window, and those are as large as with ``nix copy``: 2 MiB at zstd's level
# 3, 8 MiB at xz's preset 6. Preset 0 only makes it quicker.
ZSTD_LEVEL = 3
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 8 << 20}]


class Compressor(Protocol):
    """One stream of a compression."""

    def compress(self, data: bytes, /) -> bytes:
        """More of it."""

    def flush(self) -> bytes:
        """Its end."""


class CachedPath(Protocol):
    """A store path whose NAR can be written."""

    @property
    def store_path(self) -> StorePath:
        """Its name."""

    @property
    def references(self) -> tuple[StorePath, ...]:
        """What it refers to."""

    def events(self) -> Iterator[NarEvent]:
        """Its NAR."""


class Stored:
    """The bytes as they are."""

    def compress(self, data: bytes, /) -> bytes:
        """More of it."""
        return data

    def flush(self) -> bytes:
        """Its end."""
        return b""


COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "zstd": lambda: zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj(),
    "xz": lambda: lzma.LZMACompressor(filters=XZ_FILTERS),
}


@dataclass(frozen=True, slots=True)
class LargePath:
    """A store path: a directory with one large file of ``blocks`` blocks, and one of ``files`` small files."""

    number: int
    blocks: int
    files: int
    references: tuple[StorePath, ...] = ()

    @property
    def store_path(self) -> StorePath:
        digest = hashlib.sha256(f"large path {self.number}".encode()).digest()
        return StorePath(nix32_encode(compress_digest(digest, 20)), f"large-{self.number}")

    def block(self, index: int) -> bytes:
        """One block of the large file; no other is like it."""
        return hashlib.shake_128(f"{self.number}/{index}".encode()).digest(NEW_IN_BLOCK) * 4

    def small_name(self, index: int) -> bytes:
        return f"{index:06d}.txt".encode()

    def small(self, index: int) -> bytes:
        """The contents of one small file."""
        return f"file {index} of large path {self.number}\n".encode()

    def events(self) -> Iterator[NarEvent]:
        """Its NAR."""
        yield DirectoryStart(b"")
        yield RegularFile(LARGE, self.blocks * BLOCK, executable=False, offset=0)
        yield from (FileData(self.block(index)) for index in range(self.blocks))
        yield FileEnd()
        yield DirectoryStart(SMALL)
        for index in range(self.files):
            data = self.small(index)
            yield RegularFile(self.small_name(index), len(data), executable=False, offset=0)
            yield FileData(data)
            yield FileEnd()
        yield DirectoryEnd()
        yield DirectoryEnd()
        yield NarEnd()


def large_paths(size: int, count: int, files: int) -> list[LargePath]:
    """``count`` paths of together some ``size`` bytes, each with ``files`` small files."""
    blocks = max(1, size // count // BLOCK)
    return [LargePath(number, blocks, files) for number in range(count)]


def write_large_cache(
    paths: Sequence[CachedPath],
    directory: Path,
    key: SigningKey,
    store_dir: StoreDir,
    *,
    compression: str,
    compressors: Mapping[str, Callable[[], Compressor]] = COMPRESSORS,
) -> CacheFiles:
    """Write the binary cache with ``paths``. ``compression`` is one of ``compressors``.

    Each NAR is compressed in a thread of its own, as many at once as there are processors.
    """
    secret = SecretKey.parse(key.secret_file.read_text().strip())
    (directory / "nar").mkdir(parents=True)
    (directory / "nix-cache-info").write_text(f"StoreDir: {store_dir.path}\n")

    def write(path: CachedPath) -> None:
        compressor = compressors[compression]()
        info = _write_nar(path, directory, store_dir, compression, compressor)
        signature = secret.sign(info.fingerprint())
        text = f"{info.to_text()}Sig: {signature}\n"
        (directory / f"{info.store_path.hash_part}.narinfo").write_text(text)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(write, paths))
    return CacheFiles(directory)


def _write_nar(
    path: CachedPath,
    directory: Path,
    store_dir: StoreDir,
    compression: str,
    compressor: Compressor,
) -> NarInfo:
    url = f"nar/{path.store_path.hash_part}.nar.{compression}"
    nar_hash, nar_size = hashlib.sha256(), 0
    file_hash, file_size = hashlib.sha256(), 0
    with (directory / url).open("wb") as file:

        def write(compressed: bytes) -> int:
            file_hash.update(compressed)
            return file.write(compressed)

        for piece in nar_bytes(path.events()):
            nar_hash.update(piece)
            nar_size += len(piece)
            file_size += write(compressor.compress(piece))
        file_size += write(compressor.flush())
    return NarInfo(
        store_path=path.store_path,
        url=url,
        compression=compression,
        file_hash=Hash(HashAlgorithm.SHA256, file_hash.digest()),
        file_size=file_size,
        nar_hash=Hash(HashAlgorithm.SHA256, nar_hash.digest()),
        nar_size=nar_size,
        references=path.references,
        deriver=None,
        system=None,
        signatures=(),
        ca=None,
        unknown=(),
        store_dir=store_dir,
    )
