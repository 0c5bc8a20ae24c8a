"""A containerd that is installed and does not run; those that run are in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusesnap.config import load
from fusesnap.daemon.doctor.containerd import Where, examine_containerd
from fusesnap.daemon.doctor.containerd_config import major
from fusesnap.daemon.doctor.findings import Finding, Level


def found(where: Where) -> list[Finding]:
    return examine_containerd(load(None, {}), where, None)


def test_one_that_does_not_run_is_said_and_its_file_is_read(tmp_path: Path) -> None:
    file, address = tmp_path / "config.toml", tmp_path / "none.sock"
    file.write_text(
        f'version = 2\n[grpc]\naddress = "{address}"\n'
        "[proxy_plugins.nix]\n"
        'type = "snapshot"\naddress = "unix:///var/lib/fusesnap/fusesnap.sock"\n'
    )
    findings = found(Where(config=file))
    failures = [each for each in findings if each.level is Level.FAILURE]
    assert [(each.subject, each.status) for each in failures] == [("containerd", 69)]
    assert str(address) in failures[0].said
    assert "systemctl start containerd" in failures[0].mend
    assert "nix at /var/lib/fusesnap/fusesnap.sock" in {each.said for each in findings}


def test_without_a_file_it_has_its_defaults(tmp_path: Path) -> None:
    where = Where(tmp_path / "none.sock", tmp_path / "none.toml")
    subjects = {each.subject: each for each in found(where)}
    assert "defaults" in subjects["configuration"].said
    assert "--print-containerd-config" in subjects["proxy plugin"].mend


def test_one_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = found(Where(tmp_path / "none.sock", tmp_path / "none.toml"))
    assert (finding.level, "install" in finding.mend) == (Level.FAILURE, True)


@pytest.mark.parametrize(
    ("version", "number"), [("1.6.20~ds1", 1), ("v2.1.9+unknown", 2), ("unknown", 0)]
)
def test_the_first_number_of_a_version(version: str, number: int) -> None:
    assert major(version) == number
