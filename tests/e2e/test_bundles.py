"""Containers from a cache that has a startup bundle of their closure: one request carries the start."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from testbed.binary_cache import (
    CacheFiles,
    HttpCache,
    SigningKey,
    hash_part,
    http_cache,
    publish_cache,
)
from testbed.containerd import containerd
from testbed.fusesnap_daemon import PROGRAM, FusesnapDaemon, Source, fusesnap_daemon
from testbed.image_endpoint import image_endpoint
from testbed.images import Layer, NixLayerManner, write_image
from testbed.nix_store import NixStore, image_path
from testbed.processes import run
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker, Publish

NixLayers = Callable[..., Layer]


@pytest.fixture
def files(published: CacheFiles, tmp_path: Path) -> CacheFiles:
    """A copy of the published cache that a test may change."""
    return CacheFiles(Path(shutil.copytree(published.directory, tmp_path / "cache")))


@pytest.fixture
def cache(files: CacheFiles, tmp_path: Path) -> Iterator[HttpCache]:
    with http_cache(files, tmp_path / "cache-nginx") as running:
        yield running


@pytest.fixture
def script(simple: SimpleClosure) -> str:
    """What the container reads: a script, a small file, and the beginning and the middle of a large one."""
    large = f"{simple.large}/data"
    middle = f"dd if={large} bs=4096 skip=700 count=2 2>/dev/null"
    return f"cat {simple.tree}/self; head -c 9 {large} | sha256sum; {middle} | sha256sum"


def spoil(files: CacheFiles) -> None:
    """Damage the last bytes of every bundle: the header is right, and the stream is not."""
    for file in (files.directory / "bundle").iterdir():
        data = bytearray(file.read_bytes())
        data[-100] ^= 0xFF
        file.write_bytes(data)


@contextlib.contextmanager
def started(
    directory: Path, cache: HttpCache, key: SigningKey, reference: str, script: str
) -> Iterator[tuple[FusesnapDaemon, str]]:
    """A node that has nothing, which pulls and runs an image; what the container said."""
    directory.mkdir()
    source = Source([cache.url], [key.public])
    with (
        fusesnap_daemon(directory / "s", source=source) as daemon,
        containerd(directory / "c", proxy=daemon.address) as client,
    ):
        cache.clear_requests()
        client.pull(reference)
        yield daemon, client.run(reference, "one", "/bin/sh", "-c", script)


def index_of(cache: HttpCache, path: str) -> str:
    """As it is asked for."""
    return "/" + cache.files.narinfo(path)["NarIndex"].split()[0]


def asked(cache: HttpCache, *beginnings: str) -> list[str]:
    return [each.path for each in cache.requests() if each.path.startswith(beginnings)]


def recorded(
    first: Node, layers: Sequence[Layer], script: str, directory: Path
) -> tuple[str, str, Path]:
    """A start on a node that has nothing: the image's reference, what the container said, and the trace of it."""
    reference, trace = first.pull(layers), directory / "trace"
    said = first.containerd.run(reference, "one", "/bin/sh", "-c", script)
    run([PROGRAM, "trace", "export", "busybox", "-o", trace, "--state", first.daemon.state])
    return reference, said, trace


def test_one_request_carries_a_start_and_a_damaged_one_is_told_and_done_without(
    make_node: NodeMaker,
    cache: HttpCache,
    files: CacheFiles,
    simple: SimpleClosure,
    nix_store: NixStore,
    nix_layers: NixLayers,
    base_layer: Layer,
    script: str,
    publish: Publish,
    key: SigningKey,
    work: Path,
    tmp_path: Path,
) -> None:
    layers = [base_layer, nix_layers()]
    reference, said, trace = recorded(make_node(cache.url), layers, script, tmp_path)
    target = ("--from", nix_store.directory, "--to", files.directory)
    options = (*target, "--secret-key-file", key.secret_file, "--closure", "--trace", trace)
    done = publish(*options, simple.root)
    assert done.returncode == 0, done.stderr

    with started(work / "a", cache, key, reference, script) as (_, again):
        assert again == said
        assert len(asked(cache, "/bundle/")) == 1
        others = asked(cache, "/nar/", "/trace/")
        assert [each for each in others if not each.endswith(".narindex")] == []
        touched = {index_of(cache, path) for path in (simple.busybox, simple.tree, simple.large)}
        assert touched.isdisjoint(others)
    spoil(files)
    with started(work / "b", cache, key, reference, script) as (daemon, again):
        assert again == said
        assert len(asked(cache, "/bundle/")) == 1
        daemon.service.wait_until(lambda: "is not used any further" in daemon.service.log_text())


def test_one_request_carries_the_start_of_an_image_that_only_its_store_path_names(
    make_node: NodeMaker,
    simple: SimpleClosure,
    nix_store: NixStore,
    nix_layers: NixLayers,
    base_layer: Layer,
    script: str,
    publish: Publish,
    key: SigningKey,
    work: Path,
    tmp_path: Path,
) -> None:
    layers = [base_layer, nix_layers(NixLayerManner.PATHS)]
    archive = write_image(tmp_path / "image.tar", layers, name="image:1", command=["/bin/sh"])
    image = image_path(nix_store, archive, simple.root)
    files = publish_cache(nix_store, [image], tmp_path / "cache", key)
    with http_cache(files, tmp_path / "cache-nginx") as cache:
        _, said, trace = recorded(make_node(cache.url), layers, script, tmp_path)
        target = ("--from", nix_store.directory, "--to", files.directory, "--trace", trace)
        done = publish(*target, "--secret-key-file", key.secret_file, "--closure", image)
        assert done.returncode == 0, done.stderr

        (work / "a").mkdir()
        with image_endpoint(work / "a", Source([cache.url], [key.public])) as (daemon, client):
            cache.clear_requests()
            daemon.pull(f"nix:0{image}")
            # What caches say of themselves is asked for beside it, once a week.
            assert asked(cache, "/") == [f"/bundle/{hash_part(image)}", "/nix-cache-info"]
            again = client.run(f"nix:0{image}:latest", "one", "/bin/sh", "-c", script)
            assert again == said
            assert [each for each in asked(cache, "/") if each.endswith(".narinfo")] == []
            assert daemon.status()["errors"] == []
