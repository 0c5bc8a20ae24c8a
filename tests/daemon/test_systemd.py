"""The unit that we ship, under a real systemd, while a reader goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.fusesnap_daemon import PROGRAM
from testbed.systemd import Systemd, systemd
from testbed.workplace import run_directory

from .reader import reading, wait_until

REPOSITORY = Path(__file__).parents[2]
UNIT = REPOSITORY / "docs" / "examples" / "systemd" / "fusesnap.service"
STATE = Path("/var/lib/fusesnap")  # the unit's StateDirectory


@pytest.fixture(params=["never", "always"], ids=["direct", "relay"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    """A systemd with the unit as it is in docs/, a configuration, and the program where the unit expects it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    with run_directory("fs-") as work, systemd(work) as booted:
        booted.link(Path("/usr/local/bin/fusesnap"), PROGRAM)
        booted.put(
            Path("/etc/fusesnap.toml"),
            f'substituters = ["file://{cache}"]\nrelay = "{request.param}"\n',
        )
        booted.put(Path("/etc/systemd/system/fusesnap.service"), UNIT.read_text())
        yield booted


def main_pid(node: Systemd) -> str:
    return node.properties("fusesnap", "MainPID")["MainPID"]


def is_active(node: Systemd) -> bool:
    return node.properties("fusesnap", "ActiveState")["ActiveState"] == "active"


def test_a_reader_notices_no_reload_no_restart_and_no_death(node: Systemd, tmp_path: Path) -> None:
    node.systemctl("start", "fusesnap")
    first = main_pid(node)
    said = tmp_path / "said"
    with reading(STATE / "lazy", said, inside=node.inside(), log=said) as reader:
        reader.goes_on()
        node.systemctl("reload", "fusesnap")
        reader.goes_on()
        assert main_pid(node) == first
        node.systemctl("restart", "fusesnap")
        reader.goes_on()
        second = main_pid(node)
        assert second != first
        node.systemctl("kill", "--kill-who=main", "--signal=KILL", "fusesnap")
        wait_until(lambda: main_pid(node) not in (second, "0") and is_active(node))
        reader.goes_on()
        assert node.properties("fusesnap", "NRestarts") == {"NRestarts": "1"}
        node.systemctl("stop", "fusesnap")
        reader.is_told_of_the_end()
    assert node.properties("fusesnap", "Result") == {"Result": "success"}
