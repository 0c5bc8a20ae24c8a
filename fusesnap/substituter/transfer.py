"""One file's way over HTTP, through as many responses as it takes.

A state machine that says what to ask next and judges what comes; it sends nothing. Source: RFC
9110, sections 13.1.5 (If-Range), 14 (range requests) and 15.3.7 (206).
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

import httpx

from fusesnap.errors import Unavailable
from fusesnap.substituter.answers import FileLength
from fusesnap.substituter.base import Bookmark, StoredFile
from fusesnap.substituter.retry import CannotContinue, Refusal
from fusesnap.substituter.transport import status_error

# An attempt that brings less than this counts as one that brought nothing: a link that breaks after
# every few packets must not be asked for ever.
PROGRESS: Final = 64 * 1024

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)
_LENGTH: Final = re.compile(r"[0-9]{1,19}", re.ASCII)


class Transfer:
    """The state of one file: how much of it has come, and how the rest can be asked for.

    It begins where ``bookmark`` says, and keeps that up to date.
    """

    def __init__(self, where: str, info: StoredFile, bookmark: Bookmark) -> None:
        self._where = where
        self._bookmark = bookmark
        self._length = FileLength(where, info, bookmark.received)
        if bookmark.length is not None:
            self._length.announced(bookmark.length)
        self._progress_from = bookmark.received
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether nothing is left to ask for.

        Where the length is known, what happens to a connection after the last byte is no matter.
        """
        return self._ended or self._length.complete

    @property
    def can_continue(self) -> bool:
        """Whether another request may bring what is missing: from the start if nothing came yet."""
        return self._length.received == 0 or self._bookmark.resumable is not False

    def request_headers(self) -> dict[str, str]:
        """The headers of the next request: a range after the first byte has come."""
        headers = {"Accept-Encoding": "identity"}
        if self._length.received:
            headers["Range"] = f"bytes={self._length.received}-"
            if self._bookmark.validator is not None:
                headers["If-Range"] = self._bookmark.validator
        return headers

    def begin(self, response: httpx.Response) -> None:
        """Judge the head of a response to such a request.

        Raises PathNotFound, Unavailable, or Refusal where its body is not the continuation.
        """
        error = status_error(self._where, response, forbidden=True)
        if error is not None:
            raise self._gone(error)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise Refusal(f"{self._where}: sent as {encoding[:40]!r}, though identity was asked")
        if self._length.received:
            self._continue(response)
        else:
            self._start(response)

    def receive(self, data: bytes) -> None:
        """Count a piece of the body; raises Refusal where there is too much."""
        self._length.receive(len(data))
        self._bookmark.received = self._length.received

    def end(self) -> None:
        """The body ended without an error; raises Unavailable where the file is not complete."""
        self._length.end()
        self._ended = True

    def take_progress(self) -> bool:
        """Whether enough came since this was last true to speak of progress."""
        if self._length.received - self._progress_from < PROGRESS:
            return False
        self._progress_from = self._length.received
        return True

    def _gone(self, error: Exception) -> Exception:
        """A file that vanishes, or refuses its rest, while it is read was there all the same."""
        if not self._length.received or isinstance(error, Unavailable):
            return error
        return CannotContinue(f"{error}, after {self._length.received} bytes")

    def _start(self, response: httpx.Response) -> None:
        if response.status_code != HTTPStatus.OK:
            raise Refusal(f"{self._where}: status {response.status_code}, expected 200")
        length = response.headers.get("Content-Length", "")
        if _LENGTH.fullmatch(length):
            self._length.announced(int(length))
        self._bookmark.length = self._length.exact
        self._bookmark.resumable = _takes_ranges(response)
        self._bookmark.validator = _strong_validator(response)

    def _continue(self, response: httpx.Response) -> None:
        received = self._length.received
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:
            raise CannotContinue(
                f"{self._where}: cannot be continued after {received} bytes: status"
                f" {response.status_code}, expected 206"
            )
        text = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(text)
        exact = self._length.exact
        if match is None or int(match[1]) != received or not _same_end(match, exact):
            rest = f"{received}-{'*' if exact is None else exact - 1}/{exact or '*'}"
            raise CannotContinue(
                f"{self._where}: Content-Range is {text[:80]!r}, expected 'bytes {rest}'"
            )
        self._bookmark.resumable = True


def _takes_ranges(response: httpx.Response) -> bool | None:
    """What the server says of it; None where it says nothing, which does not mean no."""
    said = response.headers.get("Accept-Ranges", "").lower()
    return {"bytes": True, "none": False}.get(said)


def _same_end(match: re.Match[str], exact: int | None) -> bool:
    """Whether a range reaches to the end of the file of the length that is known."""
    last, length = int(match[2]), match[3]
    if exact is None:
        return length == "*" or last + 1 == int(length)
    return last + 1 == exact and length in ("*", str(exact))


def _strong_validator(response: httpx.Response) -> str | None:
    """What If-Range may carry: a strong ETag.

    A date is strong only under conditions that ask for the server's clock, and the length and the
    NAR's hash tell a changed file anyway.
    """
    tag: str | None = response.headers.get("ETag")
    return tag if tag is not None and tag.startswith('"') else None
