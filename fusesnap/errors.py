"""The one error tree.

Every error that a user can meet is a :class:`FusesnapError`. Its message says what was expected and what came, and
names the offender. Libraries' exceptions are translated into it once, at the boundary where they enter: httpx in
``substituter``, ``OSError`` in ``store``. It leaves in three places only: errno in ``filesystem``, gRPC status in
``services``, exit codes in ``cli``.
"""

from __future__ import annotations

from collections.abc import Iterable


class FusesnapError(Exception):
    """Anything that went wrong and that a user can be told about."""


class InvalidData(FusesnapError):
    """Bytes from outside do not have the form that their format demands."""


class ContentMismatch(InvalidData):
    """Well-formed content that is not what was announced: another hash, another size."""


class UntrustedPath(FusesnapError):
    """A store path for which no trusted key vouches and whose content address does not hold."""


class PathNotFound(FusesnapError):
    """Every substituter answered, and none of them has the path."""


class Unavailable(FusesnapError):
    """An answer could not be had now; asking again later may succeed."""


class DeadlineExceeded(Unavailable):
    """A wait ended at its deadline before there was an answer."""


class ReaderReleased(Unavailable):
    """A wait was ended from outside: somebody cancelled it, or its reader was ``killed`` and cannot go otherwise."""

    def __init__(self, message: str, *, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


class ClosureUnavailable(FusesnapError):
    """Paths of a closure cannot be had.

    ``failures`` holds one error a path. ``retryable`` is true where a later attempt may succeed without anyone's
    doing, because at least one cache could not answer at all.
    """

    SHOWN = 8  # a closure has thousands of paths; a message in a pull's output has a few lines

    def __init__(self, failures: Iterable[FusesnapError]) -> None:
        self.failures = tuple(failures)
        self.retryable = any(isinstance(failure, Unavailable) for failure in self.failures)
        shown = "; ".join(str(failure) for failure in self.failures[: self.SHOWN])
        hidden = len(self.failures) - self.SHOWN
        more = f"; and {hidden} more" if hidden > 0 else ""
        super().__init__(f"{len(self.failures)} store paths cannot be had: {shown}{more}")


class StorageFailure(FusesnapError):
    """The local disk refused: full, read-only, no permission. ``errno`` is the operating system's number."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class InvalidConfiguration(FusesnapError):
    """A setting, an option or an argument is not usable as it stands."""


class StateInUse(FusesnapError):
    """Another daemon holds the state directory."""


class Unsupported(FusesnapError):
    """This machine lacks something that the operation needs."""


class InvalidArgument(FusesnapError):
    """A request that can never succeed, whatever the state."""


class AlreadyExists(FusesnapError):
    """A snapshot of that key or name is there already."""


class NotFound(FusesnapError):
    """No snapshot has that key or name."""


class FailedPrecondition(FusesnapError):
    """The snapshot is there, but not in the state that the request needs."""


class NotOurs(FusesnapError):
    """A request that another service answers: whoever asked is to ask the next one."""
