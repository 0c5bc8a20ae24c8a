"""Where the worker's mount shows what, for the process that says how to mount. Only names: it never looks in there."""

from __future__ import annotations

from pathlib import Path

import trio

from fusesnap.filesystem.views import Views
from fusesnap.nix.store_path import StorePath


class WorkerMount:
    """The directories of the daemon's one FUSE mount, see ``LazyLayer`` and ``filesystem.layer_nodes``."""

    def __init__(self, root: Path, views: Views) -> None:
        self._mount = root / "lazy"
        self._views = views

    @property
    def layer(self) -> Path:
        """See ``LazyLayer``."""
        return self._mount / "layer"

    async def view(self, paths: frozenset[StorePath]) -> Path:
        """See ``LazyLayer``."""
        ordinal = await trio.to_thread.run_sync(self._views.ordinal, paths)
        return self._mount / "views" / str(ordinal)
