"""Store paths that must not be collected while something is done with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from fusesnap.nix.store_path import StorePath
from fusesnap.store.roots import Roots


@asynccontextmanager
async def keeping(
    roots: Roots, paths: Iterable[StorePath]
) -> AsyncIterator[Callable[[Iterable[StorePath]], None]]:
    """Keep ``paths`` from every collector meanwhile. In threads, where a collector may have to be waited for.

    What this gives keeps more paths for as long; it is to be called in a thread too.
    """
    lease, paths = roots.lease(), tuple(paths)
    if not lease.keep_at_once(paths):
        await trio.to_thread.run_sync(lease.keep, paths)
    try:
        yield lease.keep
    finally:
        if not lease.end_at_once():
            with trio.CancelScope(shield=True):  # short, and owed
                await trio.to_thread.run_sync(lease.end)
