"""The kernel: its version, FUSE, and overlayfs tried for real."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from fusesnap.daemon.doctor.findings import (
    UNAVAILABLE,
    Finding,
    Findings,
    doubtful,
    failing,
    well,
)
from fusesnap.errors import Unsupported

# Seconds for a few mounts; more means that one of them hangs.
PROBE_WITHIN: Final = 60.0
FUSE_SETTINGS: Final = Path("/proc/sys/fs/fuse")
# fs.fuse of the kernel's documentation (admin-guide/sysctl/fs): seconds after which the kernel aborts a connection
# that has not answered a request. We give no limit of our own, so the default holds; a maximum alone is one, too.
REQUEST_TIMEOUTS: Final = ("default_request_timeout", "max_request_timeout")
_PRIVILEGES: Final = (
    "give it CAP_SYS_ADMIN, and a root that it can write to: in a container, a privileged one"
)
_NOT_ROOT: Final = "run fusesnap doctor as root"
_DISK: Final = (
    "put root on a local file system, ext4, XFS (made with ftype=1) or Btrfs, and not on an overlay"
)
_STEP_MENDS: Final = {
    "files": "make room, or give another root",
    "trusted attributes": f"{_DISK}; allow CAP_SYS_ADMIN",
    "whiteouts": f"{_DISK}; allow CAP_MKNOD",
    "overlay mount": f"{_DISK}; modprobe overlay",
}
_OTHER_STEPS: Final = "the kernel's overlayfs does not do as it should: take another kernel"


def examine_machine(root: Path, stall_timeout: float) -> list[Finding]:
    """What the kernel can do, with the state directory ``root``.

    ``stall_timeout`` is how long a reader may wait, in seconds.
    """
    findings = Findings([kernel()])
    findings.extend(request_timeouts(stall_timeout))
    if os.geteuid() != 0:
        return [*findings, doubtful("mounts", "not tried: only root may mount", _NOT_ROOT)]
    with findings.instead_of_error("mounts", _PRIVILEGES):
        found = probe(existing(root))
        findings.extend(fuse(found["fuse"]))
        findings.append(overlay(found["overlay"], existing(root)))
    return findings


def kernel() -> Finding:
    """The kernel's name and version."""
    return well("kernel", f"{platform.system()} {platform.release()}")


def request_timeouts(stall_timeout: float, settings: Path = FUSE_SETTINGS) -> list[Finding]:
    """Whether the kernel ends our mount because a reader waits for a slow cache (Linux 6.14 and later)."""
    limits = {
        name: int((settings / name).read_text())
        for name in REQUEST_TIMEOUTS
        if (settings / name).exists()
    }
    return [
        failing(
            "fuse",
            f"the kernel ends the whole mount when one read waits for {seconds} s (fs.fuse.{name}); "
            f"readers of ours may wait for {stall_timeout:g} s without progress",
            f"sysctl -w fs.fuse.{name}=0, and the same in /etc/sysctl.d",
            UNAVAILABLE,
        )
        for name, seconds in limits.items()
        if seconds
    ]


def existing(path: Path) -> Path:
    """``path``, or what of it is there."""
    return next(each for each in (path, *path.parents) if each.is_dir())


def probe(directory: Path) -> dict[str, Any]:
    """What the probe found on the file system of ``directory``. Raises ``Unsupported`` where it could not be made."""
    with tempfile.TemporaryDirectory(prefix=".fusesnap-doctor-", dir=directory) as empty:
        command = [sys.executable, "-P", "-m", "fusesnap.daemon.doctor.probe", empty]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PROBE_WITHIN, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise Unsupported(f"no answer within {PROBE_WITHIN:g} s: a mount hangs") from error
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise Unsupported(f"cannot be tried: {last or f'status {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fuse(found: dict[str, Any]) -> list[Finding]:
    """Whether FUSE can be mounted, and what the kernel's FUSE can do."""
    if found["error"] is not None:
        mend = "modprobe fuse; run as root, and in a container with /dev/fuse and CAP_SYS_ADMIN"
        return [failing("fuse", found["error"], mend, UNAVAILABLE)]
    findings = [well("fuse", "a mount was made; " + resend(found["resend"]))]
    if not found["idmap"]:
        findings.append(
            doubtful(
                "fuse",
                "a mount cannot be ID-mapped: containers with user namespaces need a complete closure",
                "Linux 6.12 or later; or fusesnap prefetch before such a container",
            )
        )
    return findings


def resend(can: bool) -> str:
    """What happens when a worker dies."""
    if can:
        return "requests of a worker that dies are sent to the next (Linux 6.9)"
    return (
        "the supervisor relays and keeps requests, because Linux before 6.9 cannot send them again"
    )


def overlay(found: dict[str, Any], directory: Path) -> Finding:
    """Whether a container's root can be mounted."""
    if found["error"] is None:
        return well(
            "overlay",
            f"redirects, whiteouts, trusted attributes and writing work in {directory}",
        )
    step = found["step"]
    said = f"{step}: {found['error']}, in {directory}"
    return failing("overlay", said, _STEP_MENDS.get(step, _OTHER_STEPS), UNAVAILABLE)
