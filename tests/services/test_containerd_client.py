"""Asking a containerd; that a real one answers is in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusesnap.errors import Unavailable
from fusesnap.services.containerd_client import (
    SNAPSHOTTER,
    Plugin,
    ask_plugins,
    ask_version,
    find_snapshotter,
    snapshotters_at,
)


def test_nobody_answers(tmp_path: Path) -> None:
    for ask in (ask_version, ask_plugins, lambda address: find_snapshotter(address, address, "x")):
        with pytest.raises(Unavailable, match=str(tmp_path / "none.sock")):
            ask(tmp_path / "none.sock")
    with pytest.raises(Unavailable, match="See containerd-address"):
        find_snapshotter(tmp_path / "none.sock", tmp_path, "x")


def plugin(name: str, **exports: str) -> Plugin:
    return Plugin(SNAPSHOTTER, name, exports, (), "")


def test_what_a_snapshotter_is_called(tmp_path: Path) -> None:
    socket = tmp_path / "fusesnap.sock"
    (tmp_path / "link").symlink_to(tmp_path)
    others = [plugin("overlayfs", root="/var/lib"), plugin("stargz", address="/run/stargz.sock")]
    new = plugin("lazy", address=f"unix://{tmp_path}/link/fusesnap.sock")
    assert snapshotters_at([*others, new], socket, "fusesnap") == {"lazy"}
    assert snapshotters_at([*others, plugin("fusesnap")], socket, "fusesnap") == {"fusesnap"}
    elsewhere = plugin("fusesnap", address="/run/other.sock")
    assert snapshotters_at([*others, elsewhere], socket, "fusesnap") == set()
    differ = Plugin("io.containerd.differ.v1", "fusesnap-diff", {"address": str(socket)}, (), "")
    assert snapshotters_at([differ], socket, "fusesnap") == set()
