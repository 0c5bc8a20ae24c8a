"""A cache behind a web server that takes PUT: WebDAV, attic's and harmonia's kin, artefact stores."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar

import httpx
import trio

from fusesnap.errors import PathNotFound, Unavailable
from fusesnap.publish.destination import PIECE, Kind
from fusesnap.substituter.addresses import parse_http_url
from fusesnap.substituter.body import disregard, pieces_of
from fusesnap.substituter.credentials import Secrets
from fusesnap.substituter.retry import DEFAULT_RETRIES, Refusal, RetryPolicy
from fusesnap.substituter.transport import status_error, translated

T = TypeVar("T")

# Seconds between two signs of life. A server may write a whole NAR to its disk before it answers.
_STALL: Final = 120.0
_DONE: Final = frozenset({HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT})


class HttpDestination:
    """Files below an ``http`` or ``https`` URL, put with PUT.

    That a file appears whole or not at all is the server's to see to: nginx and Apache write aside and rename. A
    request that fails in a way that may mend is sent again.
    """

    def __init__(
        self,
        url: str,
        client: httpx.AsyncClient,
        spool: Path,
        *,
        secrets: Secrets | None = None,
        retry: RetryPolicy = DEFAULT_RETRIES,
        stall: float = _STALL,
    ) -> None:
        """``spool`` is a local directory. ``client`` is not closed here. Raises InvalidConfiguration."""
        self._address = parse_http_url(url)
        self._client = client
        self._spool = spool
        self._retry = retry
        self._stall = stall
        self._credentials = (secrets or Secrets()).of(self._address)

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def spool(self) -> Path:
        return self._spool

    async def size(self, name: str) -> int | None:
        return await self._with_retries(lambda: self._size(name))

    async def _size(self, name: str) -> int | None:
        response = await self._send("HEAD", name)
        try:
            self._check(name, response)
        except PathNotFound:
            return None
        finally:
            await response.aclose()
        length = response.headers.get("Content-Length", "")
        # A server that does not tell has the file all the same, of a size that nothing equals.
        return int(length) if length.isascii() and length.isdigit() else -1

    async def read(self, name: str) -> AsyncGenerator[bytes]:
        response = await self._send("GET", name)
        try:
            self._check(name, response)
            async with aclosing(pieces_of(self._where(name), response, self._stall)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            await response.aclose()

    async def put(self, name: str, file: Path, kind: Kind) -> None:
        size = (await trio.Path(file).stat()).st_size
        await self._with_retries(lambda: self._put(name, lambda: _pieces(file), size, kind))

    async def put_bytes(self, name: str, data: bytes, kind: Kind) -> None:
        await self._with_retries(lambda: self._put(name, lambda: data, len(data), kind))

    async def names(self, directory: str = "") -> Iterable[str] | None:
        """HTTP has no way to list."""
        return None

    async def _put(
        self, name: str, content: Callable[[], bytes | AsyncIterator[bytes]], size: int, kind: Kind
    ) -> None:
        headers = {
            "Content-Type": kind.media_type,
            "Cache-Control": kind.cache_control,
            "Content-Length": str(size),
        }
        response = await self._send("PUT", name, headers, content())
        try:
            self._check(name, response)
            if response.status_code not in _DONE:
                raise Refusal(
                    f"{self._where(name)}: status {response.status_code} to PUT, expected 200, 201 or 204"
                )
            await disregard(response)
        finally:
            await response.aclose()

    async def _send(
        self,
        method: str,
        name: str,
        headers: dict[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
    ) -> httpx.Response:
        await self._credentials.look()
        with translated(self._where(name), self._stall):
            request = self._client.build_request(
                method,
                f"{self.url}/{name}",
                headers={"Accept-Encoding": "identity", **(headers or {})},
                content=content,
                timeout=httpx.Timeout(self._stall, pool=None),
            )
            told = self._credentials.header(request.url)
            if told is not None:
                request.headers["Authorization"] = told
            return await self._client.send(request, stream=True, auth=None, follow_redirects=False)

    def _check(self, name: str, response: httpx.Response) -> None:
        error = status_error(self._where(name), response, forbidden=False)
        if error is not None:
            raise error

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"

    async def _with_retries(self, attempt: Callable[[], Awaitable[T]]) -> T:
        retries = self._retry.start()
        while True:
            try:
                return await attempt()
            except Unavailable as error:
                await retries.wait(error)


async def _pieces(file: Path) -> AsyncGenerator[bytes]:
    async with await trio.open_file(file, "rb") as opened:
        while piece := await opened.read(PIECE):
            yield piece
