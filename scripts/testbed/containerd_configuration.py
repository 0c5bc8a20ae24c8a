"""Releases of containerd, and what the configuration of a private one says."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from testbed.processes import run

SNAPSHOTTER = "fusesnap"
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
  disable_snapshot_annotations = {no_annotations}
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{work}/cni"
  conf_dir = "{work}/cni"
"""
CRI_OF_VERSION_3 = """\
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{name}"
  disable_snapshot_annotations = {no_annotations}
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
PODS_OF_VERSION_2 = """\
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
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


def configuration(
    work: Path, release: Release, proxy: Path | None, *, cri: bool, remap_ids: bool, differ: str
) -> str:
    """What containerd.toml says; from 2.0 on it has version 3."""
    disabled = [plugin for plugin in DISABLED if not (cri and plugin in CRI_PLUGINS)]
    text = CONFIGURATION.format(
        version=3 if release.major >= 2 else 2,
        work=work,
        disabled=", ".join(f'"{plugin}"' for plugin in disabled),
    )
    if proxy:
        text += PROXY.format(name=SNAPSHOTTER, address=proxy) + REMAP_IDS * remap_ids
        for name in (SNAPSHOTTER, "overlayfs"):
            text += UNPACK.format(name=name, differ=differ or "walking")
        if differ:
            text += DIFF.format(name=DIFFER, address=proxy)
    return text


def cri_part(work: Path, release: Release, snapshotter: str, *, annotations: bool) -> str:
    """The part for CRI, whose plugins have other names in version 3."""
    part = CRI_OF_VERSION_3 if release.major >= 2 else CRI
    return part.format(name=snapshotter, work=work, no_annotations=str(not annotations).lower())


def pods_part(work: Path, release: Release, sandbox: str) -> str:
    """The part for pods that run on the image ``sandbox``."""
    part = PODS if release.major >= 2 else PODS_OF_VERSION_2
    return part.format(image=sandbox, work=work)


def write_network(directory: Path) -> None:
    """What pods need of a network, in a new directory."""
    directory.mkdir()
    for name, text in NETWORK.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
