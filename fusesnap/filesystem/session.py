"""Joining a mount: one that another process holds, or one of our own.

A FUSE connection is initialised once. The supervisor opens /dev/fuse, mounts, and answers the kernel's FUSE_INIT; a
worker that joins later would wait for a FUSE_INIT that never comes again. So libfuse is given one of our making, over a
socket pair, and once it has had it, its descriptor is replaced by the real one: from there it reads the kernel itself.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyfuse3

from fusesnap.errors import Unsupported
from fusesnap.filesystem.operations import Operations

log = logging.getLogger(__name__)

# include/uapi/linux/fuse.h: struct fuse_out_header { u32 len; s32 error; u64 unique; }; a notification has unique 0
# and its code in error.
NOTIFY_RESEND = struct.pack("<IiQ", 16, 7, 0)


def resend(fuse: int) -> bool:
    """Ask the kernel to send again what a dead worker had taken and not answered (Linux 6.9). False if it cannot."""
    try:
        os.write(fuse, NOTIFY_RESEND)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


@contextmanager
def joined(
    fuse: int, init_request: bytes, operations: Callable[[Callable[[], None]], Operations]
) -> Iterator[None]:
    """Serve the connection ``fuse``, whose kernel side was initialised with ``init_request`` by the supervisor.

    ``operations`` is called with what must run when libfuse has had its FUSE_INIT. Leaving does not unmount.
    """
    ours, libfuses = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(init_request)

    def take_over() -> None:
        os.dup2(fuse, libfuses.fileno(), inheritable=False)
        if not resend(fuse):
            log.info(
                "this kernel cannot resend requests (Linux 6.9 can): those of a dead worker are lost"
            )

    with ours:
        pyfuse3.init(operations(take_over), f"/dev/fd/{libfuses.fileno()}", {"fsname=fusesnap"})
        try:
            yield
        finally:
            pyfuse3.close(unmount=False)
            libfuses.detach()  # libfuse closed it


@contextmanager
def mounted(mountpoint: str, operations: Operations, *, others: bool) -> Iterator[None]:
    """A mount of our own at ``mountpoint``, gone when the block is left. ``others``: other users may read it.

    Raises ``Unsupported`` where the machine has no FUSE or refuses the mount.
    """
    options = {
        "fsname=fusesnap",
        "subtype=fusesnap",
        "ro",
        "default_permissions",
    }
    if others:
        options.add("allow_other")
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise Unsupported(
            f"{mountpoint}: FUSE refused the mount ({error}): is the module loaded (modprobe fuse), /dev/fuse there, "
            "and fusermount3 installed (package fuse3)?"
        ) from error
    try:
        yield
    finally:
        pyfuse3.close(unmount=True)
