"""How often readers got an error, by kind and by cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fusesnap.errors import (
    ClosureUnavailable,
    DeadlineExceeded,
    InvalidData,
    PathNotFound,
    ReaderReleased,
    StorageFailure,
    Unavailable,
    UntrustedPath,
)

# The first that an error is an instance of.
KINDS: Final = (
    (ReaderReleased, "released"),
    (DeadlineExceeded, "deadline"),
    (Unavailable, "unavailable"),
    (ClosureUnavailable, "unavailable"),
    (PathNotFound, "not found"),
    (UntrustedPath, "untrusted"),
    (InvalidData, "invalid data"),
    (StorageFailure, "disk"),
)


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """``count`` readers got an error of this kind; ``cache`` is the URL of the one that was being read, if any was.

    ``last`` is the message of the newest, which names the path and the reason.
    """

    kind: str
    cache: str | None
    count: int
    last: str


class ErrorCounts:
    """Counts errors. Kinds and caches are few, so it stays small."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str | None], ErrorCount] = {}

    def count(self, error: Exception, cache: str | None) -> None:
        """A reader got ``error`` while ``cache`` was being read."""
        key = kind_of(error), cache
        before = self._counts[key].count if key in self._counts else 0
        self._counts[key] = ErrorCount(*key, before + 1, str(error))

    def all(self) -> list[ErrorCount]:
        """Every kind and cache that had an error, the most frequent first."""
        return sorted(self._counts.values(), key=lambda each: -each.count)


def kind_of(error: Exception) -> str:
    """One word or two for an error, for counters."""
    for kind, name in KINDS:
        if isinstance(error, kind):
            return name
    return "unexpected"
