"""What a kubelet does with images, call by call, on containerd 1.6, 1.7 and 2.x.

No registry has, or is asked for, an image whose reference begins with ``nix:0/``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey, http_cache, write_cache
from testbed.fusesnap_daemon import Source
from testbed.images import Layer, NixLayerManner, store_paths_layer, write_image
from testbed.nix_store import NixStore
from testbed.registry import Registry
from testbed.synthetic import SimpleClosure
from testbed.workplace import run_directory

from .bad_images import BAD, NOWHERE, Bad
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
    (added,) = nix_store.add(archive_file)
    return added


@pytest.fixture(scope="module")
def bad_archives(
    tmp_path_factory: pytest.TempPathFactory, nix_store: NixStore, archive_file: Path
) -> dict[str, str]:
    """Store paths that are no good images."""
    directory = tmp_path_factory.mktemp("bad")
    added = nix_store.add(*(bad.write(archive_file, directory) for bad in BAD))
    return {bad.name: path for bad, path in zip(BAD, added, strict=True)}


@pytest.fixture(scope="module")
def images_cache(
    tmp_path_factory: pytest.TempPathFactory,
    cache_files: CacheFiles,
    nix_store: NixStore,
    archive: str,
    bad_archives: dict[str, str],
    key: SigningKey,
) -> Iterator[HttpCache]:
    """The session's cache, with images in it."""
    paths = [archive, *bad_archives.values()]
    files = write_cache(nix_store, paths, cache_files.directory, compression="zstd", key=key)
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
    also: Sequence[str] = (),
) -> None:
    """From the first look at an image to its removal; nothing is left of it.

    A kubelet calls an image by its id when it makes a container; ``also`` are other names for it.
    """
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
    for name in (id_, *also):
        runs(node, name, simple, args=args)
    kubelet.remove_image(id_)
    assert kubelet.image(reference) is None
    assert id_ not in kubelet.images()
    node.wait_until_nothing_is_left()


def runs(
    node: KubeletNode,
    image: str,
    simple: SimpleClosure,
    *,
    args: Sequence[str],
) -> None:
    """A pod with a container of the image, from its start to its removal."""
    kubelet, pod = node.kubelet, node.pod()
    with kubelet.pod(pod) as identity:
        config = pod.container(image, args=args)
        container = kubelet.start(identity, pod, config)
        program = f"{simple.busybox}/bin/busybox"
        assert kubelet.execute(container, program, "echo", "hello") == "hello\n"
        node.daemon.service.wait_until(lambda: node.logs(pod) == ["stdout F started"])
        kubelet.stop(container)
        # containerd 2.4 may answer before it has noted it down; a kubelet asks until it has.
        node.daemon.service.wait_until(lambda: kubelet.status(container).exit_code == 7)
        kubelet.remove(container)


def test_store_paths_are_images(
    node: KubeletNode, images_cache: HttpCache, archive: str, simple: SimpleClosure
) -> None:
    """An archive, and a package that nobody has made an image of."""
    images_cache.clear_requests()
    package, image = f"nix:0{simple.busybox}", f"nix:0{archive}:latest"
    lives(node, package, simple, args=["sh", "-c", SERVE], also=[package, f"{package}:latest"])
    assert images_cache.requested_nars(simple.closure.paths) == {simple.busybox}
    lives(node, image, simple, args=["-c", SERVE])
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


on_one = pytest.mark.parametrize("node", ["2"], indirect=True)


@on_one
def test_a_pull_of_what_is_there_asks_no_cache(
    node: KubeletNode, images_cache: HttpCache, archive: str, simple: SimpleClosure
) -> None:
    """Nor is anything collected that belongs to it, and a containerd that starts anew knows it."""
    id_ = node.kubelet.pull(f"nix:0{archive}")
    images_cache.clear_requests()
    assert node.kubelet.pull(f"nix:0{archive}:latest") == id_
    assert not images_cache.requests()
    there = node.held()
    node.collect()
    assert node.held() == there
    hash_alone = f"nix:0{archive.partition('-')[0]}"
    pulls = [
        node.kubelet.begin_pull(each) for each in (hash_alone, hash_alone, f"nix:0{archive}:2")
    ]
    assert {pull.result().image_ref for pull in pulls} == {id_}
    node.restart_containerd()
    node.daemon.service.wait_until(lambda: node.knows(hash_alone, id_))
    runs(node, f"nix:0{archive}", simple, args=["-c", SERVE])
    image = node.kubelet.image(id_)
    assert image is not None
    node.kubelet.remove_image(hash_alone)
    by_digest = min(image.repo_digests, key=len)
    assert node.kubelet.pull(by_digest) == id_
    known = node.kubelet.image(id_)
    assert known is not None
    assert (list(known.repo_tags), list(known.repo_digests)) == ([], [by_digest])
    node.kubelet.remove_image(id_)
    node.wait_until_nothing_is_left()


# What a pull asks of containerd.
CALLS = [
    "Leases/Create",
    "Content/Write",
    "Snapshots/Prepare",
    "Diff/Apply",
    "Snapshots/Commit",
    "Content/Update",
    "Images/Create",
]


@on_one
@pytest.mark.parametrize(
    ("call", "after"),
    [
        ("Leases/Create", True),
        ("Content/Write", False),
        ("Content/Write", True),
        ("Snapshots/Prepare", True),
        ("Diff/Apply", False),
        ("Snapshots/Commit", True),
        ("Content/Update", False),
        ("Images/Create", True),
    ],
)
def test_a_pull_that_is_given_up_leaves_nothing(
    node: KubeletNode, archive: str, call: str, *, after: bool
) -> None:
    """Before containerd is asked, or when it has done it and nobody knows."""
    with node.gate.holding(call, after=after) as hold:
        pull = node.kubelet.begin_pull(f"nix:0{archive}")
        assert hold.reached.wait(20)
        pull.cancel()
    node.wait_until_nothing_is_left()


@on_one
def test_a_pull_that_was_killed_is_taken_up_by_the_next(node: KubeletNode, archive: str) -> None:
    """kill -9 when all is there but the names. The lease that is left is the next one's."""
    with node.gate.holding("Images/Create") as hold:
        pull = node.kubelet.begin_pull(f"nix:0{archive}")
        assert hold.reached.wait(20)
        killed = node.daemon.status()["services"]["pid"]
        os.kill(killed, signal.SIGKILL)
        assert pull.exception() is not None
    node.daemon.service.wait_until(lambda: node.serves(killed))
    assert node.left()["leases"]
    id_ = node.kubelet.pull(f"nix:0{archive}")
    assert "leases" not in node.left()
    node.kubelet.remove_image(id_)
    node.wait_until_nothing_is_left()


@on_one
@pytest.mark.parametrize("call", CALLS)
def test_a_pull_that_fails_leaves_nothing(node: KubeletNode, archive: str, call: str) -> None:
    with node.gate.refusing(call), pytest.raises(grpc.RpcError, match=f"{call} is refused"):
        node.kubelet.pull(f"nix:0{archive}")
    assert not node.left()


@on_one
@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_what_is_no_good_image_is_refused_with_the_reason(
    node: KubeletNode, bad_archives: dict[str, str], bad: Bad
) -> None:
    refused(node, bad_archives[bad.name], bad.said)


@on_one
def test_what_is_no_image_at_all_is_refused_with_the_reason(
    node: KubeletNode, simple: SimpleClosure
) -> None:
    refused(node, NOWHERE, "0" * 32)
    refused(node, f"{simple.busybox}-other", simple.busybox)
    refused(node, "/etc/passwd", "expected nix:0/nix/store/<hash>-<name>")
    refused(node, simple.file, simple.file)
    refused(node, simple.tree, simple.tree, "bin")


@on_one
def test_a_package_of_many_programs_says_so_when_it_is_started_without_a_command(
    node: KubeletNode, simple: SimpleClosure
) -> None:
    id_ = node.kubelet.pull(f"nix:0{simple.root}")
    pod = node.pod()
    with (
        node.kubelet.pod(pod) as identity,
        pytest.raises(grpc.RpcError, match="programs and none of them is called simple"),
    ):
        node.kubelet.start(identity, pod, pod.container(id_))
    node.kubelet.remove_image(id_)
    node.wait_until_nothing_is_left()


def refused(node: KubeletNode, path: str, *said: str) -> None:
    """An image cannot be had, and nothing is left; what is ``said`` is in the message."""
    with pytest.raises(grpc.RpcError) as caught:
        node.kubelet.pull(f"nix:0{path}")
    message = str(caught.value.details())
    assert all(each in message for each in said), message
    assert not node.left()
