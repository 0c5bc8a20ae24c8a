"""Which process serves a socket."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fusesnap.daemon.doctor.peer import Peer, peer

LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
input()
"""


@pytest.mark.parametrize("name", ["containerd", "postgres"])
def test_only_a_containerd_is_named(tmp_path: Path, name: str) -> None:
    address = tmp_path / "socket"
    words = [name, "-c", LISTEN, str(address), "--config", "/etc/own.toml"]
    # Python looks for its modules beside what it is called by.
    home = {"PYTHONHOME": sys.base_prefix}
    with subprocess.Popen(
        words, executable=sys.executable, env=home, stdin=-1, stdout=-1
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = peer(address)
        process.communicate(b"\n")
    if name == "containerd":
        assert found == Peer(tuple(words), Path(f"/proc/{process.pid}/exe"))
    else:
        assert found is None


def test_nobody(tmp_path: Path) -> None:
    assert peer(tmp_path / "none") is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dead"))
    assert peer(tmp_path / "dead") is None


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["containerd"], None),
        (["containerd", "--config", "/a"], "/a"),
        (["containerd", "-c", "/a", "--log-level", "debug"], "/a"),
        (["containerd", "--config=/a"], "/a"),
        (["containerd", "--config"], None),
    ],
)
def test_the_configuration_that_it_was_given(words: list[str], file: str | None) -> None:
    found = Peer(tuple(words), Path("/proc/1/exe")).configuration
    assert found == (None if file is None else Path(file))
