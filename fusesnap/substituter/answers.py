"""What the bytes of a cache must be before they count as an answer, however they came."""

from __future__ import annotations

from fusesnap.errors import InvalidData, Unavailable
from fusesnap.nix.cache_info import CacheInfo, parse_cache_info
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.base import StoredFile
from fusesnap.substituter.retry import Refusal

# A compression that finds nothing to compress adds its frames: 4 bytes in 64 KiB (lz4), 3 in
# 128 KiB (zstd), about 0.5 % (bzip2), and a few hundred bytes once. An eighth leaves room for
# concatenated frames of a few KiB; anything beyond is a stream that is not meant to end.
_OVERHEAD_SHARE = 8
_OVERHEAD = 64 * 1024

MISSING_CACHE_INFO = CacheInfo(store_dir="/nix/store", want_mass_query=False, priority=None)


def read_cache_info(url: str, data: bytes) -> CacheInfo:
    """Parse ``nix-cache-info`` of the cache ``url``; raises InvalidData that names the cache."""
    try:
        return parse_cache_info(data)
    except InvalidData as error:
        raise InvalidData(f"{url}: {error}") from error


def read_narinfo(url: str, path: StorePath | HashPart, data: bytes, store_dir: StoreDir) -> NarInfo:
    """Parse what the cache ``url`` gave as the narinfo of ``path``.

    Raises InvalidData that names the cache, also where it is the narinfo of another path: the file
    is named by the hash part alone, and only its contents say the name.
    """
    name = narinfo_name(path)
    try:
        info = parse_narinfo(data, store_dir)
    except InvalidData as error:
        raise InvalidData(f"{url}: {name}: {error}") from error
    is_right = (
        path.is_of(info.store_path) if isinstance(path, HashPart) else info.store_path == path
    )
    if not is_right:
        raise InvalidData(f"{url}: {name}: expected the narinfo of {path}, got {info.store_path}'s")
    return info


def narinfo_name(path: StorePath | HashPart) -> str:
    """The name, within a cache, of the narinfo of ``path``."""
    return f"{path.hash_part}.narinfo"


class FileLength:
    """Holds a NAR's file, while it comes, to the sizes that are known of it.

    ``where`` begins the messages: the cache and the file. ``received`` counts the bytes so far.
    """

    def __init__(self, where: str, info: StoredFile, received: int = 0) -> None:
        self.received = received
        self._where = where
        most = info.nar_size + info.nar_size // _OVERHEAD_SHARE + _OVERHEAD
        # FileSize is not signed: a cache may say what it likes, and only NarSize bounds it.
        if info.file_size is not None and info.file_size > most:
            raise Refusal(
                f"{where}: its narinfo announces {info.file_size} bytes for a NAR of"
                f" {info.nar_size}, expected at most {most}"
            )
        self._exact = info.file_size
        self._most = most if info.file_size is None else info.file_size

    @property
    def exact(self) -> int | None:
        """The length of the whole file in bytes, if anybody has said it."""
        return self._exact

    @property
    def complete(self) -> bool:
        """Whether as many bytes came as were announced."""
        return self.received == self._exact

    def announced(self, length: int) -> None:
        """The transport says that the whole file has ``length`` bytes."""
        if self._exact is None and length <= self._most:
            self._exact = length
        elif self._exact is None:
            raise Refusal(f"{self._where}: has {length} bytes, expected at most {self._most}")
        elif length != self._exact:
            raise Refusal(f"{self._where}: has {length} bytes, expected {self._exact}")

    def receive(self, count: int) -> None:
        """Another ``count`` bytes came; raises Refusal where that is more than there may be."""
        self.received += count
        most = self._most if self._exact is None else self._exact
        if self.received > most:
            kind = "at most " if self._exact is None else ""
            raise Refusal(f"{self._where}: more bytes than expected, {kind}{most}")

    def end(self) -> None:
        """No more bytes come; raises Unavailable where some are missing."""
        if self._exact is not None and self.received != self._exact:
            raise Unavailable(f"{self._where}: ended after {self.received} of {self._exact} bytes")
