"""A private containerd: its own root, state and socket, beside any that the host runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.processes import (
    CommandFailed,
    Service,
    kill_group,
    run,
    run_unchecked,
    running,
    wait_for_process,
)

SNAPSHOTTER = "fusesnap"
SHIM = "containerd-shim-runc-v2"
CGROUPS = Path("/sys/fs/cgroup")
CONFIGURATION = """\
version = {version}
root = "{work}/root"
state = "{work}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{work}/containerd.sock"
[ttrpc]
  address = "{work}/containerd.sock.ttrpc"
"""
PROXY = """\
[proxy_plugins.{name}]
  type = "snapshot"
  address = "{address}"
"""
# From 2.0 on: containerd does not give every file of an image another owner for a user namespace.
REMAP_IDS = """\
  capabilities = ["remap-ids"]
"""
# Where the transfer service may unpack. It knows overlayfs only as long as nothing is said.
UNPACK = """\
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "{name}"
  differ = "{differ}"
"""
# The snapshotter's daemon compares, too. containerd asks differs in this order; 1.6 knows no proxies of this type.
DIFF = """\
[proxy_plugins.{name}]
  type = "diff"
  address = "{address}"
[plugins."io.containerd.service.v1.diff-service"]
  default = ["{name}", "walking"]
"""
DIFFER = "fusesnap-diff"
# As Kubernetes' configuration has it, with everything below our own directory.
CRI = """\
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{name}"
  disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{work}/cni"
  conf_dir = "{work}/cni"
"""
CRI_OF_VERSION_3 = """\
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{name}"
  disable_snapshot_annotations = false
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{work}/cni"]
  conf_dir = "{work}/cni"
"""
# For pods. Their network namespaces and runc's state would be in directories shared with others, and to be spared when
# memory runs out is not for everybody to ask.
PODS = """\
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{image}"
[plugins."io.containerd.cri.v1.runtime"]
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  Root = "{work}/runc"
"""
# Says that a pod has a network, which none of ours needs: nothing but this file's answer is there.
NETWORK = {
    "pods.conflist": '{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "none"}]}',
    "none": """\
#!/bin/sh
echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "'"$CNI_NETNS"'"}],
"ips": [{"interface": 0, "address": "192.0.2.1/32"}]}'
""",
    "loopback": """\
#!/bin/sh
echo '{"cniVersion": "1.0.0"}'
""",
}
CRI_PLUGINS = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
)
CRI_NAMESPACE = "k8s.io"
# CRI is for those who ask; opt and nri make directories outside of ours; the snapshotters need devices.
DISABLED = (
    *CRI_PLUGINS,
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
)


@dataclass(frozen=True, slots=True)
class Release:
    """A containerd with its programs: those in ``programs``, beside what is on PATH; ``text`` is its version."""

    text: str
    programs: tuple[Path, ...] = ()

    @classmethod
    def of(cls, *programs: Path) -> Release:
        """What is in these directories, searched before those of PATH."""
        said = run([cls("", programs).program("containerd"), "--version"])
        return cls(said.split()[2], programs)

    @property
    def environment(self) -> dict[str, str]:
        """By which containerd finds this release's other programs."""
        return {"PATH": os.pathsep.join([*map(str, self.programs), os.environ["PATH"]])}

    def program(self, name: str) -> str:
        """The path of a program of this release."""
        return shutil.which(name, path=self.environment["PATH"]) or name

    @property
    def major(self) -> int:
        return int(self.text.split(".")[0])


class Container:
    """A container that runs in the background. Times are in seconds."""

    def __init__(self, containerd: Containerd, name: str, log: Path) -> None:
        self._containerd = containerd
        self._executions = itertools.count(1)
        self._log = log
        self.name = name

    def execute(self, *argv: str, timeout: float = 60) -> str:
        """Run a program in the container and return its standard output. Raises CommandFailed."""
        return self._containerd.ctr(*self._execution(argv), timeout=timeout)

    def execute_unchecked(
        self, *argv: str, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the container, whatever its status."""
        return self._containerd.ctr_unchecked(*self._execution(argv), timeout=timeout)

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
        identity = f"{self.name}-{next(self._executions)}"
        options = ["--exec-id", identity, "--fifo-dir", self._containerd.fifo_directory]
        return ["tasks", "exec", *options, self.name, *argv]


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
        return Containerd(self.service, self._work, self.snapshotter, namespace)

    def command(self, *arguments: str | Path) -> list[str]:
        """The words of a ``ctr`` command on this containerd."""
        own = ["--address", str(self.address), "--namespace", self.namespace]
        return [self.release.program("ctr"), *own, *(str(each) for each in arguments)]

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
        (imported,) = self.images() - known
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
        cgroup = f"/{cgroup_name(self._work)}/{self._namespace}-{name}"
        own += ["--runc-root", str(self._work / "runc"), "--cgroup", cgroup]
        return self.command("run", *own, *options, reference, name, *argv)

    def run(
        self, reference: str, name: str, *argv: str, snapshotter: str = "", timeout: float = 60
    ) -> str:
        """Run a container to its end and remove it; returns its standard output. Raises CommandFailed."""
        command = self.run_command(reference, name, *argv, snapshotter=snapshotter)
        return run(command, timeout=timeout)

    def run_unchecked(
        self, reference: str, name: str, *argv: str, snapshotter: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """The same, whatever the container's status."""
        command = self.run_command(reference, name, *argv, snapshotter=snapshotter)
        return run_unchecked(command, timeout=timeout)

    @contextlib.contextmanager
    def started(
        self, reference: str, name: str, *argv: str, snapshotter: str = "", timeout: float = 60
    ) -> Iterator[Container]:
        """Keep a container running for the time of the context; its snapshot is removed with it."""
        log = self._work / f"{self._namespace}-{name}.log"
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
        log = self._work / f"{self._namespace}-{name}-again.log"
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
    release: Release | None = None,
    remap_ids: bool = False,
    sandbox: str = "",
    differ: str = "",
) -> Iterator[Containerd]:
    """Run a containerd of its own for the time of the context; containers left over are ended with it.

    ``work`` is a new directory with a short path, on a file system that can be overlay's upper.
    ``proxy`` is the socket of a proxy snapshotter, which is known as ``fusesnap`` and used unless a call names
    another; without it, that is containerd's own ``overlayfs``. With ``cri`` it serves Kubernetes' calls too, and
    ``ctr`` works in their namespace. ``release`` is the host's own unless given. ``remap_ids``: the
    proxy snapshotter is said to map the ids of user namespaces. ``sandbox`` (from 2.0 on): the image that pods run on.
    With ``differ``, ``fusesnap-diff`` is asked for diffs first, on the same socket, and ``differ`` is what the transfer
    service unpacks with.
    """
    work.mkdir(parents=True, exist_ok=True)
    release = release or Release.of()
    (work / "containerd.toml").write_text(
        _configuration(work, release, proxy, cri=cri, remap_ids=remap_ids, differ=differ)
        + (PODS.format(image=sandbox, work=work) if sandbox else "")
    )
    if sandbox:
        _write_network(work / "cni")
    try:
        with _running(work, release, work / "containerd.log") as service:
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


def _running(work: Path, release: Release, log: Path) -> contextlib.AbstractContextManager[Service]:
    command: list[str | Path] = [
        release.program("containerd"),
        "--config",
        work / "containerd.toml",
    ]
    return running(command, log=log, env=release.environment)


def _configuration(
    work: Path, release: Release, proxy: Path | None, *, cri: bool, remap_ids: bool, differ: str
) -> str:
    """What containerd.toml says. From 2.0 on it has version 3, in which CRI's plugins have other names."""
    newer = release.major >= 2
    disabled = [plugin for plugin in DISABLED if not (cri and plugin in CRI_PLUGINS)]
    text = CONFIGURATION.format(
        version=3 if newer else 2,
        work=work,
        disabled=", ".join(f'"{plugin}"' for plugin in disabled),
    )
    if proxy:
        text += PROXY.format(name=SNAPSHOTTER, address=proxy) + REMAP_IDS * remap_ids
        for name in (SNAPSHOTTER, "overlayfs"):
            text += UNPACK.format(name=name, differ=differ or "walking")
        if differ:
            text += DIFF.format(name=DIFFER, address=proxy)
    if cri:
        text += (CRI_OF_VERSION_3 if newer else CRI).format(name=SNAPSHOTTER, work=work)
    return text


def _write_network(directory: Path) -> None:
    directory.mkdir()
    for name, text in NETWORK.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)


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
