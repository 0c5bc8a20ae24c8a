"""The text of a startup trace: ``docs/formats.md`` has it byte by byte.

It is text, because a trace is looked at, compared between two releases of an image, and mended by people: each line
says whole what it says, so that a start that reads one file more is one line more. There is one way to write a trace:
what is taken is exactly what is written of it, so that a signature over the text is one over the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, TypeVar

from fusesnap.errors import InvalidData, UntrustedPath
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash
from fusesnap.nix.quoting import quote
from fusesnap.nix.signature import SecretKey, Signature, TrustedKeys
from fusesnap.nix.startup_trace import (
    MAX_EXTENTS,
    MAX_FILES,
    MAX_PATHS,
    Circumstances,
    Ending,
    Extent,
    Flaw,
    Lack,
    StartupTrace,
    TracedFile,
    TracedPath,
)
from fusesnap.nix.store_path import StorePath

# A start of java, which reads 600 files of 30 paths, takes 60 KiB. A stranger gets no more memory than this.
MAX_TRACE_SIZE: Final = 8 * 1024 * 1024
FIRST_LINE: Final = "fusesnap-trace 1"

T = TypeVar("T")


def fingerprint(trace: StartupTrace) -> bytes:
    """The bytes that are signed: everything but the signatures. No narinfo's fingerprint begins like these."""
    return "".join(f"{line}\n" for line in _lines(trace)).encode("ascii")


def format_trace(trace: StartupTrace) -> bytes:
    """The bytes of the format."""
    signatures = "".join(f"Sig: {signature}\n" for signature in trace.signatures)
    return fingerprint(trace) + (f"\n{signatures}".encode() if signatures else b"")


def sign_trace(trace: StartupTrace, key: SecretKey) -> StartupTrace:
    """``trace`` with a signature by ``key``, in place of another by a key of that name."""
    others = [each for each in trace.signatures if each.key_name != key.name]
    return replace(trace, signatures=(*others, key.sign(fingerprint(trace))))


def check_trace_trust(trace: StartupTrace, keys: TrustedKeys) -> None:
    """Raise :class:`UntrustedPath` unless one of ``keys`` has signed ``trace``."""
    said = fingerprint(trace)
    for signature in trace.signatures:
        if any(key.verify(said, signature) for key in keys.named(signature.key_name)):
            return
    names = ", ".join(quote(each.key_name) for each in trace.signatures)
    signers = f"it is signed by {names}, not by a trusted key" if names else "it is unsigned"
    raise UntrustedPath(f"startup trace of closure {trace.closure} is not trusted: {signers}")


def parse_trace(data: bytes) -> StartupTrace:
    """Read a trace. Raises :class:`InvalidData`, naming the line; whether it is trusted is another question."""
    if len(data) > MAX_TRACE_SIZE:
        raise InvalidData(f"startup trace: {len(data)} bytes, expected at most {MAX_TRACE_SIZE}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData(f"startup trace: byte {error.start} is not UTF-8") from None
    reader = _Reader(text)
    trace = reader.trace()
    if format_trace(trace) != data:
        raise InvalidData(
            "startup trace: well-formed, but not written as a trace is: lines out of order, or more than are needed"
        )
    return trace


def _lines(trace: StartupTrace) -> Iterator[str]:
    said = trace.circumstances
    yield FIRST_LINE
    yield f"Closure: {trace.closure}"
    yield f"Recorded: {said.recorded}"
    yield f"Version: {said.version}"
    yield f"Starts: {said.starts}"
    yield f"Readahead: {said.readahead}"
    yield f"Ended: {said.ended}"
    for flaw in sorted(said.flaws):
        yield f"Flaw: {flaw}"
    for path, lack in said.lacks:
        yield f"Lacks: {lack} {path}"
    yield ""
    yield from _uses(trace)


def _uses(trace: StartupTrace) -> Iterator[str]:
    """The body: a path and a file are named where they are first used, and where it goes on with them.

    What was accessed without anything being read of it stands before the next that was.
    """
    paths = files = 0  # how many were named
    path = file = -1  # what the lines belong to

    def named_paths(until: int) -> Iterator[str]:
        nonlocal paths, path
        while paths < until:
            traced = trace.paths[paths]
            yield f"path {traced.path} {traced.nar_hash}"
            path, paths = paths, paths + 1

    def open_file(index: int) -> Iterator[str]:
        nonlocal file, path
        wanted = trace.files[index]
        yield from named_paths(wanted.path + 1)
        if path != wanted.path:
            yield f"path {trace.paths[wanted.path].path}"
            path = wanted.path
        yield f"file {wanted.entry} {wanted.size} {_escaped(wanted.name)}"
        file = index

    for extent in trace.extents:
        while files <= extent.file:
            yield from open_file(files)
            files += 1
        if file != extent.file:
            yield from open_file(extent.file)
        yield f"read {extent.offset} {extent.length}"
    while files < len(trace.files):
        yield from open_file(files)
        files += 1
    yield from named_paths(len(trace.paths))


# Printable ASCII but the space, which separates, and the percent sign, which escapes.
_PLAIN: Final = frozenset(range(0x21, 0x7F)) - {ord("%")}


def _escaped(name: bytes) -> str:
    """A name with bytes that are not plain as ``%XX``; the path itself is ``.``."""
    return (
        "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in name) if name else "."
    )


class _Reader:
    """The lines of a text, taken one after another."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._number = 0
        self._paths: dict[StorePath, tuple[int, TracedPath]] = {}
        self._files: dict[tuple[int, int], tuple[int, TracedFile]] = {}
        self._extents: list[Extent] = []

    def trace(self) -> StartupTrace:
        """Everything."""
        if self._lines.pop() != "":
            raise InvalidData("startup trace: cut short (no line feed at its end)")
        if self._next() != FIRST_LINE:
            raise InvalidData(
                f"startup trace: begins with {quote(self._lines[0])}, expected {FIRST_LINE!r}"
            )
        closure = self._field("Closure", ClosureDigest)
        circumstances = self._circumstances()
        self._body()
        return StartupTrace(
            closure,
            circumstances,
            tuple(path for _, path in self._paths.values()),
            tuple(file for _, file in self._files.values()),
            tuple(self._extents),
            tuple(self._signatures()),
        )

    def _circumstances(self) -> Circumstances:
        return Circumstances(
            recorded=self._field("Recorded", _number),
            version=self._field("Version", str),
            starts=self._field("Starts", _number),
            readahead=self._field("Readahead", _number),
            ended=self._field("Ended", Ending),
            flaws=frozenset(self._fields("Flaw", Flaw)),
            lacks=tuple(self._fields("Lacks", _lack)),
        )

    def _body(self) -> None:
        if self._next() != "":
            raise self._wrong("an empty line behind the fields")
        path = file = -1
        while self._peek() not in ("", None):
            word, _, rest = self._next().partition(" ")
            if word == "path":
                path, file = self._path(rest), -1
            elif word == "file" and path >= 0:
                file = self._file(path, rest)
            elif word == "read" and file >= 0:
                self._read(file, rest)
            else:
                raise self._wrong("'path', or 'file' below a path, or 'read' below a file")

    def _path(self, text: str) -> int:
        name, _, nar_hash = text.partition(" ")
        path = self._parsed(StorePath.parse_base_name, name)
        known = self._paths.get(path)
        if known is not None:
            return known[0]
        index = len(self._paths)
        if index >= MAX_PATHS:
            raise self._wrong(f"at most {MAX_PATHS} paths")
        self._paths[path] = (index, TracedPath(path, self._parsed(Hash.parse, nar_hash)))
        return index

    def _file(self, path: int, text: str) -> int:
        words = text.split(" ")
        if len(words) != 3:  # noqa: PLR2004
            raise self._wrong("'file <entry> <size> <name>'")
        entry, size = (self._parsed(_number, word) for word in words[:2])
        file = TracedFile(path, entry, size, self._parsed(_unescaped, words[2]))
        index, known = self._files.setdefault((path, entry), (len(self._files), file))
        if known != file:
            raise self._wrong(f"entry {entry} as it was named before")
        if index >= MAX_FILES:
            raise self._wrong(f"at most {MAX_FILES} files")
        return index

    def _read(self, file: int, text: str) -> None:
        words = text.split(" ")
        if len(words) != 2:  # noqa: PLR2004
            raise self._wrong("'read <offset> <length>'")
        if len(self._extents) >= MAX_EXTENTS:
            raise self._wrong(f"at most {MAX_EXTENTS} extents")
        offset, length = (self._parsed(_number, word) for word in words)
        self._extents.append(Extent(file, offset, length))

    def _signatures(self) -> Iterator[Signature]:
        if self._peek() == "":
            self._next()
            yield from self._fields("Sig", Signature.parse)
            if self._peek() is not None:
                self._next()
                raise self._wrong("'Sig: <key name>:<base 64>' and nothing else at the end")

    def _fields(self, name: str, parse: Callable[[str], T]) -> Iterator[T]:
        while (self._peek() or "").startswith(f"{name}: "):
            yield self._field(name, parse)

    def _field(self, name: str, parse: Callable[[str], T]) -> T:
        found, separator, value = self._next().partition(": ")
        if not separator or found != name:
            raise self._wrong(f"field {name}")
        return self._parsed(parse, value)

    def _parsed(self, parse: Callable[[str], T], text: str) -> T:
        try:
            return parse(text)
        except InvalidData as error:
            raise InvalidData(f"startup trace: line {self._number}: {error}") from error
        except ValueError:
            raise self._wrong("a word that is known") from None

    def _peek(self) -> str | None:
        return self._lines[self._number] if self._number < len(self._lines) else None

    def _next(self) -> str:
        if self._number >= len(self._lines):
            raise InvalidData(f"startup trace: ends after line {self._number}, expected more")
        self._number += 1
        return self._lines[self._number - 1]

    def _wrong(self, expected: str) -> InvalidData:
        line = self._lines[self._number - 1]
        return InvalidData(
            f"startup trace: line {self._number}: expected {expected}, got {quote(line)}"
        )


_DIGITS: Final = re.compile("0|[1-9][0-9]{0,18}", re.ASCII)
_ESCAPED: Final = re.compile("(?:[\x21-\x24\x26-\x7e]|%[0-9A-F]{2})+", re.ASCII)
_ESCAPE: Final = re.compile(b"%([0-9A-F]{2})")


def _number(text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise InvalidData(f"{quote(text)} is not a decimal number of at most 19 digits")
    return int(text)


def _lack(text: str) -> tuple[StorePath, Lack]:
    word, _, name = text.partition(" ")
    return StorePath.parse_base_name(name), Lack(word)


def _unescaped(text: str) -> bytes:
    if not _ESCAPED.fullmatch(text):
        raise InvalidData(f"{quote(text)} is not a name with other than printable bytes as %XX")
    if text == ".":
        return b""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), text.encode("ascii"))
