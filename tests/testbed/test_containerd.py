"""The private containerd, with its own overlay snapshotter: what it runs, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.containerd import containerd, shim_sockets, shims
from testbed.containerd_configuration import Release
from testbed.debian import CONTAINERDS, containerd_release
from testbed.images import ordinary_layer, store_paths_layer, write_image
from testbed.nix_store import NixStore
from testbed.processes import CommandFailed, run
from testbed.registry import registry
from testbed.synthetic import SimpleClosure, simple_closure
from testbed.workplace import default_work, leftovers, run_directory


@pytest.fixture(scope="module")
def store() -> NixStore:
    return NixStore(default_work() / "store")


@pytest.fixture(scope="module")
def simple(store: NixStore) -> SimpleClosure:
    return simple_closure(store)


@pytest.fixture
def directory() -> Iterator[Path]:
    with run_directory() as directory:
        yield directory


@pytest.fixture(params=CONTAINERDS)
def release(request: pytest.FixtureRequest) -> Release:
    return containerd_release(request.param)


def archive(store: NixStore, simple: SimpleClosure, directory: Path) -> Path:
    """An image that carries busybox's store path."""
    layers = [store_paths_layer(store, [simple.busybox]), ordinary_layer({"etc/name": b"it\n"})]
    environment = {"PATH": f"{simple.busybox}/bin"}
    return write_image(
        directory / "image.tar",
        layers,
        name="busybox:latest",
        command=["cat", "/etc/name"],
        environment=environment,
    )


def test_images_are_pulled_imported_and_run(
    store: NixStore, simple: SimpleClosure, directory: Path, release: Release
) -> None:
    image = archive(store, simple, directory)
    with registry(directory) as images, containerd(directory / "c", release=release) as runtime:
        pulled = images.push(image, "busybox:latest")
        runtime.pull(pulled)
        assert runtime.run(pulled, "pulled") == "it\n"
        assert runtime.import_archive(image) == "busybox:latest"
        assert runtime.run("busybox:latest", "imported", "echo", "said") == "said\n"
        assert runtime.run_unchecked(pulled, "failing", "sh", "-c", "exit 3").returncode == 3


def test_a_started_container_can_be_looked_into(
    store: NixStore, simple: SimpleClosure, directory: Path, release: Release
) -> None:
    with containerd(directory / "c", release=release) as runtime:
        image = runtime.import_archive(archive(store, simple, directory))
        with runtime.started(image, "server", "sleep", "1000") as server:
            assert server.execute("cat", "/etc/name") == "it\n"
            assert server.execute_unchecked("sh", "-c", "exit 4").returncode == 4
            assert (server.root() / "etc/name").read_text() == "it\n"
            assert " / / " in server.mounts()
        with pytest.raises(CommandFailed, match="has no task"):
            _ = server.pid


def test_a_container_left_running_is_ended_with_containerd(
    store: NixStore, simple: SimpleClosure, release: Release
) -> None:
    with run_directory() as directory:
        work = directory / "c"
        with containerd(work, release=release) as runtime:
            image = runtime.import_archive(archive(store, simple, directory))
            run(runtime.run_command(image, "left", "sleep", "1000", options=["--detach"]))
            assert shims(work)
            (socket,) = shim_sockets(work)
            assert socket.exists()
    assert leftovers(directory) == []
    assert not socket.exists()
