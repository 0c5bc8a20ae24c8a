"""A node as a kubelet sees it: fusesnap is its endpoint for images, containerd the one for pods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
from testbed.containerd import Containerd, cgroup_name, containerd
from testbed.debian import containerd_release
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.gate import Gate, gate
from testbed.images import Layer, write_image
from testbed.processes import CommandFailed

from .cri import Kubelet, Pod

# A reference that containerd leaves as it is.
PAUSE: Final = "localhost/pause:1"
CONFIGURATION: Final = """\
containerd-address = "{address}"
spare-worker = false
[fetch]
unpackers = 1
"""


@dataclass(frozen=True, slots=True)
class KubeletNode:
    """``gate`` is between fusesnap and containerd; ``idle`` is what was held when it started."""

    kubelet: Kubelet
    gate: Gate
    daemon: FusesnapDaemon
    containerd: Containerd
    work: Path
    stack: contextlib.ExitStack
    idle: dict[str, set[str]] = field(default_factory=dict)

    def pod(self) -> Pod:
        """A new pod, whose container's output is in :meth:`logs`."""
        logs = self.work / f"pod-{len(list(self.work.glob('pod-*')))}"
        logs.mkdir()
        return Pod(logs.name, f"/{cgroup_name(self.work / 'c')}", logs=logs)

    @staticmethod
    def logs(pod: Pod) -> list[str]:
        """What the container of a pod has written, without times."""
        assert pod.logs is not None
        lines = (pod.logs / "one.log").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines]

    def knows(self, reference: str, id_: str) -> bool:
        """Whether an image is known; not while containerd starts."""
        try:
            image = self.kubelet.image(reference)
        except grpc.RpcError:
            return False
        return image is not None and image.id == id_

    def serves(self, killed: int) -> bool:
        """Whether other services serve than those that were ``killed``, containerd too."""
        try:
            self.held()
            return int(self.daemon.status()["services"]["pid"]) != killed
        except CommandFailed:
            return False

    def restart_containerd(self) -> None:
        """Kill containerd, and start it again."""
        self.containerd.restart(self.stack)

    def collect(self) -> None:
        """Have containerd collect what nothing refers to."""
        self.containerd.ctr("leases", "create", "--id", "collect")
        self.containerd.ctr("leases", "delete", "--sync", "collect")

    def held(self) -> dict[str, set[str]]:
        """All that images leave in containerd, and the closures that we keep for them."""
        ctr = self.containerd.ctr
        roots = self.daemon.state / "nix/gcroots/fusesnap"
        return {
            "images": self.containerd.images(),
            "content": set(ctr("content", "ls", "--quiet").split()),
            "uploads": _first_words(ctr("content", "active")),
            "snapshots": _first_words(
                ctr("snapshots", "--snapshotter", self.containerd.snapshotter, "ls")
            ),
            "leases": set(ctr("leases", "ls", "--quiet").split()),
            "roots": {path.name for path in roots.iterdir()} if roots.exists() else set(),
        }

    def left(self) -> dict[str, set[str]]:
        """What is held that was not when the node started."""
        now = self.held()
        return {kind: new for kind in now if (new := now[kind] - self.idle[kind])}

    def wait_until_nothing_is_left(self) -> None:
        """Wait until nothing is held that was not when the node started."""
        try:
            self.daemon.service.wait_until(lambda: not self.left())
        except CommandFailed as error:
            raise AssertionError(f"left over: {self.left()}") from error


@contextlib.contextmanager
def kubelet_node(
    work: Path, version: str, source: Source, pause: Layer, program: str
) -> Iterator[KubeletNode]:
    """Run a node with containerd of a ``version``, whose pods run on a layer with ``program``, a busybox."""
    (work / "fusesnap.toml").write_text(CONFIGURATION.format(address=work / "gate.sock"))
    options = ["--config", str(work / "fusesnap.toml")]
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(fusesnap_daemon(work / "s", source=source, options=options))
        client = stack.enter_context(
            containerd(
                work / "c",
                proxy=daemon.address,
                cri=True,
                # With them 2.1 and later leave the transfer service out.
                annotations=version.startswith("1."),
                release=containerd_release(version),
                sandbox=PAUSE,
            )
        )
        between = stack.enter_context(gate(work / "gate.sock", client.address))
        channels = [
            stack.enter_context(grpc.insecure_channel(f"unix:{address}"))
            for address in (daemon.address, client.address)
        ]
        node = KubeletNode(Kubelet(*channels), between, daemon, client, work, stack)
        command = [program, "sleep", "1000"]
        client.import_archive(write_image(work / "pause.tar", [pause], name=PAUSE, command=command))
        daemon.service.wait_until(lambda: node.kubelet.image(PAUSE) is not None)
        node.collect()  # what the import has left
        node.idle.update(node.held())
        yield node


def _first_words(table: str) -> set[str]:
    """The first column of what ctr prints with a heading."""
    return {line.split()[0] for line in table.splitlines()[1:] if line.strip()}
