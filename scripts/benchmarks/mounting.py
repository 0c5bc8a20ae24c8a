"""mount(2) and umount(2), as a container runtime calls them, without a program in between."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from fusesnap.services.api.mount_pb2 import Mount

# From <linux/mount.h> and <linux/sched.h>.
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS = 0x20000


class Mounter:
    """Mounts, and remembers what is mounted. Methods raise ``OSError``; for any number of threads."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.mounted: list[Path] = []

    def leave_host(self) -> None:
        """Go to a mount namespace of our own, with all that is started from here: the host sees no mount of ours."""
        self._call("unshare", ctypes.c_int(CLONE_NEWNS))
        self._mount("none", Path("/"), "", MS_REC | MS_PRIVATE, "")

    def mount(self, mount: Mount, target: Path) -> None:
        """Do what a snapshotter says, at ``target``, which is made."""
        target.mkdir(parents=True, exist_ok=True)
        flags = MS_RDONLY if "ro" in mount.options else 0
        if mount.type == "bind":
            self._bind(mount.source, target, flags)
        else:
            options = [option for option in mount.options if option not in {"ro", "rw"}]
            self._mount(mount.source, target, mount.type, flags, ",".join(options))
        self.mounted.append(target)

    def bind_read_only(self, source: Path, target: Path) -> None:
        """What a mount with the options ``ro`` and ``rbind`` is to a container runtime: two calls."""
        self._bind(str(source), target, MS_RDONLY)
        self.mounted.append(target)

    def unmount(self, target: Path) -> None:
        """Unmount, and remove the directory."""
        self._call("umount2", os.fsencode(target), ctypes.c_int(0))
        self.mounted.remove(target)
        target.rmdir()

    def close(self) -> None:
        """Unmount what is left, whoever uses it."""
        for target in reversed(self.mounted):
            self._call("umount2", os.fsencode(target), ctypes.c_int(MNT_DETACH))
        self.mounted.clear()

    def _bind(self, source: str, target: Path, flags: int) -> None:
        self._mount(source, target, "", MS_BIND | MS_REC, "")
        if flags:
            self._mount(source, target, "", MS_BIND | MS_REMOUNT | flags, "")

    def _mount(self, source: str, target: Path, kind: str, flags: int, options: str) -> None:
        self._call(
            "mount",
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() or None,
            ctypes.c_ulong(flags),
            options.encode() or None,
        )

    def _call(self, name: str, *arguments: Any) -> None:
        if self._libc[name](*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}", str(arguments[:2]))
