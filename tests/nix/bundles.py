"""A startup bundle to test with."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.startup_bundle import BundledExtent, BundleEvent, BundleHeader, BundleParser
from fusesnap.nix.store_path import StoreDir, StorePath

from ..store.conftest import make_path

HELLO, GLIBC = (
    replace(make_path(name)[0], nar_size=1 << 40, references=()) for name in ("hello", "glibc")
)


def header(
    *parts: tuple[NarInfo, int, bytes], infos: tuple[NarInfo, ...] = (GLIBC, HELLO)
) -> tuple[BundleHeader, list[bytes]]:
    """A bundle's header and contents: of each part the path, the offset and the bytes."""
    paths = dict.fromkeys(info.store_path for info, _, _ in parts)
    extents = tuple(
        BundledExtent(info.store_path, offset, len(data), hashlib.sha256(data).digest())
        for info, offset, data in parts
    )
    closure = ClosureDigest.of((info.store_path for info in infos), StoreDir())
    indexes: tuple[tuple[StorePath, bytes], ...] = tuple((path, b"index") for path in paths)
    return BundleHeader(closure, infos, indexes, extents, 0), [data for _, _, data in parts]


def parsed(parser: BundleParser, *pieces: bytes) -> list[BundleEvent]:
    """All events of a file that comes in ``pieces``."""
    events = [event for piece in pieces for event in parser.feed(piece)]
    parser.finish()
    return events


def other_hash(info: NarInfo) -> NarInfo:
    """The same path with another NAR."""
    return replace(info, nar_hash=Hash(HashAlgorithm.SHA256, b"x" * 32))
