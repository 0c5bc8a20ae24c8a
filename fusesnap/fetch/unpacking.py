"""Who decompresses, checks and commits: the contract, and the way that needs no other process.

An *unpacking* is one NAR on its way through an unpacker. ``feed`` takes the bytes as the cache stores them, in order;
``commit`` is called after the last of them and returns when the path is verified and committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from fusesnap.fetch.unpack import Unpacker
from fusesnap.nix.narinfo import NarInfo
from fusesnap.store.local_store import LocalStore, Pin, StagedPath


class UnpackerDied(Exception):
    """The process that had the NAR is gone. It says nothing of the NAR: another may take it from its start."""


class Unpacking(Protocol):
    """One NAR. Leaving the context without ``commit`` throws away what was received."""

    async def feed(self, compressed: bytes) -> None:
        """Take the next bytes. Raises what makes the rest pointless, perhaps only at a later call."""
        ...

    async def commit(self, *, together: bool = False) -> None:
        """Check the whole and commit it, at once or, when nobody waits for it, ``together`` with others.

        Raises ``InvalidData``, ``ContentMismatch``, ``StorageFailure``.
        """
        ...


class Unpackers(Protocol):
    """Where NARs are unpacked."""

    def unpacking(self, pin: Pin, info: NarInfo) -> AbstractAsyncContextManager[Unpacking]:
        """Begin to unpack the NAR that ``info`` announces for ``pin``. ``UnpackerDied`` may come at any call."""
        ...


class ThreadUnpackers:
    """Unpacks in threads of this process: nothing to start, but its readers share the interpreter lock with it."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    @asynccontextmanager
    async def unpacking(self, pin: Pin, info: NarInfo) -> AsyncIterator[Unpacking]:
        """See ``Unpackers``."""
        staged = await trio.to_thread.run_sync(self._store.stage, pin)
        try:
            yield _ThreadUnpacking(staged, Unpacker(info, staged))
        finally:
            with trio.CancelScope(shield=True):  # a few unlinks of local files: short, and owed
                await trio.to_thread.run_sync(staged.__exit__, None, None, None)


class _ThreadUnpacking:
    def __init__(self, staged: StagedPath, unpacker: Unpacker) -> None:
        self._staged = staged
        self._unpacker = unpacker

    async def feed(self, compressed: bytes) -> None:
        await trio.to_thread.run_sync(self._unpacker.feed, compressed)

    async def commit(self, *, together: bool = False) -> None:
        await trio.to_thread.run_sync(self._unpacker.finish)
        await trio.to_thread.run_sync(self._staged.commit)
