"""A private containerd: its own root, state and socket, beside any that the host runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from testbed.containerd_configuration import (
    CRI_NAMESPACE,
    SNAPSHOTTER,
    Release,
    configuration,
    cri_part,
    pods_part,
    write_network,
)
from testbed.cri_pull import cri_pull
from testbed.processes import (
    CommandFailed,
    Service,
    kill_group,
    run,
    run_unchecked,
    running,
    wait_for_process,
)

SHIM = "containerd-shim-runc-v2"
CGROUPS = Path("/sys/fs/cgroup")


class Container:
    """A container that runs in the background. Times are in seconds.

    Programs are run in it by runc itself: ctr closes the pipes of a program that has ended, whether it has read them or
    not (``Delete`` in containerd's ``client/process.go`` cancels their reader).
    """

    def __init__(self, containerd: Containerd, name: str, log: Path) -> None:
        self._containerd = containerd
        self._log = log
        self.name = name

    def execute(self, *argv: str, timeout: float = 60) -> str:
        """Run a program in the container and return its standard output. Raises CommandFailed."""
        return run(self._execution(argv), timeout=timeout)

    def execute_unchecked(
        self, *argv: str, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the container, whatever its status."""
        return run_unchecked(self._execution(argv), timeout=timeout)

    def log_text(self) -> str:
        """What the container's first process has said so far, on both streams."""
        return self._log.read_text(errors="surrogateescape") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """The host's process id of the container's first process. Raises CommandFailed when it has none."""
        listing = self._containerd.ctr("tasks", "ls")
        for line in listing.splitlines()[1:]:
            name, pid, _ = line.split()
            if name == self.name:
                return int(pid)
        raise CommandFailed(f"container {self.name} has no task:\n{self.log_text()}")

    def root(self) -> Path:
        """The container's root file system, as the host can reach it."""
        return Path(f"/proc/{self.pid}/root")

    def mounts(self) -> str:
        """The container's ``mountinfo``, as proc(5) describes it."""
        return Path(f"/proc/{self.pid}/mountinfo").read_text()

    def _execution(self, argv: Sequence[str]) -> list[str]:
        return [*self._containerd.runc(), "exec", self.name, *argv]


class Containerd:
    """A running containerd, driven by ``ctr``. Times are in seconds.

    ``snapshotter`` is the one that images are unpacked into where a call does not name another.
    """

    def __init__(
        self, service: Service, work: Path, snapshotter: str, namespace: str, release: Release
    ) -> None:
        self.namespace = namespace
        self._work = work
        self.release = release
        self.service = service
        self.snapshotter = snapshotter
        self.address = work / "containerd.sock"
        self.fifo_directory = str(work / "fifo")

    def in_namespace(self, namespace: str) -> Containerd:
        """The same containerd, in another of its namespaces."""
        return Containerd(self.service, self._work, self.snapshotter, namespace, self.release)

    def command(self, *arguments: str | Path) -> list[str]:
        """The words of a ``ctr`` command on this containerd."""
        own = ["--address", str(self.address), "--namespace", self.namespace]
        return [self.release.program("ctr"), *own, *(str(each) for each in arguments)]

    def runc(self) -> list[str]:
        """The words with which a ``runc`` command on this containerd's containers begins."""
        return [self.release.program("runc"), "--root", str(self._work / "runc" / self.namespace)]

    def ctr(self, *arguments: str | Path, timeout: float = 60) -> str:
        """Run ``ctr`` and return its standard output. Raises CommandFailed with what it said."""
        return run(self.command(*arguments), timeout=timeout)

    def ctr_unchecked(
        self, *arguments: str | Path, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run ``ctr``, whatever its status."""
        return run_unchecked(self.command(*arguments), timeout=timeout)

    def pull(
        self,
        reference: str,
        *,
        snapshotter: str = "",
        transfer: bool = False,
        timeout: float = 120,
    ) -> None:
        """Pull an image from a registry without TLS, and unpack it.

        ``ctr`` fetches and unpacks it; with ``transfer`` (from 1.7 on) containerd's transfer service does.
        """
        options = ["--plain-http", "--snapshotter", snapshotter or self.snapshotter]
        options += self._local(not transfer)
        self.ctr("images", "pull", *options, reference, timeout=timeout)

    def cri_pull(self, reference: str, *, timeout: float = 60) -> str:
        """Pull an image as a kubelet does, which has no other endpoint for images; returns its id."""
        return cri_pull(self.address, reference, timeout=timeout)

    def import_archive(
        self,
        archive: Path,
        *,
        snapshotter: str = "",
        transfer: bool = False,
        timeout: float = 120,
    ) -> str:
        """Import an ``oci-archive`` and unpack it; returns the image's reference: the name it was written under.

        ``ctr`` unpacks it; with ``transfer`` (from 1.7 on) containerd's transfer service does.
        """
        options = ["--snapshotter", snapshotter or self.snapshotter, *self._local(not transfer)]
        # What ctr says of it differs by version, and the progress of a transfer has blanks for the name's hyphens.
        known = self.images()
        self.ctr("images", "import", *options, archive, timeout=timeout)
        # CRI, where there is one, names it by its id, too.
        (imported,) = {name for name in self.images() - known if not name.startswith("sha256:")}
        return imported

    def images(self) -> set[str]:
        """The references of all images."""
        return set(self.ctr("images", "ls", "--quiet").split())

    def _local(self, local: bool) -> list[str]:
        """Who is to fetch and unpack: ``ctr`` itself, or the transfer service, which 1.6 has not."""
        return [] if self.release.text.startswith("1.6.") else [f"--local={str(local).lower()}"]

    def run_command(
        self,
        reference: str,
        name: str,
        *argv: str,
        options: Sequence[str] = ("--rm",),
        snapshotter: str = "",
    ) -> list[str]:
        """The words of a ``ctr run``. Without ``argv`` the image's own command runs."""
        own = ["--snapshotter", snapshotter or self.snapshotter, "--fifo-dir", self.fifo_directory]
        # Else runc's state would be in /run and the cgroup named after the namespace, both shared with others.
        cgroup = f"/{cgroup_name(self._work)}/{self.namespace}-{name}"
        own += ["--runc-root", str(self._work / "runc"), "--cgroup", cgroup]
        return self.command("run", *own, *options, reference, name, *argv)

    def run(
        self, reference: str, name: str, *argv: str, snapshotter: str = "", timeout: float = 60
    ) -> str:
        """Run a container to its end and remove it; returns what it says on both streams. Raises CommandFailed."""
        done = self.run_unchecked(reference, name, *argv, snapshotter=snapshotter, timeout=timeout)
        if done.returncode != 0:
            status = f"container {name} ended with status {done.returncode}"
            raise CommandFailed(f"{status}:\n{done.stderr}{done.stdout}".rstrip())
        return done.stdout

    def run_unchecked(
        self, reference: str, name: str, *argv: str, snapshotter: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """The same, whatever the container's status."""
        # ctr closes the container's pipes when it has ended, whether it has read them or not.
        with tempfile.TemporaryDirectory(dir=self._work) as directory:
            log = Path(directory) / "output"
            command = self.run_command(
                reference,
                name,
                *argv,
                options=("--rm", "--log-uri", f"file://{log}"),
                snapshotter=snapshotter,
            )
            done = run_unchecked(command, timeout=timeout)
            done.stdout += log.read_text(errors="surrogateescape") if log.exists() else ""
        return done

    @contextlib.contextmanager
    def started(
        self, reference: str, name: str, *argv: str, snapshotter: str = "", timeout: float = 60
    ) -> Iterator[Container]:
        """Keep a container running for the time of the context; its snapshot is removed with it."""
        log = self._work / f"{self.namespace}-{name}.log"
        options = ["--detach", "--log-uri", f"file://{log}"]
        command = self.run_command(reference, name, *argv, options=options, snapshotter=snapshotter)
        try:
            run(command, timeout=timeout)
            yield Container(self, name, log)
        finally:
            self.remove(name)

    def restart(self, stack: contextlib.ExitStack) -> None:
        """Kill containerd and start it again, until ``stack`` ends; the containers go on."""
        self.service.kill()
        log = self._work / "containerd-again.log"
        self.service = stack.enter_context(_running(self._work, self.release, log))
        self.service.wait_until(lambda: self.ctr_unchecked("version").returncode == 0)

    def restart_task(self, name: str) -> Container:
        """End a container's processes by force, and start it again on the same snapshot."""
        self.ctr("tasks", "delete", "--force", name)
        log = self._work / f"{self.namespace}-{name}-again.log"
        options = ["--detach", "--fifo-dir", self.fifo_directory, "--log-uri", f"file://{log}"]
        self.ctr("tasks", "start", *options, name)
        return Container(self, name, log)

    def remove(self, name: str) -> None:
        """End a container, if it runs, and remove it, if it is there."""
        self.ctr_unchecked("tasks", "delete", "--force", name)
        self.ctr_unchecked("containers", "delete", name)


@contextlib.contextmanager
def containerd(
    work: Path,
    *,
    proxy: Path | None = None,
    cri: bool = False,
    annotations: bool = True,
    release: Release | None = None,
    remap_ids: bool = False,
    sandbox: str = "",
    differ: str = "",
    inside: Sequence[str | Path] = (),
) -> Iterator[Containerd]:
    """Run a containerd of its own for the time of the context; containers left over are ended with it.

    ``work`` is a new directory with a short path, on a file system that can be overlay's upper.
    ``proxy`` is the socket of a proxy snapshotter, which is known as ``fusesnap`` and used unless a call names
    another; without it, that is containerd's own ``overlayfs``. With ``cri`` it serves Kubernetes' calls too, and
    ``ctr`` works in their namespace; with ``annotations`` those calls pass descriptions of their own on to the
    snapshotter, for which 2.1 and later do without the transfer service. ``release`` is the host's own unless given.
    ``remap_ids``: the proxy snapshotter is said to map the ids of user namespaces. ``sandbox``: the image
    that pods run on. With ``differ``, ``fusesnap-diff`` is asked for diffs first, on the same socket, and ``differ`` is
    what the transfer service unpacks with. ``inside``: the words of a command that runs it, as in a mount namespace.
    """
    work.mkdir(parents=True, exist_ok=True)
    release = release or Release.of()
    text = configuration(work, release, proxy, cri=cri, remap_ids=remap_ids, differ=differ)
    if cri:
        snapshotter = SNAPSHOTTER if proxy else "overlayfs"
        text += cri_part(work, release, snapshotter, annotations=annotations)
    if sandbox:
        text += pods_part(work, release, sandbox)
        write_network(work / "cni")
    (work / "containerd.toml").write_text(text)
    try:
        with _running(work, release, work / "containerd.log", inside) as service:
            instance = Containerd(
                service,
                work,
                SNAPSHOTTER if proxy else "overlayfs",
                CRI_NAMESPACE if cri else "default",
                release,
            )
            service.wait_until(lambda: instance.ctr_unchecked("version").returncode == 0)
            yield instance
    finally:
        end_containers(work)


def _running(
    work: Path, release: Release, log: Path, inside: Sequence[str | Path] = ()
) -> contextlib.AbstractContextManager[Service]:
    command: list[str | Path] = [
        *inside,
        release.program("containerd"),
        "--config",
        work / "containerd.toml",
    ]
    return running(command, log=log, env=release.environment)


def end_containers(work: Path) -> None:
    """End what a containerd leaves behind on purpose when it ends: containers, their shims, mounts and cgroups."""
    sockets = shim_sockets(work)
    for state in work.glob("runc/*/*"):
        run(["runc", "--root", state.parent, "delete", "--force", state.name])
    for pid in shims(work):
        kill_group(pid)
        wait_for_process(pid)
    for mount in reversed(mounts_below(work)):
        run(["umount", "--lazy", mount])
    for socket in sockets:
        socket.unlink(missing_ok=True)
    for cgroup in (*CGROUPS.glob(cgroup_name(work)), *CGROUPS.glob(f"*/{cgroup_name(work)}")):
        remove_cgroup(cgroup)


def shim_sockets(work: Path) -> list[Path]:
    """The sockets of the shims of the containerd in ``work``, which are in a directory shared with others."""
    addresses = [file.read_text() for file in work.glob("state/*.task/*/*/address")]
    starts = work.glob("state/*.task/*/*/bootstrap.json")  # from 2.0 on
    addresses += [json.loads(file.read_text())["address"] for file in starts]
    return [Path(address.removeprefix("unix://")) for address in addresses]


def shims(work: Path) -> list[int]:
    """The process ids of the shims of the containerd in ``work``, each the leader of its group."""
    address = str(work / "containerd.sock").encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(SHIM.encode()) and address in words:
                found.append(int(process.name))
    return found


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, in the order in which they were mounted."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{directory}/")]


def cgroup_name(work: Path) -> str:
    """The name of the cgroup that holds the containers of the containerd in ``work``."""
    return str(work).strip("/").replace("/", "-")


def remove_cgroup(top: Path) -> None:
    """Remove a cgroup with those below it."""
    for directory, _, _ in os.walk(top, topdown=False):
        Path(directory).rmdir()
