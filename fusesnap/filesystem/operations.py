"""The FUSE handlers: the only place where an error becomes an errno.

Handlers read like the protocol. Inodes are computed and handles stateless (``fh`` is the inode), so there is nothing to
forget, nothing to release, and the next process can answer what this one was asked.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, RequestContext, XAttrNameT

from fusesnap.errors import FusesnapError, ReaderReleased, StorageFailure
from fusesnap.filesystem.inode import Inode, InodeKind
from fusesnap.filesystem.nodes import Attributes, DirectoryEntry, Nodes

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def errno_of(error: Exception) -> int:
    """The number that a reader gets. Never ENOENT: that would be a statement about the path's content."""
    if isinstance(error, StorageFailure | OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errno.ENOSPC
    if isinstance(error, ReaderReleased) and error.killed:
        return errno.EINTR
    return errno.EIO


Handler = Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]


def answers_errors(handler: Handler[P, T]) -> Handler[P, T]:
    """Turn what a handler raises into what FUSE can carry; pyfuse3's main loop would end on anything else."""

    @wraps(handler)
    async def answer(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.under_way += 1
        self.requests[handler.__name__] += 1
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except FusesnapError as error:
            log.error("%s: %s", handler.__name__, error)  # noqa: TRY400 - its message is made for people
            raise pyfuse3.FUSEError(errno_of(error)) from error
        except Exception as error:
            log.exception("%s failed in a way that it should not", handler.__name__)
            raise pyfuse3.FUSEError(errno_of(error)) from error
        finally:
            self.under_way -= 1

    return answer


class Operations(pyfuse3.Operations):
    """Answers the kernel from the parts of a mount.

    ``parts`` says who serves which kind of inode; ``capacity`` is a directory on the file system whose free space
    statfs shows (without an answer to statfs, overlayfs refuses the mount). ``on_init`` runs when libfuse has had its
    FUSE_INIT. ``under_way`` counts the requests that were taken and are not answered, ``requests`` all that were taken,
    by the name of their handler, and ``bytes_read`` the bytes that reads were answered with.
    """

    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(
        self,
        parts: Mapping[InodeKind, Nodes],
        capacity: Path,
    ) -> None:
        super().__init__()
        self._parts = parts
        self._capacity = capacity
        self.on_init: Callable[[], None] | None = None
        self.under_way = 0
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0

    def init(self) -> None:
        """FUSE_INIT was answered."""
        if self.on_init is not None:
            self.on_init()

    # ----------------------------------------------------------------- names

    @answers_errors
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name. A verified absence is answered with inode 0, which the kernel may cache."""
        parent = Inode.parse(parent_inode)
        part = self._parts[parent.kind]
        found = await part.lookup(parent, name, ctx.pid)
        if found is not None:
            return entry_attributes(found)
        absent = pyfuse3.EntryAttributes()
        absent.st_ino = InodeT(0)
        absent.entry_timeout = part.negative_timeout(parent)
        return absent

    @answers_errors
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of a node that the kernel holds."""
        node = Inode.parse(inode)
        return entry_attributes(await self._parts[node.kind].attributes(node, ctx.pid))

    async def forget(self, inode_list: object) -> None:
        """Nothing is held for a node, so there is nothing to let go of."""

    @answers_errors
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """A link's target."""
        node = Inode.parse(inode)
        return FileNameT(await self._parts[node.kind].target(node, ctx.pid))

    # ----------------------------------------------------------- directories

    @answers_errors
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """A lazy path is fetched here: readdir does not say who asks."""
        node = Inode.parse(inode)
        await self._parts[node.kind].open_directory(node, ctx.pid)
        return FileHandleT(inode)

    @answers_errors
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries from ``start_id`` on, which is a position: directories never change under a reader."""
        node = Inode.parse(fh)
        entries = await self._parts[node.kind].entries(node, None)
        for position in range(start_id, len(entries)):
            entry = entries[position]
            if not pyfuse3.readdir_reply(token, FileNameT(entry.name), listed(entry), position + 1):
                return

    async def releasedir(self, fh: FileHandleT) -> None:
        """Handles are stateless."""

    # ----------------------------------------------------------------- files

    @answers_errors
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        """Contents are immutable, so the kernel keeps its pages from one open to the next."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            raise pyfuse3.FUSEError(errno.EROFS)
        node = Inode.parse(inode)
        await self._parts[node.kind].open(node, ctx.pid)
        return pyfuse3.FileInfo(fh=FileHandleT(inode), keep_cache=True)

    @answers_errors
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Bytes of a file."""
        node = Inode.parse(fh)
        data = await self._parts[node.kind].read(node, off, size)
        self.bytes_read += len(data)
        return data

    async def release(self, fh: FileHandleT) -> None:
        """Handles are stateless."""

    async def flush(self, fh: FileHandleT) -> None:
        """Nothing is ever written."""

    # ---------------------------------------------------------------- the rest

    @answers_errors
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """One extended attribute. Never ENOSYS: the kernel would stop asking for the whole mount."""
        node = Inode.parse(inode)
        value = (await self._parts[node.kind].xattrs(node)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @answers_errors
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[XAttrNameT]:
        """Their names."""
        node = Inode.parse(inode)
        return [XAttrNameT(name) for name in await self._parts[node.kind].xattrs(node)]

    @answers_errors
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        """The room on the disk that holds the local store."""
        real = os.statvfs(self._capacity)
        answer = pyfuse3.StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        ):
            setattr(answer, field, getattr(real, field))
        answer.f_namemax = 255
        return answer


def entry_attributes(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Our value as pyfuse3's."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = InodeT(attributes.inode)
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blksize = 4096
    entry.st_blocks = (attributes.size + 511) // 512
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attributes.mtime_ns
    entry.entry_timeout = entry.attr_timeout = attributes.timeout
    return entry


def listed(entry: DirectoryEntry) -> pyfuse3.EntryAttributes:
    """What readdir says of a name.

    pyfuse3 has only readdirplus, which wants attributes. Where those would have to be fetched, an entry without a file
    type is given: the kernel passes the name on, finds the attributes invalid (fuse_invalid_attr in fs/fuse/readdir.c),
    and looks the name up when somebody needs more than the name.
    """
    if entry.attributes is not None:
        return entry_attributes(entry.attributes)
    bare = pyfuse3.EntryAttributes()
    bare.st_ino = InodeT(entry.inode)
    bare.st_mode = 0
    return bare
