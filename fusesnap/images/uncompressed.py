"""Compression of layers and archives, told from their first bytes: what a file is called says nothing."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.compression import decompressor

START: Final = 8  # bytes that decide

# As RFC 1952, RFC 8878 (a frame; a skippable frame before it is in ``compression_of``), The .xz File Format 2.1.1.1
# and bzip2 begin.
_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}
_SKIPPABLE: Final = b"\x2a\x4d\x18"


def compression_of(start: bytes) -> str:
    """Say how a file that begins with ``start`` is compressed, in the words of :mod:`fusesnap.nix.compression`."""
    if start[1:4] == _SKIPPABLE and start[0] & 0xF0 == 0x50:  # noqa: PLR2004
        return "zstd"
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "none")


def uncompressed(blob: Iterator[bytes], name: str) -> Generator[bytes, None, None]:
    """Decompress ``blob``; what is not compressed passes.

    ``name`` begins the messages. Raises InvalidData where it is damaged, and what ``blob`` raises.
    """
    first = next(blob, b"")
    stream = decompressor(compression_of(first))
    try:
        yield from stream.decompress(first)
        for piece in blob:
            yield from stream.decompress(piece)
        stream.finish()
    except ContentMismatch:
        raise  # the blob's digest says more than that it does not decompress
    except InvalidData as error:
        raise InvalidData(f"{name}: {error}") from error
