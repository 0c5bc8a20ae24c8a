"""The Nix archive (NAR): a push parser and a writer.

Source: Nix manual, "Nix Archive (NAR) format"; E. Dolstra, "The purely functional software
deployment model", figure 5.2; ``src/libutil/archive.cc`` of Nix. Everything in a NAR is a string:
its length as 64-bit little-endian number, its bytes, and zeros up to a multiple of 8. A file system
object is ``( type <type> ... )``; a directory's entries are ``entry ( name <name> node <object>
)``, sorted by the bytes of their names.

The parser is a state machine in the manner of sans-I/O protocol libraries: it is fed with
:meth:`NarParser.receive_data` and asked with :meth:`NarParser.next_event`. Only the canonical form
is taken: what a NAR of the same tree would not be byte for byte is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.nar_grammar import (
    CLOSE_ENTRY,
    CLOSE_ROOT,
    DEFAULT_LIMITS,
    DIRECTORY,
    END_ENTRY,
    END_ROOT,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    MAX_FILE_SIZE,
    MAX_NAME_LENGTH,
    MAX_TARGET_LENGTH,
    NAME_NODE,
    NODE,
    REGULAR,
    SYMLINK,
    NarLimits,
    check_name,
    check_target,
    spell,
)
from fusesnap.nix.quoting import quote
from fusesnap.nix.receive_buffer import ReceiveBuffer


@dataclass(frozen=True, slots=True)
class DirectoryStart:
    """A directory; its entries follow, then :class:`DirectoryEnd`. The root's name is empty."""

    name: bytes


@dataclass(frozen=True, slots=True)
class DirectoryEnd:
    """The directory that was started last and not ended yet is complete."""


@dataclass(frozen=True, slots=True)
class RegularFile:
    """A file; ``size`` bytes of :class:`FileData` follow, then :class:`FileEnd`.

    ``offset`` is where its contents begin in the NAR, in bytes.
    """

    name: bytes
    size: int
    executable: bool
    offset: int


@dataclass(frozen=True, slots=True)
class FileData:
    """The next bytes of the file; never empty."""

    data: bytes


@dataclass(frozen=True, slots=True)
class FileEnd:
    """The file is complete."""


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link."""

    name: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class NarEnd:
    """The archive is complete; nothing may follow."""


NarEvent = DirectoryStart | DirectoryEnd | RegularFile | FileData | FileEnd | Symlink | NarEnd


class NeedData(Enum):
    """The answer of a parser that has no event until it is fed."""

    NEED_DATA = "NEED_DATA"


NEED_DATA: Final = NeedData.NEED_DATA


_DIRECTORY_END: Final = DirectoryEnd()
_FILE_END: Final = FileEnd()
_NAR_END: Final = NarEnd()


class NarParser:
    """Reads one NAR from pieces of any size.

    Feed it with :meth:`receive_data` and call :meth:`next_event` until it answers ``NEED_DATA``;
    after the last piece call :meth:`close`. Once it has raised it raises the same again.
    """

    __slots__ = ("_buffer", "_entries", "_left", "_limits", "_name", "_names", "_size", "_state")

    def __init__(self, limits: NarLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._buffer = ReceiveBuffer()
        self._state: _State = NarParser._magic
        self._names: list[bytes] = []  # of each open directory, the entry read last
        self._name = b""  # of the object being read
        self._entries = 0
        self._size = 0  # of the file being read
        self._left = 0  # of its contents, bytes still to come

    @property
    def at_end(self) -> bool:
        """Whether :class:`NarEnd` has been returned."""
        return self._state is NarParser._trailing

    @property
    def offset(self) -> int:
        """Bytes of the NAR that the events returned so far cover."""
        return self._buffer.offset

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Feed the next piece. Of type ``bytes`` it is not copied."""
        self._buffer.append(bytes(data))

    def next_event(self) -> NarEvent | NeedData:
        """Return the next event, or ``NEED_DATA``; raises :class:`InvalidData`."""
        while (event := self._state(self)) is None:
            pass
        return event

    def close(self) -> None:
        """Say that no piece follows; raises :class:`InvalidData` unless the archive is complete."""
        event = self.next_event()
        if event is not NEED_DATA:
            raise InvalidData(f"NAR: closed before its events were read, next is {event!r:.100}")
        if not self.at_end:
            raise InvalidData(f"NAR: cut short at byte {self._buffer.end}{self._where()}")

    def _magic(self) -> _Step:
        buffer = self._buffer
        if not buffer.data.startswith(MAGIC, buffer.position):
            return self._more(MAGIC)
        buffer.position += len(MAGIC)
        self._entries = 1
        self._state = NarParser._type
        return None

    def _type(self) -> _Step:
        buffer = self._buffer
        data, position = buffer.data, buffer.position
        if data.startswith(REGULAR, position):
            return self._regular(position + len(REGULAR), executable=False)
        if data.startswith(DIRECTORY, position):
            return self._open_directory(position + len(DIRECTORY))
        if data.startswith(EXECUTABLE, position):
            return self._regular(position + len(EXECUTABLE), executable=True)
        if data.startswith(SYMLINK, position):
            return self._symlink(position + len(SYMLINK))
        return self._more(REGULAR, EXECUTABLE, DIRECTORY, SYMLINK)

    def _regular(self, position: int, *, executable: bool) -> _Step:
        buffer = self._buffer
        if len(buffer.data) < position + 8:
            return self._wait()
        size = int.from_bytes(buffer.data[position : position + 8], "little")
        if size > MAX_FILE_SIZE:
            raise self._error(f"file of {size} bytes, expected at most {MAX_FILE_SIZE}")
        buffer.position = position + 8
        self._size = self._left = size
        self._state = NarParser._contents if size else NarParser._file_end
        return RegularFile(self._name, size, executable, buffer.offset)

    def _contents(self) -> _Step:
        buffer = self._buffer
        data, position = buffer.data, buffer.position
        available = len(data) - position
        if not available:
            return self._wait()
        if available <= self._left and position == 0:
            buffer.position = available
        else:
            available = min(available, self._left)
            buffer.position = position + available
            data = data[position : position + available]
        self._left -= available
        if not self._left:
            self._state = NarParser._file_end
        return FileData(data)

    def _file_end(self) -> _Step:
        padding = self._size % 8
        closing = (END_ENTRY if self._names else END_ROOT)[padding]
        buffer = self._buffer
        if not buffer.data.startswith(closing, buffer.position):
            return self._more(closing, padding=-padding % 8)
        self._close_object(buffer.position + len(closing))
        return _FILE_END

    def _symlink(self, position: int) -> _Step:
        data = self._buffer.data
        if len(data) < position + 8:
            return self._wait()
        length = int.from_bytes(data[position : position + 8], "little")
        if length > MAX_TARGET_LENGTH:
            raise self._error(
                f"link target of {length} bytes, expected at most {MAX_TARGET_LENGTH}"
            )
        end = position + 8 + length
        if len(data) < end:
            return self._wait()
        closing = (END_ENTRY if self._names else END_ROOT)[length % 8]
        if not data.startswith(closing, end):
            return self._more(closing, start=end, padding=-length % 8)
        target = data[position + 8 : end]
        self._check(check_target, target)
        self._close_object(end + len(closing))
        return Symlink(self._name, target)

    def _open_directory(self, position: int) -> _Step:
        if len(self._names) >= self._limits.max_depth:
            raise self._error(f"nested deeper than {self._limits.max_depth} directories")
        self._buffer.position = position
        self._names.append(b"")
        self._state = NarParser._directory
        return DirectoryStart(self._name)

    def _directory(self) -> _Step:
        buffer = self._buffer
        data, position = buffer.data, buffer.position
        if data.startswith(ENTRY, position):
            return self._entry(position + len(ENTRY))
        closing = CLOSE_ENTRY if len(self._names) > 1 else CLOSE_ROOT
        if not data.startswith(closing, position):
            return self._more(ENTRY, closing)
        self._names.pop()
        self._close_object(position + len(closing))
        return _DIRECTORY_END

    def _entry(self, position: int) -> _Step:
        data = self._buffer.data
        if len(data) < position + 8:
            return self._wait()
        length = int.from_bytes(data[position : position + 8], "little")
        if length > MAX_NAME_LENGTH:
            raise self._error(f"name of {length} bytes, expected at most {MAX_NAME_LENGTH}")
        end = position + 8 + length
        if len(data) < end:
            return self._wait()
        node = NAME_NODE[length % 8]
        if not data.startswith(node, end):
            return self._more(node, start=end, padding=-length % 8)
        name = data[position + 8 : end]
        self._check(check_name, name, self._names[-1])
        self._name = self._names[-1] = name
        self._entries += 1
        if self._entries > self._limits.max_entries:
            raise self._error(f"more than {self._limits.max_entries} entries")
        self._buffer.position = end + len(node)
        self._state = NarParser._type
        return None

    def _close_object(self, position: int) -> None:
        self._buffer.position = position
        self._state = NarParser._directory if self._names else NarParser._end

    def _end(self) -> _Step:
        self._state = NarParser._trailing
        return _NAR_END

    def _trailing(self) -> _Step:
        buffer = self._buffer
        if buffer.position < len(buffer.data):
            raise InvalidData(f"NAR: ends at byte {buffer.offset}, but more bytes follow")
        return self._wait()

    def _wait(self) -> NeedData | None:
        """Answer where more data is needed: try again where some was fed already."""
        return None if self._buffer.refill() else NEED_DATA

    def _more(self, *literals: bytes, start: int | None = None, padding: int = 0) -> _Step:
        """Answer where none of ``literals`` stands: wait if one still may, else raise.

        ``padding`` is how many bytes at the beginning of each literal pad the string before it.
        """
        buffer = self._buffer
        if start is None:
            start = buffer.position
        found = buffer.data[start : start + max(map(len, literals))]
        if any(literal.startswith(found) for literal in literals):
            return self._wait()
        if any(found[:padding]):
            raise self._error("padding is not zero", start)
        raise self._error(_difference(found[padding:], [x[padding:] for x in literals]), start)

    def _check(self, check: Callable[..., None], *arguments: bytes) -> None:
        try:
            check(*arguments)
        except InvalidData as error:
            raise self._error(str(error)) from None

    def _error(self, what: str, position: int | None = None) -> InvalidData:
        buffer = self._buffer
        ahead = 0 if position is None else position - buffer.position
        return InvalidData(f"NAR: at byte {buffer.offset + ahead}{self._where()}: {what}")

    def _where(self) -> str:
        path = b"/".join(name for name in self._names if name)
        return f" near {quote(path)}" if path else ""


_Step = NarEvent | NeedData | None
_State = Callable[[NarParser], _Step]


def _split_strings(literal: bytes) -> list[bytes]:
    """Split a literal into its strings, each as it is spelled."""
    items = []
    while literal:
        end = 8 + -(-int.from_bytes(literal[:8], "little") // 8) * 8
        items.append(literal[:end])
        literal = literal[end:]
    return items


def _text(spelled: bytes) -> bytes:
    """Return what the string at the beginning says, as far as it is there; noise as it is."""
    length = int.from_bytes(spelled[:8], "little")
    return spelled[8 : 8 + length] if length <= MAX_TARGET_LENGTH else spelled


def _difference(found: bytes, literals: list[bytes]) -> str:
    """Say which string was expected where ``found`` departs from the last of ``literals``."""
    candidates = [_split_strings(literal) for literal in literals]
    while agreeing := [c for c in candidates if c and found.startswith(c[0])]:
        found = found[len(agreeing[0][0]) :]
        candidates = [c[1:] for c in agreeing]
    expected = [_text(c[0]) for c in candidates if c]
    text = _text(found)
    if text in expected and found.startswith(spell(text)[: 8 + len(text)]):
        return f"padding of {quote(text)} is not zero"
    return f"expected {' or '.join(dict.fromkeys(map(quote, expected)))}, got {quote(text, 32)}"


class _Writer:
    """Checks the order of events and spells them out."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._left: int | None = None  # bytes missing from the file that is open
        self._size = 0
        self._started = False
        self._ended = False

    def write(self, event: NarEvent) -> bytes:
        match event:
            case FileData(data):
                self._left = self._in_file() - len(data)
                return data
            case FileEnd():
                if self._in_file():
                    raise InvalidData(f"NAR: file of {self._size} bytes has {self._left} too few")
                self._left = None
                return bytes(-self._size % 8) + self._closing()
            case DirectoryEnd() if self._names and self._left is None:
                self._names.pop()
                return self._closing()
            case NarEnd() if self._started and not self._names and self._left is None:
                self._ended = True
                return b""
            case DirectoryStart(name) | RegularFile(name) | Symlink(name):
                return self._opening(name) + self._object(event)
        raise InvalidData(f"NAR: {event} does not belong here")

    def check_complete(self) -> None:
        if not self._ended:
            raise InvalidData("NAR: events end before the archive does")

    def _opening(self, name: bytes) -> bytes:
        if self._left is not None or (self._started and not self._names):
            raise InvalidData(f"NAR: entry {quote(name)} does not belong here")
        if not self._started:
            self._started = True
            return MAGIC
        check_name(name, self._names[-1])
        self._names[-1] = name
        return ENTRY + spell(name) + NODE

    def _object(self, event: DirectoryStart | RegularFile | Symlink) -> bytes:
        match event:
            case DirectoryStart():
                self._names.append(b"")
                return DIRECTORY
            case RegularFile(_, size, executable):
                self._size = self._left = size
                return (EXECUTABLE if executable else REGULAR) + size.to_bytes(8, "little")
            case Symlink(_, target):
                check_target(target)
                return SYMLINK + spell(target) + self._closing()

    def _in_file(self) -> int:
        if self._left is None:
            raise InvalidData("NAR: contents outside a file")
        if self._left < 0:
            raise InvalidData(f"NAR: file of {self._size} bytes has {-self._left} too many")
        return self._left

    def _closing(self) -> bytes:
        return CLOSE_ENTRY if self._names else CLOSE_ROOT


def nar_bytes(events: Iterable[NarEvent]) -> Iterator[bytes]:
    """Write the NAR that ``events`` describe, piece by piece.

    The events are those that :class:`NarParser` gives, the last :class:`NarEnd` included;
    ``offset`` is not looked at. Raises :class:`InvalidData` where they do not make a NAR: unsorted
    names, a file of another size than announced.
    """
    writer = _Writer()
    for event in events:
        yield writer.write(event)
    writer.check_complete()
