"""Headers of a tar archive, byte for byte as containerd writes them: a layer's digest must not depend on the differ.

The format is POSIX's (pax, "Interchange Formats": ustar and extended headers). Where that leaves a choice, the one here
is that of Go's ``archive/tar`` for a header of its ``FormatPAX``: ustar where everything fits, else an extended header
with a record for each field that does not, the records sorted, and what is left of the field in the header itself.
"""

from __future__ import annotations

import posixpath
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)

REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMBOLIC_LINK: Final = b"2"
CHARACTER_DEVICE: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
_EXTENDED: Final = b"x"

# name mode uid gid size mtime checksum type link magic uname gname devmajor devminor prefix
_USTAR: Final = struct.Struct("100s8s8s8s12s12s8ss100s8s32s32s8s8s155s12x")
_CHECKSUM_AT: Final = 148
_MAGIC: Final = b"ustar\x0000"
_NAME: Final = 100
_PREFIX: Final = 155
_NUMBER: Final = 8  # bytes of a short numeric field, the NUL at its end included
_LONG_NUMBER: Final = 12
_EXTENDED_NAME: Final = b"PaxHeaders.0"


@dataclass(frozen=True, slots=True)
class TarHeader:
    """What an archive says of a file. ``mtime`` is in seconds; ``name`` of a directory ends with a slash.

    ``records`` are extended attributes and the like, by the keyword of their record.
    """

    name: bytes
    kind: bytes = REGULAR
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""
    major: int = 0
    minor: int = 0
    records: Mapping[bytes, bytes] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The header, with an extended header before it where one is needed."""
        records = self._records()
        split = _split(self.name)
        if not (records.keys() - {b"path"}) and (b"path" not in records or split):
            prefix, name = split or (b"", self.name)
            return self._block(name, self.link, prefix)
        body = b"".join(_record(key, records[key]) for key in sorted(records))
        head = _block(_extended_name(self.name), _EXTENDED, size=len(body))
        return head + padded(body) + self._block(_ascii(self.name), _ascii(self.link), b"")

    def _records(self) -> dict[bytes, bytes]:
        """The extended attributes, and what does not fit into the header."""
        records = dict(self.records)
        texts = {b"path": self.name, b"linkpath": self.link}
        records |= {
            keyword: text
            for keyword, text in texts.items()
            if len(text) > _NAME or not text.isascii()
        }
        numbers = {
            b"uid": (self.uid, _NUMBER),
            b"gid": (self.gid, _NUMBER),
            b"size": (self.size, _LONG_NUMBER),
            b"mtime": (self.mtime, _LONG_NUMBER),
        }
        records |= {
            keyword: b"%d" % number
            for keyword, (number, width) in numbers.items()
            if not _fits(number, width)
        }
        return records

    def _block(self, name: bytes, link: bytes, prefix: bytes) -> bytes:
        return _block(
            _text(name),
            self.kind,
            numbers=(self.mode, self.uid, self.gid),
            size=self.size,
            mtime=self.mtime,
            link=_text(link),
            device=_octal(self.major, _NUMBER) + _octal(self.minor, _NUMBER),
            prefix=prefix,
        )


def padded(data: bytes) -> bytes:
    """Data, filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def _block(
    name: bytes,
    kind: bytes,
    *,
    size: int,
    numbers: tuple[int, int, int] = (0, 0, 0),
    mtime: int = 0,
    link: bytes = b"",
    device: bytes = b"",
    prefix: bytes = b"",
) -> bytes:
    block = bytearray(
        _USTAR.pack(
            name,
            *(_octal(number, _NUMBER) for number in numbers),
            _octal(size, _LONG_NUMBER),
            _octal(mtime, _LONG_NUMBER),
            b" " * _NUMBER,  # what the checksum counts for itself
            kind,
            link,
            _MAGIC,
            b"",
            b"",
            device[:_NUMBER],
            device[_NUMBER:],
            prefix,
        )
    )
    block[_CHECKSUM_AT : _CHECKSUM_AT + _NUMBER] = b"%06o\0 " % sum(block)
    return bytes(block)


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """A long name as prefix and name of a ustar header, the prefix as long as it can be; ``None`` if it has no such."""
    if len(name) <= _NAME or not name.isascii():
        return None
    # A directory's own slash is part of its name.
    end = min(len(name) - name.endswith(b"/"), _PREFIX + 1)
    at = name.rfind(b"/", 0, end)
    if at <= 0 or not 0 < len(name) - at - 1 <= _NAME:
        return None
    return name[:at], name[at + 1 :]


def _text(text: bytes) -> bytes:
    """What of a text is in its field. One that is cut must not look like a directory by ending with a slash."""
    cut = text[:_NAME]
    if len(text) == len(cut) or not cut.endswith(b"/"):
        return cut
    end = len(cut[:-1].rstrip(b"/"))
    return cut[:end] + b"\0" + cut[end + 1 :]


def _extended_name(name: bytes) -> bytes:
    directory, _, last = name.rpartition(b"/")
    path = posixpath.normpath(posixpath.join(directory, _EXTENDED_NAME, last))
    return _ascii(path)[:_NAME].rstrip(b"/")


def _ascii(text: bytes) -> bytes:
    return text.decode("ascii", "ignore").encode().replace(b"\0", b"")


def _fits(number: int, width: int) -> bool:
    return 0 <= number < 1 << 3 * (width - 1)


def _octal(number: int, width: int) -> bytes:
    """A number as octal digits with a NUL behind; 0 where it does not fit."""
    return b"%0*o\0" % (width - 1, number if _fits(number, width) else 0)


def _record(keyword: bytes, value: bytes) -> bytes:
    """``<length> <keyword>=<value>\\n``; the length counts its own digits."""
    rest = b" %s=%s\n" % (keyword, value)
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d%s" % (length, rest)
