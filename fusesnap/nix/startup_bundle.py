"""The startup bundle: the narinfos and indexes of a closure, and the bytes that its start reads, in one object.

Source: docs/formats.md, "Startup bundle", and ``proto/fusesnap/nix/api/startup_bundle.proto``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import zstandard
from google.protobuf.message import DecodeError

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.api import startup_bundle_pb2 as api
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.compression import ZSTD_MAX_WINDOW, decompressor, unfold
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo, parse_narinfo
from fusesnap.nix.signature import SecretKey, TrustedKeys
from fusesnap.nix.signed_file import SignedFile
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath

MAGIC: Final = b"STARTUP-BUNDLE"
VERSION: Final = 1
# 2,400 paths have 2 MiB of narinfos, which compress to a third, and their indexes some MiB. The header is held in
# memory before anything is known of it.
MAX_HEADER_SIZE: Final = 32 * 1024 * 1024
MAX_MESSAGE_SIZE: Final = 128 * 1024 * 1024
# All contents are one window, and a decoder holds that: as much as zstd's decoders allow when nobody says more.
MAX_CONTENT_SIZE: Final = ZSTD_MAX_WINDOW
# What zstd cannot compress it stores, with 3 bytes a block of 128 KiB and 18 around the frame (RFC 8878, 3.1.1).
MAX_STREAM_SIZE: Final = MAX_CONTENT_SIZE + MAX_CONTENT_SIZE // 1024 + 1024
# An extent is held in memory until it is verified, and nobody has anything of it until then.
MAX_EXTENT_SIZE: Final = 128 * 1024
MAX_EXTENTS: Final = 65_536  # as many as a trace has
MAX_PATHS: Final = 65_536  # as many as a closure may have
MAX_BUNDLE_SIZE: Final = MAX_HEADER_SIZE + MAX_STREAM_SIZE + 1024
DIGEST_SIZE: Final = hashlib.sha256().digest_size
_SIGNED: Final = SignedFile("startup bundle", MAGIC, VERSION)
_LENGTH_SIZE: Final = 4
# Written once and read everywhere.
_LEVEL: Final = 19


@dataclass(frozen=True, slots=True)
class BundledExtent:
    """``size`` bytes of the NAR of ``path`` from ``offset``, which hash to ``digest`` (SHA-256)."""

    path: StorePath
    offset: int
    size: int
    digest: bytes

    @property
    def end(self) -> int:
        """Where it ends in the NAR."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class BundleHeader:
    """What a bundle says before its bytes.

    ``narinfos`` are those of the whole closure, not trusted by being in here; ``indexes`` are NAR indexes as the cache
    has them, with signatures of their own; ``extents`` are in the order of first use. ``stream_size`` is in bytes,
    ``stream_digest`` the SHA-256 of the stream. Raises :class:`InvalidData` where a part is not so.
    """

    closure: ClosureDigest
    narinfos: tuple[NarInfo, ...]
    indexes: tuple[tuple[StorePath, bytes], ...]
    extents: tuple[BundledExtent, ...]
    stream_size: int = 0
    stream_digest: bytes = b""

    def __post_init__(self) -> None:
        _check_paths(self)
        _check_extents(self)

    @property
    def content_size(self) -> int:
        """Bytes of all extents."""
        return sum(extent.size for extent in self.extents)


@dataclass(frozen=True, slots=True)
class ReadyExtent:
    """An extent whose bytes are here, and are what they must be."""

    extent: BundledExtent
    data: bytes


BundleEvent = BundleHeader | ReadyExtent


def file_name(closure: ClosureDigest) -> str:
    """The name, within a cache, of the bundle of ``closure``."""
    return f"bundle/{closure.hex}"


def root_file_name(root: StorePath | HashPart) -> str:
    """The name, within a cache, of the same bundle, for those who know only whose closure it is: ``root``'s."""
    return f"bundle/{root.hash_part}"


def write_bundle(
    header: BundleHeader, contents: Sequence[bytes], key: SecretKey, store_dir: StoreDir
) -> bytes:
    """The file with ``contents``, those of the header's extents, signed with ``key``; what its stream is, is filled in.

    Raises :class:`InvalidData` where that is more than a bundle holds, :class:`ContentMismatch` where a content is not
    the one of its extent.
    """
    for extent, data in zip(header.extents, contents, strict=True):
        _check_content(extent, data)
    stream = _compress(b"".join(contents)) if contents else b""
    digest = hashlib.sha256(stream).digest()
    message = _to_message(replace(header, stream_size=len(stream), stream_digest=digest), store_dir)
    body = zstandard.ZstdCompressor(level=_LEVEL).compress(
        message.SerializeToString(deterministic=True)
    )
    if len(body) > MAX_HEADER_SIZE:
        raise InvalidData(
            f"startup bundle: its header has {len(body)} bytes, expected at most {MAX_HEADER_SIZE}"
        )
    content = len(body).to_bytes(_LENGTH_SIZE, "little") + body
    return _SIGNED.sign(content, key) + content + stream


class BundleParser:
    """Takes the bytes of a bundle as they come, and gives what they complete. It reads and writes nothing.

    The signature is checked before anything else is believed, and the SHA-256 of an extent before it is given.
    """

    def __init__(self, keys: TrustedKeys, store_dir: StoreDir) -> None:
        self._keys = keys
        self._store_dir = store_dir
        self._held = bytearray()
        self._header: BundleHeader | None = None
        self._extents: Iterator[BundledExtent] = iter(())
        self._due: BundledExtent | None = None
        self._unpacking = decompressor("zstd")
        self._left = 0  # bytes of the stream
        self._digest = hashlib.sha256()  # of the stream

    def feed(self, data: bytes) -> Iterator[BundleEvent]:
        """Take the next bytes. The iterator must be used up before the next call.

        Raises :class:`UntrustedPath` where no trusted key has signed it, :class:`InvalidData` for everything else.
        """
        if self._header is None:
            self._held += data
            end = _header_end(self._held)
            if end is None or len(self._held) < end:
                return
            data = bytes(self._held[end:])
            self._header = header = self._read_header(bytes(self._held[:end]))
            self._held.clear()
            self._left = header.stream_size
            self._extents = iter(header.extents)
            self._due = next(self._extents, None)
            yield header
        yield from self._unpack(data)

    def finish(self) -> None:
        """The file has ended; raises :class:`InvalidData` where it is cut short."""
        if self._header is None:
            raise InvalidData(
                f"startup bundle: cut short after {len(self._held)} bytes of its header"
            )
        if self._left:
            raise InvalidData(f"startup bundle: {self._left} bytes of its stream are missing")
        if self._header.extents:
            self._unpacking.finish()
        if self._due is not None or self._held:
            raise InvalidData("startup bundle: its stream has not the bytes that its extents have")
        # A decoder does not look at every bit of a stream.
        if self._digest.digest() != self._header.stream_digest:
            raise InvalidData(
                f"startup bundle: its stream hashes to sha256:{self._digest.hexdigest()},"
                f" expected sha256:{self._header.stream_digest.hex()}"
            )

    def _read_header(self, data: bytes) -> BundleHeader:
        body = _SIGNED.verified(data, self._keys)[_LENGTH_SIZE:]
        message = unfold(body, MAX_MESSAGE_SIZE, "startup bundle: its header")
        try:
            return _from_message(api.StartupBundle.FromString(message), self._store_dir)
        except DecodeError as error:
            raise InvalidData(
                f"startup bundle: not the message that it should be: {error}"
            ) from None

    def _unpack(self, data: bytes) -> Iterator[ReadyExtent]:
        if len(data) > self._left:
            raise InvalidData("startup bundle: more bytes than its header says")
        self._left -= len(data)
        self._digest.update(data)
        for piece in self._unpacking.decompress(data):
            self._held += piece
            while self._due is not None and len(self._held) >= self._due.size:
                extent = self._due
                content = bytes(memoryview(self._held)[: extent.size])
                del self._held[: extent.size]
                _check_content(extent, content)
                self._due = next(self._extents, None)
                yield ReadyExtent(extent, content)
            if self._due is None and self._held:
                raise InvalidData("startup bundle: its stream unfolds to more than its extents")


def _compress(content: bytes) -> bytes:
    """One frame whose window is all of it."""
    window = max(zstandard.WINDOWLOG_MIN, (len(content) - 1).bit_length())
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=window, enable_ldm=True, source_size=len(content)
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


def _header_end(data: bytearray) -> int | None:
    """Where the header ends of a file that begins with ``data``; ``None`` where that cannot be said yet."""
    content = _SIGNED.content_start(data)
    if content is None or len(data) < content + _LENGTH_SIZE:
        return None
    body = content + _LENGTH_SIZE
    length = int.from_bytes(data[content:body], "little")
    if length > MAX_HEADER_SIZE:
        raise InvalidData(
            f"startup bundle: its header has {length} bytes, expected at most {MAX_HEADER_SIZE}"
        )
    return body + length


def _to_message(header: BundleHeader, store_dir: StoreDir) -> api.StartupBundle:
    place = {info.store_path: number for number, info in enumerate(header.narinfos)}
    number_of = {path: number for number, (path, _) in enumerate(header.indexes)}
    return api.StartupBundle(
        closure=bytes.fromhex(header.closure.hex),
        narinfos=[info.to_text().encode() for info in header.narinfos],
        indexed=[place[path] for path, _ in header.indexes],
        indexes=[data for _, data in header.indexes],
        extents=api.Extents(
            indexes=[number_of[extent.path] for extent in header.extents],
            offsets=[extent.offset for extent in header.extents],
            sizes=[extent.size for extent in header.extents],
            hashes=b"".join(extent.digest for extent in header.extents),
        ),
        stream_size=header.stream_size,
        stream_hash=header.stream_digest,
    )


def _from_message(message: api.StartupBundle, store_dir: StoreDir) -> BundleHeader:
    _check_count("narinfos", len(message.narinfos), MAX_PATHS)
    _check_count("extents", len(message.extents.sizes), MAX_EXTENTS)
    infos = tuple(_narinfo(data, store_dir) for data in message.narinfos)
    if len(message.indexed) != len(message.indexes):
        raise InvalidData(
            f"startup bundle: {len(message.indexes)} indexes of {len(message.indexed)} paths"
        )
    if any(number >= len(infos) for number in message.indexed):
        raise InvalidData("startup bundle: an index of a path that is not in it")
    indexed = [infos[number].store_path for number in message.indexed]
    header = BundleHeader(
        ClosureDigest(message.closure.hex()),
        infos,
        tuple(zip(indexed, message.indexes, strict=True)),
        tuple(_extents(message.extents, indexed)),
        message.stream_size,
        message.stream_hash,
    )
    digest = ClosureDigest.of((info.store_path for info in infos), store_dir)
    if digest != header.closure:
        raise InvalidData(
            f"startup bundle: of closure {header.closure}, but its narinfos are of {digest}"
        )
    return header


def _narinfo(data: bytes, store_dir: StoreDir) -> NarInfo:
    if len(data) > MAX_NARINFO_SIZE:
        raise InvalidData(
            f"startup bundle: a narinfo has {len(data)} bytes, expected at most {MAX_NARINFO_SIZE}"
        )
    return parse_narinfo(data, store_dir)


def _extents(columns: api.Extents, indexed: Sequence[StorePath]) -> Iterator[BundledExtent]:
    count = len(columns.sizes)
    if (
        not count
        == len(columns.offsets)
        == len(columns.indexes)
        == len(columns.hashes) / DIGEST_SIZE
    ):
        raise InvalidData("startup bundle: the columns of its extents have different lengths")
    rows = zip(columns.indexes, columns.offsets, columns.sizes, strict=True)
    for number, (index, offset, size) in enumerate(rows):
        if index >= len(indexed):
            raise InvalidData(f"startup bundle: extent {number} is of an index that is not in it")
        digest = columns.hashes[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
        yield BundledExtent(indexed[index], offset, size, digest)


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidData(f"startup bundle: {count} {what}, expected at most {most}")


def _check_paths(header: BundleHeader) -> None:
    paths = [info.store_path for info in header.narinfos]
    if any(first >= second for first, second in pairwise(paths)):
        raise InvalidData("startup bundle: its narinfos are not sorted by path, each once")
    indexed = [path for path, _ in header.indexes]
    if len(set(indexed)) != len(indexed) or not set(indexed) <= set(paths):
        raise InvalidData("startup bundle: two indexes of one path, or of one that is not in it")


def _check_extents(header: BundleHeader) -> None:
    _check_count("extents", len(header.extents), MAX_EXTENTS)
    sizes = {info.store_path: info.nar_size for info in header.narinfos}
    indexed = {path for path, _ in header.indexes}
    for extent in header.extents:
        if extent.path not in indexed:
            raise InvalidData(
                f"startup bundle: an extent of {extent.path}, which has no index in it"
            )
        if (
            not (0 < extent.size <= MAX_EXTENT_SIZE and extent.offset >= 0)
            or extent.end > sizes[extent.path]
        ):
            raise InvalidData(
                f"startup bundle: {extent.size} bytes from {extent.offset} of a NAR of {sizes[extent.path]}"
            )
    _check_count("bytes of extents", header.content_size, MAX_CONTENT_SIZE)
    _check_count("bytes of its stream", header.stream_size, MAX_STREAM_SIZE)


def _check_content(extent: BundledExtent, data: bytes) -> None:
    digest = hashlib.sha256(data).digest()
    if digest != extent.digest:
        raise ContentMismatch(
            f"startup bundle: {extent.size} bytes from {extent.offset} of {extent.path} hash to"
            f" sha256:{digest.hex()}, expected sha256:{extent.digest.hex()}"
        )
