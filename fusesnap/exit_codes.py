"""Errors to exit codes: the only place. The numbers are those of sysexits.h, so that scripts can tell them apart."""

from __future__ import annotations

from fusesnap.errors import (
    ClosureUnavailable,
    FusesnapError,
    InvalidConfiguration,
    InvalidData,
    PathNotFound,
    StateInUse,
    StorageFailure,
    Unavailable,
    Unsupported,
    UntrustedPath,
)

CODES: tuple[tuple[type[FusesnapError], int, str], ...] = (
    (InvalidData, 65, "data from outside is malformed or is not what was announced"),
    (PathNotFound, 66, "no cache has a path"),
    (Unavailable, 69, "a cache or the daemon could not answer: trying again may help"),
    (Unsupported, 69, "this machine lacks something that is needed"),
    (StorageFailure, 74, "the local disk refused"),
    (StateInUse, 75, "another daemon has the state directory"),
    (UntrustedPath, 77, "no trusted key vouches for a path"),
    (InvalidConfiguration, 78, "an option or the configuration is wrong"),
)


def exit_code(error: FusesnapError) -> int:
    """The process's exit code for ``error``; 1 for what has no number of its own."""
    if isinstance(error, ClosureUnavailable):
        return 69 if error.retryable else exit_code(error.failures[0])
    for kind, code, _ in CODES:
        if isinstance(error, kind):
            return code
    return 1


def table() -> str:
    """The codes as ``--help`` shows them."""
    lines = {code: meaning for _, code, meaning in reversed(CODES)}
    return "\n".join(f"  {code}  {meaning}" for code, meaning in sorted(lines.items()))
