"""Store paths that no cache has are built, or brought, by a command of the operator's.

The command puts them into the local store, as Nix does it: files first, then a row in Nix's database. What it leaves
is believed for the same reasons as what a cache sends, a trusted signature or a content address, and for one more: that
Nix says that it built it on this machine (``ultimate`` in ``ValidPaths``). Then the files are hashed and held against
the row. What does not hold is removed again.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Final, Protocol

import trio

from fusesnap.errors import (
    ContentMismatch,
    DeadlineExceeded,
    FusesnapError,
    PathNotFound,
    Unavailable,
)
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.trust import check_trust, content_address_check
from fusesnap.store.local_store import LocalStore, ValidPathInfo

log = logging.getLogger(__name__)

STORE_VARIABLE: Final = "FUSESNAP_STORE"
_GRACE: Final = 10.0  # seconds to end after SIGTERM
_KEPT: Final = 8192  # bytes of what the command said last, for the message


class Builder(Protocol):
    """Brings paths that no cache has."""

    async def build(self, path: StorePath, absence: PathNotFound) -> None:
        """Have ``path`` in the local store, verified.

        ``absence`` says who has not got it. Raises an error that says that too: Unavailable, UntrustedPath,
        ContentMismatch, PathNotFound.
        """


class CommandBuilder:
    """Runs ``command`` with the full store path appended, one at a time, for at most ``seconds`` each.

    It gets ``environment``, and there the URL of our store for Nix commands as ``FUSESNAP_STORE``.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        store: LocalStore,
        keys: TrustedKeys,
        environment: Mapping[str, str],
    ) -> None:
        self._command = tuple(command)
        self._seconds = seconds
        self._store = store
        self._keys = keys
        self._environment = {**environment, STORE_VARIABLE: store.nix_url}
        self._turn = trio.Lock()

    async def build(self, path: StorePath, absence: PathNotFound) -> None:
        """See ``Builder``."""
        async with self._turn:
            if await trio.to_thread.run_sync(self._store.is_committed, path):
                return  # while it was another's turn
            log.info("%s: %s; running %s", path, absence, shlex.join(self._command))
            try:
                before = await trio.to_thread.run_sync(self._store.all_valid)
                await self._run(path)
                await trio.to_thread.run_sync(self._verify_closure, path, before)
            except FusesnapError as error:
                error.args = (f"{absence}; {error}",)
                raise

    async def _run(self, path: StorePath) -> None:
        command = [*self._command, self._store.store_dir.format(path)]
        name = f"builder {shlex.join(command)}"
        try:
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(f"{name}: {error.strerror}") from error
        try:
            with trio.fail_after(self._seconds):
                said = await _last_words(process)
                status = await process.wait()
        except trio.TooSlowError as error:
            raise DeadlineExceeded(f"{name}: not done within {self._seconds:g} s") from error
        finally:
            await _end(process)
        if status != 0:
            raise Unavailable(f"{name}: status {status}{f': {said}' if said else ''}")

    def _verify_closure(self, path: StorePath, before: Set[StorePath]) -> None:
        """Verify what the command left: the path, and what it refers to. All of it stays, or nothing."""
        closure = self._store.valid_closure(path)
        if not closure:
            raise PathNotFound(
                f"{shlex.join(self._command)} succeeded, but left no such valid path in {self._store.nix_url}"
            )
        brought = [member for member in self._store.foreign_among(closure) if member not in before]
        try:
            for member in brought:
                info = self._store.valid_path_info(member)
                if info is not None:  # or it was collected meanwhile, with what needed it
                    self._verify(info)
        except BaseException:
            for member in brought:
                self._store.discard(member)
            raise

    def _verify(self, info: ValidPathInfo) -> None:
        narinfo = info.as_narinfo(self._store.store_dir)
        if not info.ultimate:
            check_trust(narinfo, self._keys)
        check = None if info.ultimate else content_address_check(narinfo)
        hasher = HashAlgorithm.SHA256.new()
        for piece in nar_bytes(self._store.nar_events(info.store_path)):
            hasher.update(piece)
            if check is not None:
                check.receive_nar(piece)
        got = Hash(HashAlgorithm.SHA256, hasher.digest())
        if got != info.nar_hash:
            raise ContentMismatch(
                f"{info.store_path}: expected NAR hash {info.nar_hash}, as its builder says, got {got}"
            )
        if check is not None:
            for event in self._store.nar_events(info.store_path):
                check.receive(event)
            check.finish()


async def _last_words(process: trio.Process) -> str:
    """Read what a process says, to its end; return the last of it."""
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    kept = b""
    async for piece in process.stdout:
        kept = (kept + piece)[-_KEPT:]
    lines = kept.decode(errors="replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-3:] if line.isprintable())


async def _end(process: trio.Process) -> None:
    """See that nothing of a process, and of those that it started, is left."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            _signal(process, signal.SIGTERM)
            with trio.move_on_after(_GRACE):
                await process.wait()
        _signal(process, signal.SIGKILL)
        await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


def _signal(process: trio.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
