"""The block for containerd's configuration, as TOML; that containerd takes it is in tests/e2e."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fusesnap.daemon.containerd_block import VERSIONS, Snapshotter, block


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_a_whole_file(version: str) -> None:
    odd = Path('/srv/a "b" \\ é\x7f')
    found = tomllib.loads(block(version, Snapshotter(odd / "socket", odd, remap_ids=True)))
    assert found["version"] == int(version)
    assert found["proxy_plugins"]["fusesnap"] == {
        "type": "snapshot",
        "address": str(odd / "socket"),
        "capabilities": ["remap-ids"],
        "exports": {"root": str(odd)},
    }
    unpack = found["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
    assert [each["snapshotter"] for each in unpack] == ["overlayfs", "fusesnap"]


def test_the_kubelets_part_is_said() -> None:
    said = block("3", Snapshotter(Path("/s/fusesnap.sock"), Path("/r")))
    assert '--image-service-endpoint="unix:///s/fusesnap.sock"' in said


def test_ids_are_mapped_only_where_it_is_said() -> None:
    found = tomllib.loads(block("3", Snapshotter(Path("/s"), Path("/r"))))
    assert "capabilities" not in found["proxy_plugins"]["fusesnap"]
