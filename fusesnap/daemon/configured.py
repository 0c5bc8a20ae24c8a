"""Whether a configuration can be run with, beyond its form: for a reload, which must not end what runs."""

from __future__ import annotations

from contextlib import AsyncExitStack

import trio

# That all of the program can be imported is part of the answer.
import fusesnap.daemon.services
import fusesnap.daemon.telemetry.exposition
import fusesnap.daemon.telemetry.picture
import fusesnap.daemon.worker
import fusesnap.supervisor  # noqa: F401
from fusesnap.config import Settings
from fusesnap.daemon.build import Authorities, open_pool
from fusesnap.daemon.telemetry.spans import open_spans
from fusesnap.nix.store_path import StoreDir


def check_caches(settings: Settings) -> None:
    """Open what the settings say of caches, keys, passwords and spans, and close it.

    Raises what a daemon would end with.
    """
    open_spans(settings.spans, "check").close()

    async def opened() -> None:
        async with AsyncExitStack() as stack:
            await open_pool(
                settings, StoreDir(settings.store_dir), Authorities.load(settings), stack
            )

    trio.run(opened)
