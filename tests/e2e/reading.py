"""What a reader can find out about a store path, to be compared."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path

from testbed.nix_store import NixStore


def fingerprint(root: Path, inside: str) -> dict[str, tuple[object, ...]]:
    """Kind, mode, size, time and content of everything at and below a store path."""
    found: dict[str, tuple[object, ...]] = {}

    def add(path: Path, name: str) -> None:
        info = path.lstat()
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFLNK:
            found[name] = (kind, info.st_size, path.readlink())
        elif kind == stat.S_IFREG:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = (kind, stat.S_IMODE(info.st_mode), info.st_size, info.st_mtime_ns, digest)
        else:
            found[name] = (kind, stat.S_IMODE(info.st_mode), info.st_mtime_ns)
            for entry in sorted(os.listdir(path)):
                add(path / entry, f"{name}/{entry}")

    add(root / inside.lstrip("/"), "")
    return found


def restored(nix_store: NixStore, path: str, directory: Path) -> Path:
    """What ``nix-store --restore`` makes of the path's NAR, with the times that the store has."""
    target = directory / Path(path).name
    dump = directory / "nar"
    with dump.open("wb") as nar:
        subprocess.run(["nix-store", "--dump", nix_store.real(path)], stdout=nar, check=True)
    with dump.open("rb") as nar:
        subprocess.run(["nix-store", "--restore", target], stdin=nar, check=True)
    for entry in [target, *target.rglob("*")] if not target.is_symlink() else []:
        if not entry.is_symlink():
            entry.chmod(0o555 if entry.is_dir() or entry.stat().st_mode & 0o100 else 0o444)
    return target


def without_times(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """restore gives the time of now, the store gives one second."""
    return {
        name: tuple(part for part in entry if not (isinstance(part, int) and part > 10**8))
        for name, entry in found.items()
    }
