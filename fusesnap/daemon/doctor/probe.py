"""Mounts what a container's root needs, for real, and says what did not work.

A process of its own, because it leaves the mount namespace: whatever it mounts is gone with it. Started as
``python -m fusesnap.daemon.doctor.probe DIRECTORY`` with an empty directory on the file system of the state directory;
prints one JSON object. It never opens anything below its FUSE mount, which nobody serves.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fusesnap import fuse_mount
from fusesnap.fuse_mount import system_call
from fusesnap.snapshots.interface import Mount
from fusesnap.snapshots.overlay import OverlayOptions, overlay

CLONE_NEWNS: Final = 0x20000  # include/uapi/linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # include/uapi/linux/mount.h
OPAQUE, REDIRECT = "trusted.overlay.opaque", "trusted.overlay.redirect"
STORE: Final = ".fusesnap-store"


class WrongView(Exception):
    """The mount shows something else than it must."""


def leave_mount_namespace() -> None:
    """Have mounts that nobody else sees."""
    system_call("unshare", CLONE_NEWNS)
    system_call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)


def try_fuse(directory: Path) -> dict[str, Any]:
    """What the kernel offers in its FUSE_INIT."""
    directory.mkdir()
    try:
        connection = fuse_mount.mount(directory, 16384)
    except fuse_mount.MountFailure as error:
        return {"error": str(error)}
    try:
        at = fuse_mount.IN_HEADER.size + fuse_mount.INIT_IN.size
        flags2 = struct.unpack_from("<I", connection.init_request.ljust(at + 4, b"\0"), at)[0]
        return {
            "error": None,
            "resend": connection.can_resend,
            "idmap": bool(flags2 & fuse_mount.ALLOW_IDMAP),
        }
    finally:
        fuse_mount.detach(directory, abort=True)
        os.close(connection.fuse)


def plant(directory: Path) -> None:
    """An image layer, the store's layer and a farm, as ``snapshots`` makes them."""
    store = directory / "store" / STORE
    (store / "x").mkdir(parents=True)
    (store / "x" / "file").write_text("stored")
    evil = directory / "image" / STORE / "x"
    evil.mkdir(parents=True)
    (evil / "evil").write_text("of the image")
    (directory / "image" / "etc").mkdir()
    (directory / "image" / "etc" / "name").write_text("image")
    (directory / "farm" / "nix" / "store" / "x").mkdir(parents=True)
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir()


def set_attributes(directory: Path) -> None:
    """What farms and the store say to overlayfs."""
    os.setxattr(directory / "store" / STORE, OPAQUE, b"y")
    target = f"/{STORE}/x".encode()
    os.setxattr(directory / "farm" / "nix" / "store" / "x", REDIRECT, target)


def make_whiteout(directory: Path) -> None:
    """Hide the store's own name, as farms do."""
    os.mknod(directory / "farm" / STORE, stat.S_IFCHR, os.makedev(0, 0))


def mount_overlay(directory: Path) -> None:
    """Mount all of it, in the words that containerd is told."""
    lowers = [directory / name for name in ("farm", "store", "image")]
    upper = (directory / "upper", directory / "work")
    mount: Mount = overlay(lowers, OverlayOptions.of_kernel(), upper=upper, redirects=True)
    system_call(
        "mount", mount.source.encode(), os.fsencode(directory / "merged"), mount.type.encode(),
        ctypes.c_ulong(0), os.fsencode(",".join(mount.options)),
    )  # fmt: skip


def look_through_redirects(directory: Path) -> None:
    """A store path is the store's, and nothing of the image is merged into it."""
    expect(os.listdir(directory / "merged" / "nix" / "store" / "x"), ["file"])


def look_for_whiteout(directory: Path) -> None:
    """The store is not shown under its own name."""
    expect(sorted(os.listdir(directory / "merged")), ["etc", "nix"])


def write(directory: Path) -> None:
    """Change a file of a lower layer, remove one, and make one."""
    merged = directory / "merged"
    with (merged / "etc" / "name").open("a") as file:
        file.write(" and container")
    (merged / "new").write_text("container")
    (merged / "nix" / "store" / "x" / "file").unlink()
    expect((merged / "etc" / "name").read_text(), "image and container")
    expect(os.listdir(merged / "nix" / "store" / "x"), [])
    expect((directory / "store" / STORE / "x" / "file").read_text(), "stored")


def expect(seen: object, expected: object) -> None:
    """Raise ``WrongView`` where they differ."""
    if seen != expected:
        raise WrongView(f"shows {seen!r} instead of {expected!r}")


# In this order: each needs what is before it.
STEPS: Final[tuple[tuple[str, Callable[[Path], None]], ...]] = (
    ("files", plant),
    ("trusted attributes", set_attributes),
    ("whiteouts", make_whiteout),
    ("overlay mount", mount_overlay),
    ("redirects", look_through_redirects),
    ("whiteouts in the mount", look_for_whiteout),
    ("writing", write),
)


def try_overlay(directory: Path) -> dict[str, Any]:
    """The first step that does not work, and why."""
    directory.mkdir()
    for step, attempt in STEPS:
        try:
            attempt(directory)
        except OSError as error:
            return {"step": step, "error": error.strerror}
        except WrongView as error:
            return {"step": step, "error": str(error)}
    return {"step": None, "error": None}


def main() -> None:
    """Run."""
    directory = Path(sys.argv[1])
    leave_mount_namespace()
    found = {
        "fuse": try_fuse(directory / "fuse"),
        "overlay": try_overlay(directory / "overlay"),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
