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
from functools import partial

import pyfuse3

from fusesnap.errors import Unsupported
from fusesnap.filesystem.operations import Operations

log = logging.getLogger(__name__)

# include/uapi/linux/fuse.h: struct fuse_out_header { u32 len; s32 error; u64 unique; }; a notification has unique 0
# and its code in error.
NOTIFY_RESEND = struct.pack("<IiQ", 16, 7, 0)

RELAYED = "relay:"


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
    fuse: int, init_request: bytes, operations: Operations
) -> Iterator[Callable[[], object]]:
    """Serve the connection ``fuse``, whose kernel side was initialised with ``init_request`` by the supervisor.

    Leaving does not unmount. The block is given what has requests sent again, see :func:`answer_requests`.
    """
    ours, libfuses = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(init_request)
    descriptor = libfuses.detach()

    def take_over() -> None:
        os.dup2(fuse, descriptor, inheritable=False)
        if resend(fuse):
            os.set_blocking(fuse, False)  # see answer_requests
        else:
            log.info(
                "this kernel cannot resend requests (Linux 6.9 can): those of a dead worker are lost"
            )

    operations.on_init = take_over
    with ours, session(descriptor, operations):
        yield partial(resend, fuse)


@contextmanager
def session(descriptor: int, operations: Operations) -> Iterator[Callable[[], object]]:
    """Serve what comes over ``descriptor``, a FUSE_INIT first. libfuse owns it from here, and closes it.

    In relay mode it is one end of a socket pair whose other end the supervisor holds: it sends the FUSE_INIT, carries
    every request and answer, and gives to the next worker what this one leaves unanswered.
    """
    os.set_inheritable(descriptor, False)
    pyfuse3.init(operations, f"/dev/fd/{descriptor}", {"fsname=fusesnap"})
    try:
        yield lambda: None  # a socket has what it says it has
    finally:
        pyfuse3.close(unmount=False)


async def answer_requests(max_tasks: int, send_again: Callable[[], object]) -> None:
    """Answer the kernel until the session ends.

    A request whose reader is killed before we read it is taken back: then there is nothing to read where there was
    something. A read that waits would stop everything in this process, so ours does not; but its EAGAIN ends pyfuse3's
    loop, with every handler in it. So that loop is started anew, and what it had taken is sent again.
    """
    again = True
    while again:
        again = False
        try:
            await pyfuse3.main(max_tasks=max_tasks)
        except* BlockingIOError:
            again = True
            send_again()


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
