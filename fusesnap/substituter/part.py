"""A part of a file on its way over HTTP, through as many responses as it takes.

A state machine as :class:`~.transfer.Transfer` is one for a whole file. Source: RFC 9110, sections 14.2 (Range), 14.4
(Content-Range), 15.3.7 (206) and 15.5.17 (416).
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

import httpx

from fusesnap.errors import Unavailable
from fusesnap.nix.narinfo import NarInfo
from fusesnap.substituter.retry import PartsUnsupported, Refusal
from fusesnap.substituter.transport import status_error

_CONTENT_RANGE: Final = re.compile(
    r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]{1,19}|\*)", re.ASCII
)


class PartTransfer:
    """The bytes from ``start`` up to ``end`` of the file of ``info``."""

    def __init__(self, where: str, info: NarInfo, start: int, end: int) -> None:
        self._where = where
        self._next = start
        self._end = end
        self._is_whole = start == 0 and end == info.file_size
        self._progress_from = start

    @property
    def ended(self) -> bool:
        """Whether nothing is left to ask for."""
        return self._next >= self._end

    @property
    def can_continue(self) -> bool:
        """Whether another request may bring what is missing: always, for what a part is, no other is."""
        return True

    def request_headers(self) -> dict[str, str]:
        """The headers of the next request."""
        return {"Accept-Encoding": "identity", "Range": f"bytes={self._next}-{self._end - 1}"}

    def begin(self, response: httpx.Response) -> None:
        """Judge the head of a response to such a request.

        Raises PathNotFound, Unavailable, Refusal, or PartsUnsupported where the whole file was sent.
        """
        error = status_error(self._where, response, forbidden=True)
        if error is not None:
            raise error
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise Refusal(f"{self._where}: sent as {encoding[:40]!r}, though identity was asked")
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            self._check_range(response.headers.get("Content-Range", ""))
        elif response.status_code != HTTPStatus.OK or not self._is_whole or self._next:
            raise PartsUnsupported(
                f"{self._where}: status {response.status_code} to a request for bytes {self._next} to"
                f" {self._end - 1}, expected 206: this cache sends files whole"
            )

    def receive(self, data: bytes) -> None:
        """Count a piece of the body; raises Refusal where there is too much."""
        self._next += len(data)
        if self._next > self._end:
            raise Refusal(f"{self._where}: more bytes than the {self._end} that it should have")

    def end(self) -> None:
        """The body ended without an error; raises Unavailable where bytes are missing."""
        if not self.ended:
            raise Unavailable(f"{self._where}: ended at byte {self._next}, expected {self._end}")

    def take_progress(self) -> bool:
        """Whether anything came since this was last true."""
        came = self._next > self._progress_from
        self._progress_from = self._next
        return came

    def _check_range(self, text: str) -> None:
        match = _CONTENT_RANGE.fullmatch(text)
        expected = (self._next, self._end - 1)
        if match is None or (int(match[1]), int(match[2])) != expected:
            raise Refusal(
                f"{self._where}: Content-Range is {text[:80]!r}, expected 'bytes {expected[0]}-{expected[1]}/*'"
            )
