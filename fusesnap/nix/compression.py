"""Decompressors for the compressions that narinfos name.

Each is fed with pieces of the file and gives pieces of what is in it. What a piece of input unfolds
to is bounded, so that no input, however made, takes more memory than the constants here say.

A file may be several streams, one after another (members of gzip, streams of xz and bzip2, frames
of zstd and LZ4): each format's specification says that their contents are to be joined.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final, Protocol

import zstandard

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

# Of output. A reader that hashes and writes pieces of this size loses nothing by switching between
# them.
MAX_PIECE: Final = 256 * 1024
# Of input at a time, for libraries that bound their output but copy what input they have not used.
_INPUT_STEP: Final = 64 * 1024
# "xz -9" needs 65 MiB to decompress; one doubling of its dictionary (Nix lets a cache choose
# presets only) is allowed.
XZ_MEMORY_LIMIT: Final = 132 * 1024 * 1024
# "zstd --long" without a number makes windows of 2^27; that is also the most that zstd decompresses
# by default.
ZSTD_MAX_WINDOW: Final = 2**27
# zstandard cannot bound its output, only its input can be: the densest block (RLE) makes 128 KiB of
# 4 bytes (RFC 8878, 3.1.1.2), so that a step unfolds to 32 MiB at most. Measured on
# programs, this costs a fifth of the speed of unbounded steps, and leaves above 1 GB/s.
_ZSTD_STEP: Final = 1024


class Decompressor(ABC):
    """Fed with a compressed file, gives its contents."""

    @abstractmethod
    def decompress(self, data: bytes) -> Iterator[bytes]:
        """Take the next piece of the file and give the contents that it completes.

        The pieces have 1 to ``MAX_PIECE`` bytes. The iterator must be used up before the next call.
        Raises :class:`InvalidData` where the file is damaged or needs too much memory.
        """

    @abstractmethod
    def finish(self) -> None:
        """Say that the file has ended; raises :class:`InvalidData` where it is cut short."""


class _Stored(Decompressor):
    def decompress(self, data: bytes) -> Iterator[bytes]:
        yield from _split(data)

    def finish(self) -> None:
        pass


class _Stream(Protocol):
    """One of the streams that a file consists of."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Give what ``data`` unfolds to, up to the end of this stream."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes:
        """What was fed beyond the end of this stream."""


class _Streams(Decompressor):
    """A file of one or more streams."""

    def __init__(self, name: str, make: Callable[[], _Stream], errors: tuple[type[Exception], ...]):
        self._name = name
        self._make = make
        self._errors = errors
        self._stream: _Stream | None = None
        self._unused = b""  # what followed the last stream
        self._finished = 0  # streams
        self._size = 0  # of the contents given

    def decompress(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _INPUT_STEP):
            step = data[start : start + _INPUT_STEP]
            while step := self._between(step):
                yield from self._feed(step)
                if self._stream is not None:
                    break
                step = self._unused

    def finish(self) -> None:
        if self._stream is not None or not self._finished:
            raise InvalidData(
                f"{self._name}: file is cut short after {self._size} bytes of contents"
            )

    def _between(self, data: bytes) -> bytes:
        """Take from ``data`` what may stand between two streams."""
        return data

    def _feed(self, data: bytes) -> Iterator[bytes]:
        stream = self._stream or self._make()
        fresh, self._stream = self._stream is None, stream
        try:
            for piece in stream.feed(data):
                self._size += len(piece)
                yield piece
        except self._errors as error:
            where = "followed by garbage" if fresh and self._finished else "unreadable"
            raise InvalidData(
                f"{self._name}: file is {where} after {self._size} bytes of contents: {error}"
            ) from None
        if stream.eof:
            self._finished += 1
            self._stream, self._unused = None, stream.unused_data


class _Xz(_Streams):
    """Streams of xz may have padding between and after them.

    Zeros, a multiple of four (The .xz File Format, 2.2).
    """

    _padding = 0

    def _between(self, data: bytes) -> bytes:
        if self._stream is not None or not self._finished:
            return data
        stripped = data.lstrip(b"\0")
        self._padding += len(data) - len(stripped)
        if stripped:
            self._check_padding()
        return stripped

    def finish(self) -> None:
        super().finish()
        self._check_padding()

    def _check_padding(self) -> None:
        if self._padding % 4:
            raise InvalidData(f"xz: padding of {self._padding} bytes, expected a multiple of 4")


class _BoundedStream:
    """A stream of lzma, bz2 or lz4, whose objects agree in how they bound their output."""

    def __init__(self, decompressor: Any) -> None:
        self._decompressor = decompressor

    def feed(self, data: bytes) -> Iterator[bytes]:
        decompressor = self._decompressor
        while True:
            if piece := decompressor.decompress(data, MAX_PIECE):
                yield piece
            if decompressor.eof or decompressor.needs_input:
                return
            data = b""

    @property
    def eof(self) -> bool:
        return bool(self._decompressor.eof)

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data or b""


class _GzipStream:
    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # gzip's header only

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if piece := self._decompressor.decompress(data, MAX_PIECE):
                yield piece
            data = self._decompressor.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data


class _ZstdStream:
    def __init__(self, context: zstandard.ZstdDecompressor) -> None:
        self._decompressor = context.decompressobj()
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        parts: list[bytes] = []
        size = start = 0
        while start < len(data) and not self.eof:
            part = self._decompressor.decompress(data[start : start + _ZSTD_STEP])
            start += _ZSTD_STEP
            parts.append(part)
            size += len(part)
            if size >= MAX_PIECE // 2:
                yield from _split(b"".join(parts))
                parts, size = [], 0
        yield from _split(b"".join(parts))
        self._rest = data[start:]

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data + self._rest


class _BrotliStream:
    """Brotli has no frames: what follows the end is garbage, and its library says so."""

    unused_data = b""

    def __init__(self, brotli: Any) -> None:
        self._decompressor = brotli.Decompressor()

    def feed(self, data: bytes) -> Iterator[bytes]:
        decompressor = self._decompressor
        while True:
            piece = decompressor.process(data, output_buffer_limit=MAX_PIECE)
            yield from _split(piece)
            # Output may be pending although all input has been accepted.
            if decompressor.is_finished() or (not piece and decompressor.can_accept_more_data()):
                return
            data = b""

    @property
    def eof(self) -> bool:
        return bool(self._decompressor.is_finished())


def _split(data: bytes) -> Iterator[bytes]:
    if 0 < len(data) <= MAX_PIECE:
        yield data
        return
    for start in range(0, len(data), MAX_PIECE):
        yield data[start : start + MAX_PIECE]


def _xz() -> Decompressor:
    def make() -> _Stream:
        return _BoundedStream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_LIMIT))

    return _Xz("xz", make, (lzma.LZMAError,))


def _bzip2() -> Decompressor:
    return _Streams("bzip2", lambda: _BoundedStream(bz2.BZ2Decompressor()), (OSError,))


def _gzip() -> Decompressor:
    return _Streams("gzip", _GzipStream, (zlib.error,))


def _zstd() -> Decompressor:
    # One context for all frames: a file may have thousands, and a context is large.
    context = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
    return _Streams("zstd", lambda: _ZstdStream(context), (zstandard.ZstdError,))


def _brotli(brotli: ModuleType) -> Decompressor:
    return _Streams("br", lambda: _BrotliStream(brotli), (brotli.error,))


def _lz4(frame: ModuleType) -> Decompressor:
    return _Streams("lz4", lambda: _BoundedStream(frame.LZ4FrameDecompressor()), (RuntimeError,))


_DECOMPRESSORS: Final[dict[str, Callable[[], Decompressor]]] = {
    "none": _Stored,
    "": _Stored,
    "xz": _xz,
    "zstd": _zstd,
    "gzip": _gzip,
    "bzip2": _bzip2,
}
# Few caches use these; their libraries come with the extra "compression".
_OPTIONAL: Final[dict[str, tuple[str, Callable[[ModuleType], Decompressor]]]] = {
    "br": ("brotli", _brotli),
    "lz4": ("lz4.frame", _lz4),
}


def decompressor(name: str) -> Decompressor:
    """Return a fresh decompressor for what Nix calls compression ``name``.

    Raises :class:`InvalidData`, which says what is supported.
    """
    if name in _DECOMPRESSORS:
        return _DECOMPRESSORS[name]()
    if name in supported():
        module, make = _OPTIONAL[name]
        return make(importlib.import_module(module))
    raise InvalidData(f"compression is {quote(name)}, supported are {', '.join(supported())}")


def supported() -> tuple[str, ...]:
    """Return the names of the compressions that can be read here."""
    optional = (name for name, (module, _) in _OPTIONAL.items() if _is_installed(module))
    return (*filter(None, _DECOMPRESSORS), *optional)


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def unfold(frame: bytes, most: int, what: str) -> bytes:
    """What one zstd frame holds, which has to say how much that is; ``what`` begins messages.

    Raises :class:`InvalidData` where that is more than ``most`` bytes, or it cannot be decompressed.
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= most:
            raise InvalidData(f"{what} unfolds to {size} bytes, expected 0 to {most}")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InvalidData(f"{what} cannot be decompressed: {error}") from None
