"""The bytes of a part of a NAR's file, from the cache that offers it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fusesnap.substituter.base import Bookmark
from fusesnap.substituter.pool import Offer


@asynccontextmanager
async def part_of(
    offer: Offer, start: int, end: int, bookmark: Bookmark
) -> AsyncGenerator[AsyncIterator[bytes]]:
    """A part of the NAR's file, on from where ``bookmark`` says, which is kept up to date."""
    bookmark.resumable = True
    async with (
        offer.substituter.part(offer.narinfo, start + bookmark.received, end) as pieces,
        aclosing(_counted(pieces, bookmark)) as counted,
    ):
        yield counted


async def _counted(pieces: AsyncIterator[bytes], bookmark: Bookmark) -> AsyncGenerator[bytes]:
    async for piece in pieces:
        bookmark.received += len(piece)
        yield piece
