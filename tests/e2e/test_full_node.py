"""A node whose state directory lies on a full ext4, with real containers on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testbed.binary_cache import HttpCache
from testbed.containerd import Container
from testbed.images import Layer
from testbed.nix_store import CONFIGURATION
from testbed.processes import run, run_unchecked
from testbed.synthetic import SimpleClosure

from fusesnap.nix.store_path import StoreDir
from fusesnap.store.layout import StateLayout

from .conftest import NodeMaker

NixLayers = Callable[..., Layer]

MIB = 1 << 20
# Its first process stays, so that others can be run beside it.
STAYS = ("/bin/sh", "-c", "sleep 1000")
SIZE = 5_000_000  # of the file of the path `large`


@pytest.fixture
def disk(work: Path) -> Iterator[Path]:
    """The node's state directory, an ext4 of 64 MiB of its own."""
    image, state = work / "disk.img", work / "s"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run(["mkfs.ext4", "-q", "-b", "4096", "-m", "0", image])
    state.mkdir()
    run(["mount", "-o", "loop", image, state])
    try:
        yield state
    finally:
        run(["umount", "--lazy", state])


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Take every block of the disk, and its ballast too, for the time of the context."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    (disk / "ballast").unlink(missing_ok=True)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def verify(disk: Path) -> None:
    """Real Nix has nothing to say of the store."""
    url = StateLayout(disk).nix_url(StoreDir())
    command = ["nix-store", "--store", url, "--verify", "--check-contents"]
    done = run_unchecked(command, env=CONFIGURATION)
    said = [line for line in done.stderr.splitlines() if "error" in line or "differ" in line]
    assert (done.returncode, said) == (0, [])


def read(container: Container, simple: SimpleClosure) -> str:
    """Read the large file; what was said of it."""
    done = container.execute_unchecked("/bin/sh", "-c", f"cat {simple.large}/data | wc -c")
    return done.stdout + done.stderr


def test_on_a_full_disk_who_needs_room_is_told_and_all_else_goes_on(
    disk: Path,
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    base_layer: Layer,
    nix_layers: NixLayers,
) -> None:
    node = make_node(cache.url)
    reference = node.pull([base_layer, nix_layers()])
    log = node.daemon.service.log_text
    with node.containerd.started(reference, "one", *STAYS) as container:
        container.execute("/bin/true")  # busybox is here
        worker = node.daemon.status()["worker"]["pid"]
        with full(disk):
            assert os.statvfs(disk).f_bavail < 8
            said = read(container, simple)
            assert "No space left on device" in said or "I/O error" in said, said
            assert container.execute("/bin/echo", "on").strip() == "on"
            # What is written of the start beside it cannot be kept either, and that is all that is lost.
            node.daemon.service.wait_until(
                lambda: "start reports and metrics will lack something" in log()
            )
            node.daemon.service.wait_until(lambda: "startup traces: " in log())
            assert node.containerd.run_unchecked(reference, "two", "/bin/true").returncode != 0
            assert container.execute("/bin/echo", "on").strip() == "on"
        assert read(container, simple).strip() == str(SIZE)
        assert node.containerd.run(reference, "three", "/bin/echo", "back").strip() == "back"
        assert node.daemon.status()["worker"]["pid"] == worker
    verify(disk)
