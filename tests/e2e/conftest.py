"""Real parts for end-to-end tests: Nix's closure, nginx's cache, a registry, containerd, and our daemon."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed.binary_cache import (
    CacheFiles,
    HttpCache,
    SigningKey,
    http_cache,
    signing_key,
    write_cache,
)
from testbed.containerd import Containerd, containerd
from testbed.containerd_configuration import Release
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.images import Layer, NixLayerManner, nix_layer, ordinary_layer, write_image
from testbed.nix_store import NixStore, store_paths_list
from testbed.registry import Registry, registry
from testbed.synthetic import SimpleClosure, simple_closure
from testbed.workplace import default_work, run_directory

SHELL = ("/bin/sh", "-c")


@pytest.fixture(scope="session")
def nix_store() -> NixStore:
    return NixStore(default_work() / "store")


@pytest.fixture(scope="session")
def simple(nix_store: NixStore) -> SimpleClosure:
    return simple_closure(nix_store)


@pytest.fixture(scope="session")
def list_path(nix_store: NixStore, simple: SimpleClosure) -> str:
    """The store path that holds the file ``store-paths`` of the closure."""
    return store_paths_list(nix_store, simple.closure)


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return signing_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def cache_files(
    tmp_path_factory: pytest.TempPathFactory,
    nix_store: NixStore,
    simple: SimpleClosure,
    list_path: str,
    key: SigningKey,
) -> CacheFiles:
    directory = tmp_path_factory.mktemp("cache")
    return write_cache(nix_store, [simple.root, list_path], directory, compression="zstd", key=key)


@pytest.fixture
def own_cache_files(cache_files: CacheFiles, tmp_path: Path) -> CacheFiles:
    """A copy of the cache that a test may damage."""
    return CacheFiles(Path(shutil.copytree(cache_files.directory, tmp_path / "own-cache")))


@pytest.fixture
def cache(cache_files: CacheFiles, tmp_path: Path) -> Iterator[HttpCache]:
    with http_cache(cache_files, tmp_path / "nginx") as running:
        yield running


@pytest.fixture(scope="session")
def image_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@dataclass
class Node:
    """A node: containerd with our daemon as its snapshotter, and what makes images for it."""

    containerd: Containerd
    daemon: FusesnapDaemon
    registry: Registry
    work: Path
    images: int = 0

    def push(
        self, layers: Sequence[Layer], command: Sequence[str] = (), environment: str = ""
    ) -> str:
        """Push an image to the registry; returns the reference to pull."""
        self.images += 1
        name = f"test:{self.work.name}-{self.images}"
        archive = write_image(
            self.work / f"image-{self.images}.tar",
            layers,
            name=name,
            command=command,
            environment={"PATH": environment or "/bin"},
        )
        return self.registry.push(archive, name)

    def pull(self, layers: Sequence[Layer], command: Sequence[str] = ()) -> str:
        """Push an image and pull it; returns its reference."""
        reference = self.push(layers, command)
        self.containerd.pull(reference)
        return reference


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with a short path: unix sockets have 108 bytes."""
    with run_directory("fs-") as directory:
        yield directory


NodeMaker = Callable[..., Node]


@pytest.fixture
def make_node(work: Path, image_registry: Registry, key: SigningKey) -> Iterator[NodeMaker]:
    """Start a node with the given caches; with a spare worker only where one is to die."""
    with contextlib.ExitStack() as stack:

        def make(
            *caches: str,
            keys: Sequence[str] = (),
            options: Sequence[str] = (),
            cri: bool = False,
            release: Release | None = None,
            remap_ids: bool = False,
            sandbox: str = "",
            differ: str = "",
            spare: bool = False,
        ) -> Node:
            settings = work / "node.toml"
            settings.write_text(
                f"spare-worker = {json.dumps(spare)}\n"
                + (f'containerd-address = "{work}/c/containerd.sock"\n' if differ else "")
            )
            daemon = stack.enter_context(
                fusesnap_daemon(
                    work / "s",
                    source=Source(caches, keys or [key.public]),
                    options=["--config", str(settings), *options],
                )
            )
            client = stack.enter_context(
                containerd(
                    work / "c",
                    proxy=daemon.address,
                    cri=cri,
                    release=release,
                    remap_ids=remap_ids,
                    sandbox=sandbox,
                    differ=differ,
                )
            )
            return Node(client, daemon, image_registry, work)

        yield make


@pytest.fixture
def node(make_node: NodeMaker, cache: HttpCache) -> Node:
    """A node with the session's cache."""
    return make_node(cache.url)


@pytest.fixture(scope="session")
def nix_layers(nix_store: NixStore, simple: SimpleClosure, list_path: str) -> Callable[..., Layer]:
    """Make the closure's Nix layer in one of the three manners."""

    def make(manner: NixLayerManner = NixLayerManner.PLACEHOLDERS) -> Layer:
        return nix_layer(nix_store, simple.closure, manner, list_path=list_path, copy_to_root=True)

    return make


@pytest.fixture(scope="session")
def base_layer() -> Layer:
    """What a container needs beside its programs."""
    return ordinary_layer({"etc/hostname": b"test\n", "tmp/.keep": b"", "root/.keep": b""})


Publish = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def publish() -> Publish:
    """Run ``fusesnap publish``."""

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("fusesnap"), "publish", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return call


@pytest.fixture(scope="session")
def published(
    tmp_path_factory: pytest.TempPathFactory,
    nix_store: NixStore,
    simple: SimpleClosure,
    key: SigningKey,
    publish: Publish,
) -> CacheFiles:
    directory = tmp_path_factory.mktemp("published")
    options = (
        "--from",
        nix_store.directory,
        "--to",
        directory,
        "--secret-key-file",
        key.secret_file,
    )
    done = publish(*options, "--closure", simple.root)
    assert done.returncode == 0, done.stderr
    # JSON cannot say a name that one of the paths has.
    (line,) = done.stderr.splitlines()
    assert "-tree: has no listing in the cache: " in line
    assert done.stdout.startswith(f"{len(simple.closure.paths)} paths, ")
    return CacheFiles(directory)
