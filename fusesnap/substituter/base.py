"""The protocol of one binary cache.

Words, as Nix uses them (manual, "Serving a Nix store via HTTP"; ``src/libstore/
binary-cache-store.cc``):

substituter
    Somewhere that store paths can be fetched from instead of being built. Here always a *binary
    cache*: a tree of files, ``nix-cache-info``, ``<hash part>.narinfo`` and what their fields
    ``URL`` name, whether a server, a directory or a test holds them.
narinfo
    What a cache says of one store path: hash and size of its NAR, references, signatures, and where
    the file is. It is of a cache: two caches may offer the same path with different files.
NAR
    The archive of a store path. A cache stores it compressed; what :meth:`Substituter.nar` gives
    are the bytes of that file, and nothing here looks into them.
priority
    A number by which several caches are put in order, the lowest first (``Priority`` of
    ``nix-cache-info``; ``DEFAULT_PRIORITY`` where a cache does not say).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from fusesnap.nix.cache_info import CacheInfo
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.retry import Retries

# Nix's default of the store setting "priority" (src/libstore/binary-cache-store.hh).
DEFAULT_PRIORITY: Final = 50
CACHE_INFO_NAME: Final = "nix-cache-info"
DEFAULT_STORE_DIR: Final = StoreDir()


@dataclass(slots=True)
class Bookmark:
    """How far the file of a NAR was read, so that another reading can go on there.

    ``received`` is in bytes; ``length`` that of the whole file, where anybody said it. ``validator`` is what the cache
    knows this version of the file by. ``resumable`` says whether the cache can send the rest alone; None as long as it
    has not told. A reading keeps its bookmark up to date, piece by piece.
    """

    received: int = 0
    length: int | None = None
    validator: str | None = None
    resumable: bool | None = None


class StoredFile(Protocol):
    """What is known of a file before it is read; a narinfo says so of a NAR's."""

    @property
    def url(self) -> str:
        """Its name, relative to the cache, or absolute."""

    @property
    def file_size(self) -> int | None:
        """Its size in bytes, where anybody said it."""

    @property
    def nar_size(self) -> int:
        """Bytes that it unfolds to at most: what bounds its size."""


Meter: TypeAlias = Callable[[int], None]


def unmetered(_: int) -> None:
    """Nobody counts the bytes."""


class Substituter(Protocol):
    """One binary cache.

    Every method may be called by any number of tasks at once, and may be cancelled at any point.
    Errors are of :mod:`fusesnap.errors`, and their messages begin with the cache's ``url``:
    PathNotFound where the cache answered that it has no such thing, InvalidData where its answer is
    not what the format demands, and Unavailable where it gave no answer. Of the last there are two
    kinds that say how to go on, :class:`fusesnap.substituter.retry.Refusal` and
    :class:`~fusesnap.substituter.retry.Throttled`.
    """

    @property
    def url(self) -> str:
        """The cache's name in messages, in ``exclude`` and in the memory of narinfos.

        Without a slash at its end, and without user name and password.
        """

    @property
    def priority(self) -> int | None:
        """The user's number for this cache, which overrules the cache's own; None if there is none."""

    async def cache_info(self) -> CacheInfo:
        """Ask what the cache says of itself.

        A cache without ``nix-cache-info`` is taken as one for ``/nix/store`` that names no
        priority. Raises Unavailable and InvalidData.
        """

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo:
        """Ask for the narinfo of ``path``.

        What comes back is well-formed and of exactly this path, or of one with this hash part, and
        not yet trusted. Raises PathNotFound, Unavailable, and InvalidData, also for a narinfo of
        another path.
        """

    def nar(
        self, info: StoredFile, retries: Retries | None = None, bookmark: Bookmark | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read the file that ``info`` names, from its first byte to its last, in order.

        With a ``bookmark`` of an earlier reading, from there. What was read before the reading was cancelled, or left,
        is in the bookmark to the byte.

        The pieces are not empty, and at most 1 MiB long. The file is as stored: no transport
        encoding is left, and no decompression done. Entering asks nothing; the iterator raises
        PathNotFound where the file is gone, and Unavailable, also in its middle, where the bytes
        stop, are fewer or more than ``FileSize`` or ``Content-Length`` announce, or are more than
        any compression makes of ``NarSize``. What came before an error is a prefix of the file.
        ``retries`` is asked before every request, and whether to go on after one that failed, by
        those that can go on; without it they have their own.
        """

    def part(
        self, info: NarInfo, start: int, end: int, retries: Retries | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read the bytes from ``start`` up to ``end`` of the file that ``info`` names.

        Like :meth:`nar`, also in its ``retries``; the iterator gives exactly so many bytes or raises, also
        :class:`~.retry.PartsUnsupported` where the cache can only send the whole file. It may be another file by now:
        whoever reads knows what the part must hash to.
        """

    async def small_file(self, name: str, limit: int) -> bytes:
        """Read a file whole that a narinfo names beside the NAR.

        ``name`` is relative to the cache, or absolute. Raises PathNotFound, Unavailable, and InvalidData where the
        file has more than ``limit`` bytes.
        """
