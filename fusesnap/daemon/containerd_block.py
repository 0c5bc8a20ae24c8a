"""What containerd's configuration must say of us, as a block to paste.

The words are those of containerd's ``ProxyPlugin``, ``ImageConfig`` (CRI) and ``transferConfig``; tried with 1.6, 1.7
and 2.1. What a version does not know it ignores: 1.6 the exports, the capabilities and the transfer service.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NAME: Final = "fusesnap"
VERSIONS: Final = ("2", "3")
REMAP_IDS: Final = "remap-ids"
REBASE: Final = "rebase"  # never printed: see docs/architecture.md
_CRI_TABLES: Final = {
    "2": '[plugins."io.containerd.grpc.v1.cri".containerd]',
    "3": '[plugins."io.containerd.cri.v1.images"]',
}
_FOR: Final = {"2": "containerd 1.6 and 1.7", "3": "containerd 2.0 and later"}
# The walking differ unpacks; where there are several, containerd would choose any.
_DIFFER: Final = "walking"


@dataclass(frozen=True, slots=True)
class Snapshotter:
    """Us, as containerd has to know us: the socket, and the directory whose file system fills up.

    ``remap_ids``: whether our mounts can be ID-mapped for containers with user namespaces.
    """

    address: Path
    root: Path
    remap_ids: bool = False


def block(version: str, snapshotter: Snapshotter) -> str:
    """The text for a configuration of ``version``, one of ``VERSIONS``. It is a whole configuration file."""
    return "\n".join(
        [
            f"# fusesnap for {_FOR[version]}, in /etc/containerd/config.toml. A table that is there already is",
            "# not to be written twice: put the keys into it. containerd has to be restarted then, and",
            "# `fusesnap doctor` says whether all is well.",
            f"version = {version}",
            "",
            *_proxy(snapshotter),
            "",
            "# Kubernetes: images are unpacked by fusesnap, and it is told what their layers are. For pods whose image",
            "# is a store path (nix:0/nix/store/...) the kubelet, not containerd, has to know fusesnap too:",
            f"#   --image-service-endpoint={_quoted(f'unix://{snapshotter.address}')}",
            _CRI_TABLES[version],
            f"  snapshotter = {_quoted(NAME)}",
            "  disable_snapshot_annotations = false",
            "",
            "# Where the transfer service may unpack (`ctr images pull` of 2.0 and later). With this, overlayfs is",
            "# allowed only if it is named too.",
            *_unpack("overlayfs"),
            *_unpack(NAME),
            "",
        ]
    )


def _proxy(snapshotter: Snapshotter) -> list[str]:
    lines = [
        f"[proxy_plugins.{NAME}]",
        '  type = "snapshot"',
        f"  address = {_quoted(str(snapshotter.address))}",
    ]
    if snapshotter.remap_ids:
        lines.append(f"  capabilities = [{_quoted(REMAP_IDS)}]")
    return [
        *lines,
        "  # The file system that kubelet watches for images.",
        f"  [proxy_plugins.{NAME}.exports]",
        f"    root = {_quoted(str(snapshotter.root))}",
    ]


def _unpack(name: str) -> list[str]:
    return [
        '[[plugins."io.containerd.transfer.v1.local".unpack_config]]',
        '  platform = "linux"',
        f"  snapshotter = {_quoted(name)}",
        f"  differ = {_quoted(_DIFFER)}",
    ]


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are JSON's but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
