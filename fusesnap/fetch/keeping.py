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
    """Keep ``paths`` from every collector meanwhile. In threads: a collector may have to be waited for.

    What this gives keeps more paths for as long; it is to be called in a thread too.
    """
    kept = roots.keeping(paths)
    keep = await trio.to_thread.run_sync(kept.__enter__)
    try:
        yield keep
    finally:
        with trio.CancelScope(shield=True):  # short, and owed
            await trio.to_thread.run_sync(kept.__exit__, None, None, None)
