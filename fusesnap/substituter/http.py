"""A binary cache over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import httpx
import trio

from fusesnap.errors import PathNotFound, Unavailable
from fusesnap.nix.cache_info import MAX_CACHE_INFO_SIZE, CacheInfo
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.addresses import parse_http_url
from fusesnap.substituter.answers import (
    MISSING_CACHE_INFO,
    narinfo_name,
    read_cache_info,
    read_narinfo,
)
from fusesnap.substituter.base import (
    CACHE_INFO_NAME,
    DEFAULT_STORE_DIR,
    Bookmark,
    Meter,
    StoredFile,
    unmetered,
)
from fusesnap.substituter.body import disregard, pieces_of, read_body
from fusesnap.substituter.credentials import Secrets
from fusesnap.substituter.part import PartTransfer
from fusesnap.substituter.retry import (
    DEFAULT_RETRIES,
    CannotContinue,
    PartsUnsupported,
    Refusal,
    Retries,
    RetryPolicy,
)
from fusesnap.substituter.transfer import Transfer
from fusesnap.substituter.transport import status_error, translated

_NOT_ALLOWED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
MAX_REDIRECTS: Final = 10  # as Nix; a CDN needs one or two
# Requests for narinfos at a time. Over HTTP/1.1 as many as there are connections: more wait in
# httpx's queue, which is walked through at every change. HTTP/2 takes 100 streams everywhere (RFC
# 9113, 6.5.2).
_LOOKUPS_HTTP1: Final = 16
_LOOKUPS_HTTP2: Final = 100
# A connection may end without any fault: an idle one that the server closes as we use it, and one
# over HTTP/2 that has carried as many requests as the server likes (1,000 with nginx), where
# httpcore gives up every stream at once (RFC 9113, 6.8). So a small request that is lost with its
# connection is sent again on another, and only so many losses are the cache's failure.
_CONNECTIONS: Final = 3
_LOST_CONNECTION: Final = (
    httpx.ProtocolError,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a cache has.

    ``connect`` for a connection, TLS included; ``stall`` between two signs of life; ``lookup`` for
    the whole of a narinfo or ``nix-cache-info``, from request to last byte.
    """

    connect: float = 10.0
    stall: float = 20.0
    lookup: float = 30.0


DEFAULT_TIMEOUTS: Final = Timeouts()


class HttpSubstituter:
    """A binary cache at an ``http`` or ``https`` URL.

    ``client`` carries the requests for narinfos, ``transfers`` those for NARs (``client`` where
    none is given). They are best apart, ``transfers`` without HTTP/2: httpcore does not reset the
    stream of a response that is given up (encode/httpcore, issue 943), so that a server goes on
    sending a NAR that nobody reads any more, and once 16 MiB were sent so, the connection is stuck
    for everybody. ``retry`` is for NARs, which can be continued where they broke, if who asks for
    one brings no rule of his own; who asks for narinfos asks again himself, or another cache.
    Neither client is closed here. ``meter`` is told of every byte of a body that is no part of a NAR's or a stream's:
    those are counted by whoever reads them.
    """

    def __init__(
        self,
        url: str,
        client: httpx.AsyncClient,
        *,
        transfers: httpx.AsyncClient | None = None,
        store_dir: StoreDir = DEFAULT_STORE_DIR,
        retry: RetryPolicy = DEFAULT_RETRIES,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        secrets: Secrets | None = None,
        meter: Meter = unmetered,
    ) -> None:
        self._address = parse_http_url(url)
        self._client = client
        self._transfers = client if transfers is None else transfers
        self._store_dir = store_dir
        self._retry = retry
        self._timeouts = timeouts
        self._meter = meter
        self._credentials = (secrets or Secrets()).of(self._address)
        # httpx looks through all headers for each that it is asked for.
        self._common = {each: dict(each.headers) for each in (client, self._transfers)}
        # Waiting for a connection of the pool is bounded by the deadlines around it.
        wait = httpx.Timeout(timeouts.stall, connect=timeouts.connect, pool=None)
        self._extensions = {"timeout": wait.as_dict()}
        self._lookups = trio.CapacityLimiter(_LOOKUPS_HTTP1)

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def priority(self) -> int | None:
        return self._address.priority

    async def cache_info(self) -> CacheInfo:
        try:
            # Nix takes 403 as absence for narinfos and NARs, but not here.
            data = await self._small_file(CACHE_INFO_NAME, MAX_CACHE_INFO_SIZE, forbidden=False)
        except PathNotFound:
            return MISSING_CACHE_INFO
        return read_cache_info(self.url, data)

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo:
        name = narinfo_name(path)
        async with self._lookups:
            data = await self._small_file(name, MAX_NARINFO_SIZE, forbidden=True)
        return read_narinfo(self.url, path, data, self._store_dir)

    @asynccontextmanager
    async def nar(
        self, info: StoredFile, retries: Retries | None = None, bookmark: Bookmark | None = None
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        where = f"{self.url}: {info.url}"
        transfer = Transfer(where, info, bookmark or Bookmark())
        reading = self._file(info, transfer, retries or self._retry.start())
        async with aclosing(reading) as pieces:
            yield pieces

    @asynccontextmanager
    async def part(
        self, info: NarInfo, start: int, end: int, retries: Retries | None = None
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        where = f"{self.url}: {info.url}"
        transfer = PartTransfer(where, info, start, end)
        reading = self._file(info, transfer, retries or self._retry.start())
        async with aclosing(reading) as pieces:
            yield pieces

    async def small_file(self, name: str, limit: int) -> bytes:
        return await self._small_file(name, limit, forbidden=True)

    async def _small_file(self, name: str, limit: int, *, forbidden: bool) -> bytes:
        """Read a file whole; raises InvalidData where it has more than ``limit`` bytes."""
        timeouts = self._timeouts
        with (
            translated(self.url, timeouts.lookup),
            trio.fail_after(timeouts.lookup),
            translated(self.url, timeouts.stall),
        ):
            for _ in range(_CONNECTIONS - 1):
                with suppress(*_LOST_CONNECTION):
                    return await self._whole_body(name, limit, forbidden=forbidden)
            return await self._whole_body(name, limit, forbidden=forbidden)

    async def _whole_body(self, name: str, limit: int, *, forbidden: bool) -> bytes:
        headers = {"Accept-Encoding": "identity"}
        async with self._response(self._client, self._url_of(name), headers) as response:
            self._note_protocol(response)
            error = status_error(self.url, response, forbidden=forbidden)
            if error is None and response.status_code != HTTPStatus.OK:
                error = Refusal(f"{self.url}: status {response.status_code}, expected 200")
            if error is not None:
                await disregard(response, self._meter)
                raise error
            return await read_body(f"{self.url}: {name}", response, limit, self._meter)

    async def _file(
        self, info: StoredFile, transfer: Transfer | PartTransfer, retries: Retries
    ) -> AsyncGenerator[bytes]:
        """Give the pieces of a file or of a part, over as many responses as it takes."""
        where = f"{self.url}: {info.url}"
        while not transfer.ended:
            await retries.begin()
            try:
                async with aclosing(self._one_response(where, info, transfer)) as pieces:
                    async for piece in pieces:
                        yield piece
                transfer.end()
            except PartsUnsupported:
                raise  # it is no failure, and to ask again would bring the same
            except Unavailable as error:
                await _pause(error, transfer, retries)

    async def _one_response(
        self, where: str, info: StoredFile, transfer: Transfer | PartTransfer
    ) -> AsyncGenerator[bytes]:
        """Send one request for what is missing and give what comes of it."""
        with translated(where, self._timeouts.stall):
            response = await self._open_transfer(self._url_of(info.url), transfer)
        try:
            transfer.begin(response)
            body = pieces_of(where, response, self._timeouts.stall)
            async with aclosing(body) as pieces:
                async for piece in pieces:
                    transfer.receive(piece)
                    yield piece
        finally:
            await response.aclose()

    async def _open_transfer(
        self, url: httpx.URL, transfer: Transfer | PartTransfer
    ) -> httpx.Response:
        with trio.fail_after(self._timeouts.connect + self._timeouts.stall):
            return await self._send(self._transfers, url, transfer.request_headers())

    @asynccontextmanager
    async def _response(
        self, client: httpx.AsyncClient, url: httpx.URL, headers: Mapping[str, str]
    ) -> AsyncGenerator[httpx.Response]:
        response = await self._send(client, url, headers)
        try:
            yield response
        finally:
            await response.aclose()

    async def _send(
        self, client: httpx.AsyncClient, url: httpx.URL, headers: Mapping[str, str]
    ) -> httpx.Response:
        """Send a GET and follow redirects; the response's body is not read yet.

        httpx would read the body of every redirect to its end, however long it is.
        """
        # The client's build_request would merge all that a request may have with all that a client may.
        own = {name.lower(): value for name, value in headers.items()}
        request = httpx.Request(
            "GET", url, headers={**self._common[client], **own}, extensions=self._extensions
        )
        await self._credentials.look()
        for _ in range(1 + MAX_REDIRECTS):
            response = await self._send_once(client, request)
            if response.status_code in _NOT_ALLOWED:
                response = await self._send_again_if_renewed(client, response)
            if response.next_request is None:
                return response
            request = response.next_request
            await disregard(response, self._meter)
        raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects", request=request)

    async def _send_once(self, client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
        # httpx takes over what the request before a redirect said.
        if "Authorization" in request.headers:
            del request.headers["Authorization"]
        header = self._credentials.header(request.url)
        if header is not None:
            request.headers["Authorization"] = header
        response = await client.send(request, stream=True, auth=None, follow_redirects=False)
        if response.is_success:
            self._credentials.note_accepted(response)
        return response

    async def _send_again_if_renewed(
        self, client: httpx.AsyncClient, response: httpx.Response
    ) -> httpx.Response:
        """Send a request that was not allowed once more, if what it said of us has changed meanwhile.

        Raises Refusal where it is for lack of the right word. A server that has taken that word before, and forbids
        one file, has its own reasons.
        """
        if await self._credentials.renewed(response):
            await disregard(response, self._meter)
            response = await self._send_once(client, response.request)
        status = HTTPStatus(response.status_code)
        forbidden = status == HTTPStatus.FORBIDDEN and not self._credentials.are_accepted(response)
        if status == HTTPStatus.UNAUTHORIZED or forbidden:
            await disregard(response, self._meter)
            said = f"{status.value} {status.phrase.lower()}"
            why = self._credentials.explanation(response.request.url)
            raise Refusal(f"{self.url}: {said}: {why}")
        return response

    def _url_of(self, name: str) -> httpx.URL:
        if name.startswith(("http://", "https://")):
            return httpx.URL(name)
        return httpx.URL(f"{self.url}/{name}")

    def _note_protocol(self, response: httpx.Response) -> None:
        if response.http_version == "HTTP/2":
            self._lookups.total_tokens = _LOOKUPS_HTTP2


async def _pause(error: Unavailable, transfer: Transfer | PartTransfer, retries: Retries) -> None:
    """Wait before a transfer that failed goes on; raise ``error`` if it cannot."""
    if transfer.ended:
        return
    if not transfer.can_continue:
        raise CannotContinue(f"{error}; it does not send the rest alone") from error
    if transfer.take_progress():
        retries.progressed()
    await retries.wait(error)
