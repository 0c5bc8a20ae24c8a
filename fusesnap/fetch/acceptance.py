"""Whether what a cache offers may become what a path is on this node."""

from __future__ import annotations

import trio

from fusesnap.errors import InvalidData
from fusesnap.store.local_store import LocalStore, Pin
from fusesnap.store.partial_nars import PartialNars
from fusesnap.substituter.pool import Offer


class Acceptance:
    """Pins offers, unless another NAR of the path is in use.

    It is when it is committed, and when something of it was shown by its index. Of any other path nothing was ever
    shown, so it may become what its cache has by now.
    """

    def __init__(self, store: LocalStore, partials: PartialNars | None) -> None:
        self._store = store
        self._partials = partials

    async def pin(self, offer: Offer) -> Pin:
        """Pin ``offer``. Raises ``InvalidData`` where another NAR is in use, ``StorageFailure``."""
        info = offer.narinfo
        pinned = self._store.pinned(info.store_path)
        if pinned is not None and pinned.info.nar_hash == info.nar_hash:
            return pinned
        if pinned is not None and await trio.to_thread.run_sync(self._is_in_use, pinned):
            raise InvalidData(
                f"{info.store_path}: offers a NAR that hashes to {info.nar_hash}, "
                f"but the path is in use as {pinned.info.nar_hash}"
            )
        return await trio.to_thread.run_sync(self._store.pin, info)

    def _is_in_use(self, pinned: Pin) -> bool:
        path = pinned.info.store_path
        begun = self._partials is not None and self._partials.is_begun(path)
        return begun or self._store.is_committed(path)
