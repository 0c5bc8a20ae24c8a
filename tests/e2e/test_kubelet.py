"""What a kubelet does with images, call by call, on containerd 1.6, 1.7 and 2.x.

No registry has, or is asked for, an image whose reference begins with ``nix:0/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey, http_cache, write_cache
from testbed.fusesnap_daemon import Source
from testbed.images import Layer, NixLayerManner, store_paths_layer, write_image
from testbed.nix_store import NixStore
from testbed.registry import Registry
from testbed.synthetic import SimpleClosure
from testbed.workplace import run_directory

from .kubelet_node import KubeletNode, kubelet_node

NixLayers = Callable[..., Layer]
# Ends when it is told to, with a status of its own.
SERVE = "trap 'exit 7' TERM; echo started; sleep 1000 & wait"


@pytest.fixture(scope="module")
def archive_file(
    tmp_path_factory: pytest.TempPathFactory, nix_layers: NixLayers, base_layer: Layer
) -> Path:
    """An image as nix-snapshotter's ``buildImage`` makes it."""
    return write_image(
        tmp_path_factory.mktemp("archive") / "image.tar",
        [base_layer, nix_layers(NixLayerManner.PATHS)],
        name="archive:1",
        entrypoint=["/bin/sh"],
        environment={"PATH": "/bin"},
    )


@pytest.fixture(scope="module")
def archive(nix_store: NixStore, archive_file: Path) -> str:
    """A store path that is that archive."""
    return nix_store.add(archive_file)


@pytest.fixture(scope="module")
def images_cache(
    tmp_path_factory: pytest.TempPathFactory,
    cache_files: CacheFiles,
    nix_store: NixStore,
    archive: str,
    key: SigningKey,
) -> Iterator[HttpCache]:
    """The session's cache, with images in it."""
    files = write_cache(nix_store, [archive], cache_files.directory, compression="zstd", key=key)
    with http_cache(files, tmp_path_factory.mktemp("nginx")) as running:
        yield running


@pytest.fixture(scope="module", params=["1.6", "1.7", "2"])
def node(
    request: pytest.FixtureRequest,
    images_cache: HttpCache,
    key: SigningKey,
    nix_store: NixStore,
    simple: SimpleClosure,
) -> Iterator[KubeletNode]:
    source = Source([images_cache.url], [key.public])
    pause = store_paths_layer(nix_store, [simple.busybox])
    program = f"{simple.busybox}/bin/busybox"
    with (
        run_directory("fs-") as work,
        kubelet_node(work, request.param, source, pause, program) as running,
    ):
        yield running


def lives(
    node: KubeletNode,
    reference: str,
    simple: SimpleClosure,
    *,
    args: Sequence[str],
    command: Sequence[str] = (),
) -> None:
    """From the first look at an image to its removal; nothing is left of it."""
    before = node.held()
    kubelet = node.kubelet
    assert kubelet.image(reference) is None
    id_ = kubelet.pull(reference)
    assert id_.startswith("sha256:")
    image = kubelet.image(reference)
    assert image is not None
    assert image == kubelet.image(id_) == kubelet.images()[id_]
    assert image.id == id_
    assert image.size > 0
    assert [name.removesuffix(":latest") for name in image.repo_tags] == [
        reference.removesuffix(":latest")
    ]
    (by_digest,) = image.repo_digests
    assert kubelet.image(by_digest) == image
    # A kubelet says the image's id; containerd's CRI and its transfer service take the reference too.
    for name in (id_, reference):
        runs(node, name, simple, command=command, args=args)
    kubelet.remove_image(id_)
    assert kubelet.image(reference) is None
    assert id_ not in kubelet.images()
    node.wait_until_nothing_is_new(before)


def runs(
    node: KubeletNode,
    image: str,
    simple: SimpleClosure,
    *,
    args: Sequence[str],
    command: Sequence[str] = (),
) -> None:
    """A pod with a container of the image, from its start to its removal."""
    kubelet, pod = node.kubelet, node.pod()
    with kubelet.pod(pod) as identity:
        config = pod.container(image, command, args)
        container = kubelet.start(identity, pod, config)
        program = f"{simple.busybox}/bin/busybox"
        assert kubelet.execute(container, program, "echo", "hello") == "hello\n"
        node.daemon.service.wait_until(lambda: node.logs(pod) == ["stdout F started"])
        kubelet.stop(container)
        assert kubelet.status(container).exit_code == 7
        kubelet.remove(container)


def test_store_paths_are_images(
    node: KubeletNode, images_cache: HttpCache, archive: str, simple: SimpleClosure
) -> None:
    """An archive, and a package that nobody has made an image of."""
    images_cache.clear_requests()
    lives(node, f"nix:0{simple.busybox}", simple, args=["sh", "-c", SERVE])
    assert images_cache.requested_nars(simple.closure.paths) == {simple.busybox}
    lives(node, f"nix:0{archive}:latest", simple, args=["-c", SERVE])
    assert simple.large not in images_cache.requested_nars(simple.closure.paths)
    assert node.kubelet.image_file_systems()


def test_images_of_a_registry_are_as_ever(
    node: KubeletNode,
    image_registry: Registry,
    archive_file: Path,
    nix_store: NixStore,
    simple: SimpleClosure,
) -> None:
    """With Nix layers, and ordinary ones."""
    name = f"kubelet:{node.work.name}"
    lives(node, image_registry.push(archive_file, name), simple, args=["-c", SERVE])
    ordinary = write_image(
        node.work / "ordinary.tar",
        [store_paths_layer(nix_store, [simple.busybox])],
        name=f"{name}-ordinary",
        entrypoint=[f"{simple.busybox}/bin/busybox"],
    )
    reference = image_registry.push(ordinary, f"{name}-ordinary")
    lives(node, reference, simple, args=["sh", "-c", SERVE])
