"""The gRPC server: one unix socket for everything that we serve."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc
import trio

from fusesnap.errors import InvalidConfiguration, StorageFailure
from fusesnap.services.api import snapshots_pb2_grpc
from fusesnap.services.calls import Calls
from fusesnap.services.snapshots_service import SnapshotsService
from fusesnap.snapshots.interface import PromptSnapshots, Snapshots
from fusesnap.store.storage_errors import storage

log = logging.getLogger(__name__)

# Most calls are short; one that waits for a cache holds its thread until its deadline.
THREADS: Final = 64
# containerd's own limit (its defaults.DefaultMaxRecvMsgSize): the labels of a large closure take some 500 KiB.
MAX_MESSAGE_BYTES: Final = 16 << 20
# Bytes in the address of a unix socket, without the NUL at its end (unix(7)).
MAX_SOCKET_PATH: Final = 107
# Seconds for calls that are under way when the server stops.
GRACE: Final = 10.0

# Adds a service to the server, before it starts; its methods run in trio through the calls.
Registration = Callable[[grpc.Server, Calls], None]


async def serve(
    snapshotter: Snapshots,
    address: Path,
    *,
    also: Sequence[Registration] = (),
    prompt: PromptSnapshots | None = None,
    grace: float = GRACE,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on the unix socket ``address`` until cancelled; started once clients can connect.

    ``also`` registers further services on the same socket. ``prompt`` is asked first, in the thread of the call.

    A socket that is there, alive or not, is taken over in one step, so that clients always find one. Cancelled, this
    takes no more calls, gives those under way ``grace`` seconds to end, and then cancels them. Raises
    ``InvalidConfiguration`` for an address that cannot be used, and ``StorageFailure``.
    """
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grpc")
    server = grpc.server(threads, options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    identity = _listen(server, address)
    try:
        async with trio.open_nursery() as nursery:
            under_way = trio.CancelScope(shield=True)
            calls: Calls = await nursery.start(_hold_calls, under_way)
            try:
                service = SnapshotsService(snapshotter, calls, prompt)
                snapshots_pb2_grpc.add_SnapshotsServicer_to_server(service, server)
                for register in also:
                    register(server, calls)
                await _run(server, grace, task_status)
            finally:
                under_way.cancel()
                with trio.CancelScope(shield=True):  # threads wait for answers of this loop
                    await trio.to_thread.run_sync(threads.shutdown)
    finally:
        _give_up(address, identity)


async def _run(server: grpc.Server, grace: float, task_status: trio.TaskStatus[None]) -> None:
    server.start()
    try:
        task_status.started()
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.stop(grace).wait)


async def _hold_calls(under_way: trio.CancelScope, *, task_status: trio.TaskStatus[Calls]) -> None:
    """Hold the calls in a scope of their own: cancelling the server does not cancel them."""
    with under_way:
        async with trio.open_nursery() as nursery:
            task_status.started(Calls(nursery))
            await trio.sleep_forever()


def _listen(server: grpc.Server, address: Path) -> tuple[int, int]:
    """Listen at ``address``; returns the socket's device and inode.

    The socket is bound under another name, made private, and renamed. Besides leaving no gap this keeps an older
    server from unlinking ours when it ends: gRPC unlinks the name that it has bound.
    """
    temporary = address.with_name(f".{secrets.token_hex(4)}")
    _check(address, temporary)
    try:
        server.add_insecure_port(f"unix:{temporary}")
    except RuntimeError as error:
        raise InvalidConfiguration(f"cannot listen on {address}: {error}") from error
    with storage("listen on", address):
        temporary.chmod(0o600)
        status = temporary.stat()
        temporary.rename(address)
    return status.st_dev, status.st_ino


def _check(address: Path, temporary: Path) -> None:
    longest = max(len(os.fsencode(path)) for path in (address, temporary))
    if longest > MAX_SOCKET_PATH or not address.is_absolute():
        raise InvalidConfiguration(
            f"address {address}: expected an absolute path of at most {MAX_SOCKET_PATH} bytes, got {longest}"
        )
    with storage("listen on", address):
        address.parent.stat()
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(address.lstat().st_mode):
                raise InvalidConfiguration(
                    f"address {address}: expected a socket or nothing, got something else"
                )


def _give_up(address: Path, identity: tuple[int, int]) -> None:
    """Remove the socket, unless another server has taken the address over."""
    try:
        with storage("remove", address), suppress(FileNotFoundError):
            status = address.lstat()
            if (status.st_dev, status.st_ino) == identity:
                address.unlink()
    except StorageFailure as error:  # whatever ended the server is told, not this
        log.warning("%s", error)
