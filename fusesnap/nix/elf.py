"""What a dynamic loader will want of an ELF file: its interpreter, the libraries that it needs, and where to look.

Source: System V ABI, chapters 4 and 5 (gABI 4.1: ELF header, program header, dynamic section); ld.so(8) for the meaning
of DT_RUNPATH. The reader does no I/O: it is a generator that yields the ranges of the file that it wants to see.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final

MAGIC: Final = b"\x7fELF"
# Programs have some ten headers, and libraries of a desktop some 50 needs. What has more is not worth the look: this
# only serves to fetch ahead, and its maker is a stranger.
MAX_HEADERS: Final = 128
MAX_DYNAMIC: Final = 64 * 1024
MAX_STRINGS: Final = 256
MAX_STRING: Final = (
    64 * 1024
)  # of RUNPATHs, which name a directory of the store for each dependency

_LOAD, _DYNAMIC, _INTERP = 1, 2, 3  # p_type
_EXECUTABLE, _WRITABLE = 1, 2  # p_flags
_NEEDED, _STRTAB, _RPATH, _RUNPATH = 1, 5, 15, 29  # d_tag


@dataclass(frozen=True, slots=True)
class Range:
    """A piece of the file: at most ``size`` bytes from ``offset``."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Dynamic:
    """``interpreter`` is empty for a library; ``search`` are the directories of DT_RUNPATH (or DT_RPATH), in order.

    ``tables`` is what the loader reads itself: what precedes the code, where linkers put the symbols, and what may be
    written, which it relocates.
    """

    interpreter: bytes
    needed: tuple[bytes, ...]
    search: tuple[bytes, ...]
    tables: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class _Form:
    """Where the fields are, for one word size and byte order."""

    header: struct.Struct  # e_phoff, e_phentsize, e_phnum
    program: struct.Struct
    dynamic: struct.Struct
    wide: bool

    def segment(self, data: bytes, at: int) -> _Segment:
        fields = self.program.unpack_from(data, at)
        if self.wide:
            kind, flags, offset, address, _, size, _, _ = fields
        else:
            kind, offset, address, _, size, _, flags, _ = fields
        return _Segment(kind, flags, offset, address, size)


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    flags: int
    offset: int
    address: int
    size: int

    @property
    def is_tables(self) -> bool:
        """Whether the loader itself reads it, see ``Dynamic``."""
        if self.kind != _LOAD or self.flags & _EXECUTABLE:
            return False
        return self.offset == 0 or bool(self.flags & _WRITABLE)


def _form(wide: bool, order: str) -> _Form:
    if wide:
        header, program, dynamic = "32xQ14xHH", "IIQQQQQQ", "QQ"
    else:
        header, program, dynamic = "28xI10xHH", "IIIIIIII", "II"
    return _Form(
        struct.Struct(order + header),
        struct.Struct(order + program),
        struct.Struct(order + dynamic),
        wide,
    )


_CLASS64: Final = 2
# By e_ident[EI_CLASS] and e_ident[EI_DATA].
_FORMS: Final = {
    bytes((word, order)): _form(word == _CLASS64, mark)
    for word in (1, _CLASS64)
    for order, mark in ((1, "<"), (2, ">"))
}
_HEADER_SIZE: Final = 64
HEAD_SIZE: Final = 20  # up to and with e_machine
_MACHINE_AT: Final = 18
_MARKS: Final = {b"\1": "<", b"\2": ">"}


def machine_of(head: bytes) -> int | None:
    """Return ``e_machine`` of the ELF file that begins with ``head``, 20 bytes of it; None for what is no ELF file."""
    mark = _MARKS.get(head[5:6]) if head.startswith(MAGIC) and len(head) >= HEAD_SIZE else None
    return None if mark is None else int(struct.unpack_from(f"{mark}H", head, _MACHINE_AT)[0])


def read_dynamic() -> Generator[Range, bytes, Dynamic | None]:
    """Find out what the loader will want; ``None`` for what is no dynamic ELF file, or none that makes sense.

    Send what the file has of each range that is yielded, which may be less than was asked for.
    """
    head = yield Range(0, _HEADER_SIZE)
    form = _FORMS.get(head[4:6]) if head.startswith(MAGIC) else None
    if form is None or len(head) < form.header.size:
        return None
    offset, entry_size, count = form.header.unpack_from(head)
    if entry_size < form.program.size or not 0 < count <= MAX_HEADERS:
        return None
    table = yield Range(offset, entry_size * count)
    if len(table) < entry_size * count:
        return None
    segments = [form.segment(table, entry_size * number) for number in range(count)]
    return (yield from _read_segments(form, segments))


def _read_segments(
    form: _Form, segments: Sequence[_Segment]
) -> Generator[Range, bytes, Dynamic | None]:
    dynamic = next((each for each in segments if each.kind == _DYNAMIC), None)
    if dynamic is None or dynamic.size > MAX_DYNAMIC:
        return None
    interp = next((each for each in segments if each.kind == _INTERP), None)
    interpreter = b""
    if interp is not None:
        interpreter = yield Range(interp.offset, min(interp.size, MAX_STRING))
    data = yield Range(dynamic.offset, dynamic.size)
    whole = len(data) - len(data) % form.dynamic.size
    entries = list(form.dynamic.iter_unpack(data[:whole]))
    strings = _file_offset(segments, next((value for tag, value in entries if tag == _STRTAB), -1))
    if strings is None:
        return None
    needed = yield from _read_strings(entries, _NEEDED, strings)
    search = yield from _read_strings(entries, _RUNPATH, strings)
    if not search:
        search = yield from _read_strings(entries, _RPATH, strings)
    directories = tuple(part for each in search for part in each.split(b":") if part)
    tables = tuple(Range(each.offset, each.size) for each in segments if each.is_tables)
    return Dynamic(interpreter.partition(b"\0")[0], tuple(needed), directories, tables)


def _read_strings(
    entries: Sequence[tuple[int, int]], wanted: int, strings: int
) -> Generator[Range, bytes, list[bytes]]:
    found = []
    for value in [value for tag, value in entries if tag == wanted][:MAX_STRINGS]:
        size = 256 if wanted == _NEEDED else MAX_STRING  # a library's name is that of a file
        text = yield Range(strings + value, size)
        found.append(text.partition(b"\0")[0])
    return found


def _file_offset(segments: Sequence[_Segment], address: int) -> int | None:
    """Where in the file lies what is loaded at ``address``."""
    for each in segments:
        if each.kind == _LOAD and each.address <= address < each.address + each.size:
            return each.offset + address - each.address
    return None
