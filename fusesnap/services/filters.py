"""containerd's filters: which of many objects a client wants listed.

Source: containerd, ``pkg/filters/parser.go`` and ``scanner.go``::

    selectors := selector ("," selector)*
    selector  := fieldpath (operator value)?
    fieldpath := field ("." field)*
    field     := quoted | [A-Za-z0-9_-]+
    operator  := "==" | "!=" | "~="
    value     := quoted | [^\\s,]+
    quoted    := a Go string in double quotes; for "~=" also one between slashes or bars

All selectors of a filter must match. Without operator a selector asks whether there is such a field; "~=" looks for a
regular expression in its value. An empty filter matches everything.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fusesnap.errors import InvalidArgument

FieldPath = tuple[str, ...]
Fields = Callable[
    [FieldPath], str | None
]  # the value of an object's field; None if it has no such field

# A label has at most 4096 bytes with its value, and quoting makes at most four characters of one.
MAX_LENGTH: Final = 4 * 4096 + 256


class Operator(Enum):
    """What a selector asks of a value."""

    PRESENT = ""
    EQUAL = "=="
    NOT_EQUAL = "!="
    MATCHES = "~="


_FIELD: Final = re.compile(r"[A-Za-z0-9_-]+")
_OPERATOR: Final = re.compile(r"[=!~]+")
_OPERATORS: Final = {operator.value: operator for operator in Operator if operator.value}

_ESCAPE: Final = (
    r"\\(?:[abfnrtv\\QUOTE]|[0-3][0-7]{2}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})"
)
_QUOTED: Final = {
    quote: re.compile(
        rf"{re.escape(quote)}(?:[^{quote}\\\n\0]|{_ESCAPE.replace('QUOTE', quote)})*{re.escape(quote)}"
    )
    for quote in '"/|'
}
_PART: Final = re.compile(_ESCAPE.replace("QUOTE", '"/|') + r"|[^\\]+")
_SIMPLE_ESCAPES: Final = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))
_SPELLED: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\0": "\\x00"}


@dataclass(frozen=True, slots=True)
class Selector:
    """One question about one field. ``str()`` of it is its canonical form, which parses to the same."""

    field: FieldPath
    operator: Operator = Operator.PRESENT
    value: str = ""

    def matches(self, fields: Fields) -> bool:
        """Whether an object with these ``fields`` is meant."""
        found = fields(self.field)
        match self.operator:
            case Operator.PRESENT:
                return found is not None
            case Operator.EQUAL:
                return found == self.value
            case Operator.NOT_EQUAL:
                return (found or "") != self.value
            case Operator.MATCHES:
                return re.search(self.value, found or "") is not None

    def __str__(self) -> str:
        path = ".".join(map(_quote, self.field))
        if self.operator is Operator.PRESENT:
            return path
        return f"{path}{self.operator.value}{_quote(self.value)}"


@dataclass(frozen=True, slots=True)
class Filter:
    """Selectors that must all match. ``str()`` of it is its canonical form, which parses to the same."""

    selectors: tuple[Selector, ...] = ()

    def matches(self, fields: Fields) -> bool:
        """Whether an object with these ``fields`` is meant."""
        return all(selector.matches(fields) for selector in self.selectors)

    def __str__(self) -> str:
        return ",".join(map(str, self.selectors))


def parse_filter(text: str) -> Filter:
    """Read one filter. Raises ``InvalidArgument``, which shows where it ends to be one."""
    if len(text) > MAX_LENGTH:
        raise InvalidArgument(
            f"filter {text[:64]!r}...: expected at most {MAX_LENGTH} characters, got {len(text)}"
        )
    return Filter(_Parser(text).selectors()) if text else Filter()


def any_matches(filters: Sequence[Filter], fields: Fields) -> bool:
    """Whether one of ``filters`` matches, or there are none."""
    return not filters or any(one.matches(fields) for one in filters)


class _Parser:
    """Reads a filter from left to right. Spaces are skipped before a token, as by containerd's scanner."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> tuple[Selector, ...]:
        found = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._error("',' or the end")
            self._at += 1
            found.append(self._selector())
        return tuple(found)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return Selector(tuple(path))
        operator = self._operator()
        value = self._value(bars=operator is Operator.MATCHES)
        if operator is Operator.MATCHES:
            self._check_expression(value)
        return Selector(tuple(path), operator, value)

    def _field(self) -> str:
        self._skip_spaces()
        if self._peek() == '"':
            return self._quoted()
        found = _FIELD.match(self._text, self._at)
        if found is None:
            raise self._error("a field or a quoted string")
        self._at = found.end()
        return found[0]

    def _operator(self) -> Operator:
        self._skip_spaces()
        found = _OPERATOR.match(self._text, self._at)
        if found is None or found[0] not in _OPERATORS:
            raise self._error("an operator, '==', '!=' or '~='")
        self._at = found.end()
        return _OPERATORS[found[0]]

    def _value(self, *, bars: bool) -> str:
        self._skip_spaces()
        first = self._peek()
        if first == '"' or (bars and first in ("/", "|")):
            return self._quoted()
        # These begin another token, or (a slash, a bar) a quoted string that this operator does not take.
        if first == "" or first in ",.=!~/|":
            raise self._error("a value or a quoted string")
        start = self._at
        while self._at < len(self._text) and _is_value(self._text[self._at]):
            self._at += 1
        if self._at == start:
            raise self._error("a value or a quoted string")
        return self._text[start : self._at]

    def _quoted(self) -> str:
        found = _QUOTED[self._peek()].match(self._text, self._at)
        if found is None:
            raise self._error("a quoted string, which ends and has no illegal escapes")
        value = _unquote(found[0])
        if value is None:
            raise self._error("escapes that stand for characters")
        self._at = found.end()
        return value

    def _check_expression(self, value: str) -> None:
        try:
            re.compile(value)
        except (re.error, OverflowError) as error:
            raise InvalidArgument(
                f"filter {self._text!r}: {value!r} is not a regular expression: {error}"
            ) from error

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_spaces(self) -> None:
        while self._peek().isspace():
            self._at += 1

    def _error(self, expected: str) -> InvalidArgument:
        got = repr(self._peek()) if self._peek() else "the end"
        return InvalidArgument(
            f"filter {self._text!r}: expected {expected} at character {self._at}, got {got}"
        )


def _is_value(character: str) -> bool:
    """Whether it may be in a value without quotes: a letter, mark, number, punctuation mark or symbol."""
    return character != "," and unicodedata.category(character)[0] in "LMNPS"


def _quote(text: str) -> str:
    inner = "".join(_SPELLED.get(character, character) for character in text)
    return f'"{inner}"'.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _unquote(quoted: str) -> str | None:
    """The string that a well-formed quoted one stands for; ``None`` where an escape stands for no character."""
    try:
        parts = [_unescape(part) for part in _PART.findall(quoted[1:-1])]
    except (OverflowError, ValueError):
        return None
    # Bytes that are no UTF-8, which a Go string may hold, match nothing that we have.
    return b"".join(parts).decode(errors="surrogateescape")


def _unescape(part: str) -> bytes:
    if not part.startswith("\\"):
        return part.encode(errors="surrogateescape")
    kind, digits = part[1], part[2:]
    if kind in "uU":
        return chr(int(digits, 16)).encode()
    if kind == "x":
        return bytes([int(digits, 16)])
    if kind.isdigit():
        return bytes([int(part[1:], 8)])
    return _SIMPLE_ESCAPES.get(kind, kind).encode()
