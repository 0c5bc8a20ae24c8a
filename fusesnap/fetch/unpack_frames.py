"""What a process that fetches and one that unpacks say to each other over a stream.

Both are ours, of the same version and started by one another, so this format is free to change. A frame is::

    job: u32 | kind: u8 | length: u32 | that many bytes

all little-endian. One stream carries many jobs at once, each with a number of the asker's choice:

    BEGIN   the narinfo, as text
    DATA    the next bytes of the NAR as the cache stores it
    COMMIT  that was all: check it and commit it at once
    QUEUE   that was all: check it, and commit it with others when the disk is free
    DROP    throw the job away
    DONE    the answer to COMMIT and QUEUE: the path is committed; or to DROP: nothing of it is left
    READY   said once, as job 0, when NARs can be taken
    FAILED  the answer to anything: a JSON list of the error's class name, message, and errno or null
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from fusesnap import errors
from fusesnap.errors import FusesnapError, InvalidData, StorageFailure

HEADER = struct.Struct("<IBI")
# A piece of a NAR is at most what the fetching side gathers and a little; anything more is not ours.
MAX_LENGTH = 16 * 1024 * 1024


class FrameKind(IntEnum):
    """See the module."""

    BEGIN = 1
    DATA = 2
    COMMIT = 3
    DROP = 4
    DONE = 5
    FAILED = 6
    READY = 7
    QUEUE = 8


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    job: int
    kind: FrameKind
    body: bytes = b""

    def encode(self) -> bytes:
        """As it goes over the stream."""
        return HEADER.pack(self.job, self.kind, len(self.body)) + self.body


class Buffered(Protocol):
    """A blocking stream that gives all that is asked for, less only at its end."""

    def read(self, size: int, /) -> bytes: ...


class FrameParser:
    """Fed with what comes from the stream, gives frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def receive_data(self, data: bytes) -> None:
        """The next bytes."""
        self._held += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, or ``None`` until there is more. Raises ``InvalidData`` for what is no frame."""
        if len(self._held) < HEADER.size:
            return None
        job, kind, length = _checked(*HEADER.unpack_from(self._held))
        end = HEADER.size + length
        if len(self._held) < end:
            return None
        body = bytes(memoryview(self._held)[HEADER.size : end])
        del self._held[:end]
        return Frame(job, kind, body)


def read_frame(stream: Buffered) -> Frame | None:
    """The next frame of a buffered stream; blocking. ``None`` at its end, also in the middle of a frame.

    Raises ``InvalidData`` for what is no frame.
    """
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    job, kind, length = _checked(*HEADER.unpack(header))
    body = stream.read(length)
    return Frame(job, kind, body) if len(body) == length else None


def _checked(job: int, kind: int, length: int) -> tuple[int, FrameKind, int]:
    if kind not in FrameKind._value2member_map_ or length > MAX_LENGTH:
        raise InvalidData(f"unpack stream: no frame: kind {kind}, {length} bytes")
    return job, FrameKind(kind), length


def encode_error(error: FusesnapError) -> bytes:
    """An error as the body of FAILED."""
    number = error.errno if isinstance(error, StorageFailure) else None
    return json.dumps([type(error).__name__, str(error), number]).encode()


def decode_error(body: bytes) -> FusesnapError:
    """The error that :func:`encode_error` was given."""
    name, message, number = json.loads(body)
    if number is not None:
        return StorageFailure(message, number)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FusesnapError):
        return kind(message)
    return FusesnapError(message)
