"""What happens to a path on its way here, told to whoever was passed in to hear it.

An event has no time of its own: who hears it is called at once, and has a clock. It must not wait, and not fail.

Where single chunks are fetched each request is told of by itself: ``part`` is then what it carries, from its first byte
up to its end in the compressed NAR. It is ``None`` for a whole NAR, and ``BUNDLED`` for what a startup bundle brings of
one; what is ``received`` is then bytes of the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath

Part: TypeAlias = tuple[int, int]
BUNDLED: Final[Part] = (0, 0)


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants ``path``, or ``part`` of it, which nobody was fetching. Each is followed by one ``Landed``.

    ``priority``: for whom; somebody more urgent may join later.
    """

    path: StorePath
    priority: Priority
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """A reader waits for ``path``, which was asked for by somebody less urgent."""

    path: StorePath
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Boarded:
    """Caches are asked who has ``path``."""

    path: StorePath
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class InLine:
    """It is known where ``path`` comes from, and others are before it."""

    path: StorePath
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    """More urgent ones have the link; what came of ``path`` is kept."""

    path: StorePath
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """It is the turn of ``path`` again."""

    path: StorePath
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class TransferBegun:
    """Bytes of ``path`` are asked of ``cache``, its URL; again where one failed before, or gave way to another.

    ``expected``: bytes of the compressed NAR, where they are known. ``kept`` of them are here from an earlier attempt.
    """

    path: StorePath
    cache: str
    expected: int | None
    kept: int = 0
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """``count`` bytes of the compressed NAR of ``path`` came from ``cache``; 0 where they came as parts of it."""

    path: StorePath
    cache: str
    count: int
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Verifying:
    """All bytes of ``path`` came: what is left is to check them and to commit them."""

    path: StorePath
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Landed:
    """``path`` is committed, or ``part`` of it is here; or it is not, and ``error`` says why."""

    path: StorePath
    error: Exception | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Chunks within ``part`` of ``path`` were made of what is here, for somebody as urgent as ``priority``.

    ``size``: the bytes of the compressed NAR that nobody had to send.
    """

    path: StorePath
    priority: Priority
    size: int
    part: Part


FetchEvent: TypeAlias = (
    Asked
    | Joined
    | Boarded
    | InLine
    | TransferBegun
    | Received
    | Paused
    | Resumed
    | Verifying
    | Landed
    | Rebuilt
)
ObserveFetch: TypeAlias = Callable[[FetchEvent], None]


def unobserved(event: FetchEvent) -> None:
    """Nobody wants to know."""
