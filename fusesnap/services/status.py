"""The one place where errors of ours become gRPC statuses.

containerd reads a meaning into some of them, so they are used for nothing else: NOT_FOUND and ALREADY_EXISTS make its
unpacker look for another snapshot and go on, FAILED_PRECONDITION from Remove makes its garbage collector wait,
UNIMPLEMENTED from Cleanup makes it never ask again, and from a differ makes it ask the next one. A store path that is
in no cache is therefore no NOT_FOUND.
"""

from __future__ import annotations

import errno
import logging
from typing import Final

import grpc

from fusesnap import errors

log = logging.getLogger(__name__)

# The message travels in a header of HTTP/2. gRPC's own implementations take 8 KiB of headers by default, and what is
# not ASCII takes three bytes for each of its own.
MAX_MESSAGE: Final = 2400

# The first that an error is an instance of.
_CODES: Final = (
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ContentMismatch, grpc.StatusCode.DATA_LOSS),
    (errors.InvalidData, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.UntrustedPath, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PathNotFound, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidConfiguration, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StateInUse, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unsupported, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotOurs, grpc.StatusCode.UNIMPLEMENTED),
)
_DISK_IS_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the message that a client is told. What is unexpected is logged with its traceback."""
    if not isinstance(error, errors.FusesnapError):
        log.error("unexpected error in a call", exc_info=error)
        message = f"unexpected {type(error).__name__}: {error}; the daemon's log has more"
        return grpc.StatusCode.INTERNAL, _cut(message)
    return _code(error), _cut(str(error))


def _code(error: errors.FusesnapError) -> grpc.StatusCode:
    if isinstance(error, errors.ClosureUnavailable):
        return (
            grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.FAILED_PRECONDITION
        )
    if isinstance(error, errors.StorageFailure):
        return (
            grpc.StatusCode.RESOURCE_EXHAUSTED
            if error.errno in _DISK_IS_FULL
            else grpc.StatusCode.INTERNAL
        )
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def _cut(message: str) -> str:
    data = message.encode(errors="replace")
    if len(data) <= MAX_MESSAGE:
        return message
    shown = data[:MAX_MESSAGE].decode(errors="ignore")
    return f"{shown} ... ({len(data) - MAX_MESSAGE} more bytes)"
