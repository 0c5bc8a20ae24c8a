"""The body of a response, read in the three ways that a cache's client needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import httpx
import trio

from fusesnap.errors import InvalidData
from fusesnap.nix.compression import Decompressor, decompressor
from fusesnap.substituter.base import Meter, unmetered
from fusesnap.substituter.transport import translated

# The body of a refusal is a page for people. Up to here it is read, which keeps the connection;
# beyond, a new connection costs less.
_DISREGARDED: Final = 16 * 1024


async def disregard(response: httpx.Response, meter: Meter = unmetered) -> None:
    """Be done with a response; a short body is read, so that its connection can be used again.

    ``meter`` is told how many bytes come, here and below.
    """
    read = 0
    async with _raw(response) as pieces:
        async for piece in pieces:
            meter(len(piece))
            read += len(piece)
            if read > _DISREGARDED:
                return


async def pieces_of(where: str, response: httpx.Response, stall: float) -> AsyncGenerator[bytes]:
    """Give the body's bytes as they were sent, each piece within ``stall`` seconds."""
    async with _raw(response) as pieces:
        while True:
            # On an HTTP/2 connection the bytes of any stream keep httpx's own timeout from firing.
            with translated(where, stall), trio.fail_after(stall):
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece


async def read_body(
    where: str, response: httpx.Response, limit: int, meter: Meter = unmetered
) -> bytes:
    """Read a body of up to ``limit`` bytes, without its transport encoding; raises InvalidData.

    A cache may hold narinfos compressed, and send them so whatever was asked for (Nix's setting
    ``narinfo-compression``).
    """
    encoding = response.headers.get("Content-Encoding", "").lower()
    try:
        decoder = decompressor("none" if encoding == "identity" else encoding)
        async with _raw(response) as pieces:
            return await _decoded(pieces, decoder, limit, meter)
    except InvalidData as error:
        raise InvalidData(f"{where}: {error}") from error


async def _decoded(
    pieces: AsyncIterator[bytes], decoder: Decompressor, limit: int, meter: Meter
) -> bytes:
    body = bytearray()
    async for piece in pieces:
        meter(len(piece))
        for part in decoder.decompress(piece):
            body += part
            if len(body) > limit:
                raise InvalidData(f"expected at most {limit} bytes, got more")
    decoder.finish()
    return bytes(body)


@asynccontextmanager
async def _raw(response: httpx.Response) -> AsyncGenerator[AsyncIterator[bytes]]:
    """The body's bytes without any decoding.

    httpx reads through several generators, one in the other, and closing the outermost leaves the
    others to the garbage collector, of which trio complains. A cancellation goes through all.
    """
    pieces = response.aiter_raw()
    try:
        yield pieces
    finally:
        with trio.CancelScope(shield=True) as scope, suppress(httpx.HTTPError):
            scope.cancel()
            async for _ in pieces:
                pass
        await response.aclose()
