"""The one place where errors of the disk and of SQLite become errors of ours."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure

# SQLite keeps the operating system's number to itself. https://www.sqlite.org/rescode.html
_ERRNO_OF_SQLITE: Final = {
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_AUTH: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_PROTOCOL: errno.EBUSY,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
}
_PRIMARY_CODE: Final = 0xFF  # the rest of an extended result code says more than errno can


@contextmanager
def storage(operation: str, path: Path | str) -> Iterator[None]:
    """Raise :class:`StorageFailure` for an error of the disk or of SQLite within.

    ``operation`` completes the sentence "cannot ..."; ``path`` is the file that it is about.
    """
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        raise StorageFailure(f"cannot {operation} {path}: {os.strerror(number)}", number) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR
        number = _ERRNO_OF_SQLITE.get(code & _PRIMARY_CODE, errno.EIO)
        raise StorageFailure(f"cannot {operation} {path}: {error}", number) from error
