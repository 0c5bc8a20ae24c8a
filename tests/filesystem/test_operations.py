"""What a handler raises becomes an errno, whatever it is: pyfuse3's loop would end on anything else."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing

from fusesnap.errors import PathNotFound, ReaderReleased, StorageFailure, Unavailable
from fusesnap.filesystem.inode import Inode, InodeKind
from fusesnap.filesystem.nodes import Attributes, DirectoryEntry, directory
from fusesnap.filesystem.operations import Operations

CONTEXT: Any = SimpleNamespace(pid=7, uid=0, gid=0, umask=0)
INODE = pyfuse3.InodeT(Inode(InodeKind.STORE, 0, 1).number)


class FailingNodes:
    """A part of a mount in which everything fails in the same way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def attributes(self, inode: Inode, pid: int | None) -> Attributes:
        raise self.error

    async def lookup(self, parent: Inode, name: bytes, pid: int | None) -> Attributes | None:
        raise self.error

    def negative_timeout(self, parent: Inode) -> float:
        return 0.0

    async def entries(self, inode: Inode, pid: int | None) -> Sequence[DirectoryEntry]:
        raise self.error

    async def target(self, inode: Inode, pid: int | None) -> bytes:
        raise self.error

    async def open(self, inode: Inode, pid: int | None) -> None:
        raise self.error

    async def open_directory(self, inode: Inode, pid: int | None) -> None:
        raise self.error

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        raise self.error

    async def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        raise self.error


def failing(error: Exception) -> Operations:
    return Operations({InodeKind.STORE: FailingNodes(error)}, Path("/"))


ANSWERS = [
    (PathNotFound("no cache has it"), errno.EIO),  # never ENOENT: that would be a statement
    (Unavailable("later"), errno.EIO),
    (ReaderReleased("cancelled", killed=False), errno.EIO),
    (ReaderReleased("killed", killed=True), errno.EINTR),
    (StorageFailure("full", errno.ENOSPC), errno.ENOSPC),
    (StorageFailure("broken", errno.EROFS), errno.EIO),
    (OSError(errno.ENOENT, "gone"), errno.EIO),
    (ZeroDivisionError("a bug"), errno.EIO),
    (ExceptionGroup("several", [ValueError("a bug")]), errno.EIO),
]


@pytest.mark.parametrize(("error", "number"), ANSWERS, ids=lambda x: type(x).__name__)
async def test_every_handler_answers_every_error(error: Exception, number: int) -> None:
    operations = failing(error)
    handle = pyfuse3.FileHandleT(INODE)
    name = pyfuse3.FileNameT(b"name")
    calls = [
        operations.lookup(INODE, name, CONTEXT),
        operations.getattr(INODE, CONTEXT),
        operations.readlink(INODE, CONTEXT),
        operations.opendir(INODE, CONTEXT),
        operations.readdir(handle, 0, cast(pyfuse3.ReaddirToken, None)),
        operations.open(INODE, pyfuse3.FlagT(0), CONTEXT),
        operations.read(handle, 0, 1),
        operations.getxattr(INODE, pyfuse3.XAttrNameT(b"user.x"), CONTEXT),
        operations.listxattr(INODE, CONTEXT),
    ]
    for call in calls:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call
        assert caught.value.errno == number
    assert operations.under_way == 0


async def test_an_inode_of_no_kind_that_is_served_is_an_error_too() -> None:
    operations = failing(AssertionError("never asked"))
    for number in (1, 2**63 - 1):
        with pytest.raises(pyfuse3.FUSEError):
            await operations.getattr(pyfuse3.InodeT(number), CONTEXT)


class SlowNodes(FailingNodes):
    """A part of a mount that answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(AssertionError("never asked"))
        self.go = trio.Event()

    async def attributes(self, inode: Inode, pid: int | None) -> Attributes:
        await self.go.wait()
        return directory(inode.number)


async def test_requests_under_way_are_counted() -> None:
    nodes = SlowNodes()
    operations = Operations({InodeKind.STORE: nodes}, Path("/"))
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(operations.getattr, INODE, CONTEXT)
        await trio.testing.wait_all_tasks_blocked()
        assert operations.under_way == 3
        nodes.go.set()
    assert operations.under_way == 0
