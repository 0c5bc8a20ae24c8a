"""What is said of a kubelet's image endpoint; that a real one is well is in tests/e2e."""

from __future__ import annotations

from pathlib import Path

from fusesnap.config import load
from fusesnap.daemon.doctor.findings import Level
from fusesnap.daemon.doctor.image_endpoint import examine_image_endpoint
from fusesnap.errors import Unavailable

CONTAINERD = Path("/run/k3s/containerd/containerd.sock")


def refuse(address: Path) -> tuple[str, ...]:
    raise Unavailable(f"{address}: nobody is there")


def test_a_containerd_elsewhere_is_to_be_named(tmp_path: Path) -> None:
    settings = load(None, {"root": str(tmp_path)})
    found = examine_image_endpoint(settings, CONTAINERD, refuse)
    assert found.level is Level.WARNING
    assert "nobody is there" in found.said
    assert f'containerd-address = "{CONTAINERD}"' in found.mend


def test_a_daemon_that_does_not_answer_is_to_be_started(tmp_path: Path) -> None:
    given = {"root": str(tmp_path), "containerd-address": str(CONTAINERD)}
    found = examine_image_endpoint(load(None, given), CONTAINERD)
    assert found.level is Level.WARNING
    assert f"{tmp_path}/fusesnap.sock" in found.said
    assert found.mend.startswith("fusesnap daemon")


def test_one_that_answers_is_well(tmp_path: Path) -> None:
    settings = load(None, {"root": str(tmp_path)})
    found = examine_image_endpoint(settings, CONTAINERD, lambda address: (str(address),))
    assert found.level is Level.OK
    assert f"unix://{tmp_path}/fusesnap.sock" in found.said
