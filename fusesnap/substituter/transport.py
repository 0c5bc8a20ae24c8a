"""httpx's exceptions, timeouts and statuses as errors of ours: the one place that knows both."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

import httpx
import trio

from fusesnap.errors import DeadlineExceeded, FusesnapError, PathNotFound, Unavailable
from fusesnap.substituter.retry import Refusal, Throttled

# Nix: 404 and 410 mean that there is no such file (src/libstore/filetransfer.cc). So does 403 for a
# narinfo or a NAR, because S3 answers that for a missing object of a bucket that may not be listed
# (src/libstore/http-binary-cache-store.cc). Nix reads 401 and 407 in the same way; here they are
# failures, because a path that cannot be had for lack of a password is not one that is not there.
_NOT_FOUND: Final = frozenset({404, 410})
_FORBIDDEN: Final = 403
# What another attempt may mend, as Nix sees it: 408, 429 and 5xx, except these.
_HOPELESS: Final = frozenset({501, 505, 511})
_TRY_AGAIN: Final = frozenset({408, 425, 429})
_MAY_NAME_A_TIME: Final = frozenset({429, 503})

_HOPELESS_ERRORS: Final = (
    httpx.UnsupportedProtocol,
    httpx.TooManyRedirects,
    httpx.InvalidURL,
    httpx.CookieConflict,
    httpx.DecodingError,
)
_SECONDS: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


@contextmanager
def translated(where: str, seconds: float) -> Iterator[None]:
    """Turn what httpx and :func:`trio.fail_after` raise into Unavailable.

    ``where`` begins the message; ``seconds`` is the time without progress that was allowed.
    """
    try:
        yield
    except (httpx.TimeoutException, trio.TooSlowError) as error:
        raise DeadlineExceeded(f"{where}: {_lateness(error, seconds)}") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict) as error:
        raise _translate(where, error) from error


def status_error(where: str, response: httpx.Response, *, forbidden: bool) -> FusesnapError | None:
    """What is wrong with a response's status, if anything.

    ``forbidden`` says that 403 is how this cache says "not found".
    """
    status = response.status_code
    if response.is_success:
        return None
    said = f"{where}: {_phrase(status)}"
    if status in _NOT_FOUND or (forbidden and status == _FORBIDDEN):
        return PathNotFound(said)
    retry_after = _retry_after(response) if status in _MAY_NAME_A_TIME else None
    if retry_after is not None:
        return Throttled(f"{said}, to be asked again in {retry_after:g} s", retry_after)
    if status in _TRY_AGAIN or (response.is_server_error and status not in _HOPELESS):
        return Unavailable(said)
    return Refusal(said)


def _lateness(error: BaseException, seconds: float) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    return f"no answer within {seconds:g} s"


def _translate(where: str, error: Exception) -> Unavailable:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Refusal(f"{where}: its certificate is not accepted: {cause.verify_message}")
        if isinstance(cause, socket.gaierror):
            return Unavailable(f"{where}: its host name is not known: {cause.strerror}")
        if isinstance(cause, OSError) and cause.strerror:
            return Unavailable(f"{where}: {_failed_step(error)}: {cause.strerror}")
    kind = Refusal if isinstance(error, _HOPELESS_ERRORS) else Unavailable
    return kind(f"{where}: {_failed_step(error)}: {error or type(error).__name__}")


def _failed_step(error: Exception) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return "no connection"
    if isinstance(error, httpx.NetworkError | httpx.ProtocolError):
        return "broken connection"
    return "no answer"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Walk from an exception to those behind it, first those that it names as its cause.

    trio tries several addresses at once and raises the group of what they met with.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__context__, current.__cause__]
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase.lower()}"
    except ValueError:
        return str(status)


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds that ``Retry-After`` asks for (RFC 9110, 10.2.3).

    A date is compared with the server's own clock in ``Date``, so that ours need not agree.
    """
    text = response.headers.get("Retry-After", "")
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        then = parsedate_to_datetime(text)
        now = parsedate_to_datetime(response.headers.get("Date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError):  # no date, or one with and one without a time zone
        return None
