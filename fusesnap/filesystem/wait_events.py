"""That a request of a reader waits, and how its wait ended, told to whoever was passed in to hear it.

As with ``fusesnap.fetch.events``, who hears it is called at once, has a clock, and must neither wait nor fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fusesnap.fetch.flight import Reader
from fusesnap.nix.store_path import StorePath


@dataclass(frozen=True, slots=True)
class Question:
    """What the kernel asks. ``pid`` is the thread that asks, where the kernel says it; ``file`` is within ``path``."""

    operation: str
    path: StorePath
    inode: int
    file: bytes = b""
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Blocked:
    """A request begins to wait. ``number`` counts them in this process.

    ``readers``: who asks, or else (where ``question`` has no pid) who last opened the file.
    """

    number: int
    question: Question
    readers: tuple[Reader, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A request has waited. ``error`` is what it gets instead of data; of one that was cancelled nobody knows."""

    number: int
    error: Exception | None = None
    cancelled: bool = False


WaitEvent: TypeAlias = Blocked | Answered
ObserveWait: TypeAlias = Callable[[WaitEvent], None]


def unobserved(event: WaitEvent) -> None:
    """Nobody wants to know."""
