"""A real systemd in namespaces of its own, beside whatever this machine was started with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from testbed.processes import Service, run, run_unchecked, running

# Below these a node's administrator puts files: the machine's own show through, what is put there stays in the space.
WRITABLE = ("/etc", "/usr/local/bin", "/var/lib")
# In the namespaces, before systemd. A boot changes a machine: a distribution's units empty /tmp, set kernel parameters
# and start what is installed. So none of them is there, and the machine's files cannot be written.
PREPARE = """\
set -eu
mount -t proc proc /proc
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
for place in "$@"; do
  own=/run/own$place
  mkdir -p "$own/upper" "$own/work"
  mount -t overlay -o "lowerdir=$place,upperdir=$own/upper,workdir=$own/work" overlay "$place"
done
mount -t tmpfs tmpfs /etc/systemd/system
mount -t tmpfs tmpfs /lib/systemd/system
mount -t tmpfs tmpfs /lib/systemd/system-generators
for target in nothing sysinit basic shutdown multi-user network-online local-fs; do
  printf '[Unit]\\nDefaultDependencies=no\\nAllowIsolate=yes\\n' >"/lib/systemd/system/$target.target"
done
mount -o remount,bind,ro /
exec env -i container=other PATH="$PATH" /lib/systemd/systemd --system --unit=nothing.target
"""


class Systemd:
    """A running systemd. Its units see the machine's files, but for those below ``WRITABLE`` that are put there."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def pid(self) -> int:
        """The first process in the namespaces, as the machine numbers it."""
        pid = self._service.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0])

    def inside(self, *argv: str | Path) -> list[str | Path]:
        """The words of a command that runs where the units run."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--cgroup", *argv]

    def put(self, path: Path, text: str) -> None:
        """Write a file that units see, and the machine does not."""
        run(self.inside("tee", path), stdin=text)

    def link(self, path: Path, target: Path) -> None:
        """The same with a link."""
        run(self.inside("ln", "--symbolic", target, path))

    def systemctl(self, *words: str, timeout: float = 120) -> str:
        """Run ``systemctl``. Raises CommandFailed."""
        return run(self.inside("systemctl", *words), timeout=timeout)

    def properties(self, unit: str, *names: str) -> Mapping[str, str]:
        """What ``systemctl show`` says of a unit."""
        said = self.systemctl("show", unit, *(f"--property={name}" for name in names))
        return dict(line.split("=", 1) for line in said.splitlines())

    def answers(self) -> bool:
        """Whether it takes commands yet."""
        with contextlib.suppress(OSError, IndexError):
            return not run_unchecked(
                self.inside("systemctl", "is-active", "nothing.target")
            ).returncode
        return False


@contextlib.contextmanager
def systemd(work: Path) -> Iterator[Systemd]:
    """Boot a systemd that starts nothing, for the time of the context; everything in its namespaces ends with it."""
    namespaces = ["--mount", "--pid", "--cgroup", "--ipc", "--uts", "--fork", "--kill-child"]
    # Slave: what the machine unmounts must not live on here.
    unshare = ["unshare", *namespaces, "--propagation", "slave"]
    with running(
        [*unshare, "sh", "-c", PREPARE, "sh", *WRITABLE],
        log=work / "systemd.log",
        stop_timeout=0,  # it would only end its units in order, and they are to be gone
    ) as service:
        booted = Systemd(service)
        service.wait_until(booted.answers)
        yield booted
