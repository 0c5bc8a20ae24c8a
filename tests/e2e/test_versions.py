"""containerd 1.6, 1.7 and 2.x, each in every way that it has of unpacking an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import grpc
import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.containerd import Containerd, containerd, mounts_below
from testbed.debian import containerd_release
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.images import Layer, NixLayerManner, ordinary_layer, store_paths_layer, whiteout
from testbed.nix_store import NixStore
from testbed.recorder import Answer, Recorder, recorder
from testbed.registry import Registry
from testbed.synthetic import SimpleClosure

from fusesnap.services.api import mount_pb2, snapshots_pb2, snapshots_pb2_grpc
from fusesnap.services.api.snapshots_pb2 import (
    MountsRequest,
    PrepareSnapshotRequest,
    ViewSnapshotRequest,
)

from .conftest import Node
from .cri import cri_pull

NixLayers = Callable[..., Layer]


class Way(Enum):
    """Who unpacks, and on whose behalf.

    CLIENT        ctr itself; it passes no labels on, so a Nix layer is known by its content
    TRANSFER      the transfer service, for ctr
    CRI           the part of containerd that kubelets talk to
    CRI_TRANSFER  the transfer service, for that part
    """

    CLIENT = "client"
    TRANSFER = "transfer"
    CRI = "cri"
    CRI_TRANSFER = "cri-transfer"


@dataclass(frozen=True, slots=True)
class Case:
    """One way with one version; ``manner`` is how the image's labels, if any arrive, name its closure."""

    version: str
    way: Way
    manner: NixLayerManner

    def __str__(self) -> str:
        return f"{self.version}-{self.way.value}-{self.manner.value}"


CASES = [
    Case("1.6", Way.CLIENT, NixLayerManner.PLACEHOLDERS),
    Case("1.6", Way.CRI, NixLayerManner.CLOSURE),
    Case("1.7", Way.CLIENT, NixLayerManner.PLACEHOLDERS),
    Case("1.7", Way.TRANSFER, NixLayerManner.CLOSURE),
    Case("1.7", Way.CRI, NixLayerManner.PATHS),
    Case("2", Way.CLIENT, NixLayerManner.PLACEHOLDERS),
    Case("2", Way.TRANSFER, NixLayerManner.CLOSURE),
    Case("2", Way.TRANSFER, NixLayerManner.PATHS),
    Case("2", Way.CRI, NixLayerManner.PATHS),
    Case("2", Way.CRI_TRANSFER, NixLayerManner.PATHS),
]


# The calls that are answered with mounts, in messages of one form.
REQUESTS: dict[str, type[PrepareSnapshotRequest | ViewSnapshotRequest | MountsRequest]] = {
    "Prepare": PrepareSnapshotRequest,
    "View": ViewSnapshotRequest,
    "Mounts": MountsRequest,
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    given: Case = request.param
    return given


@dataclass
class Site:
    """A node whose snapshotter's answers are noted down."""

    node: Node
    recorder: Recorder
    way: Way

    @property
    def containerd(self) -> Containerd:
        return self.node.containerd

    @property
    def daemon(self) -> FusesnapDaemon:
        return self.node.daemon

    def obtain(self, layers: list[Layer], command: list[str]) -> str:
        """Make an image and have it unpacked; returns its reference."""
        reference = self.node.push(layers, command)
        if self.way in (Way.CRI, Way.CRI_TRANSFER):
            cri_pull(self.node, reference)
        elif self.way is Way.TRANSFER and self.containerd.release.major < 2:
            # The transfer service of 1.7 fetches from registries with TLS alone, but imports archives.
            archive = self.node.work / f"image-{self.node.images}.tar"
            reference = self.containerd.import_archive(archive, transfer=True)
        else:
            self.containerd.pull(reference, transfer=self.way is Way.TRANSFER)
        return reference


@pytest.fixture
def site(
    case: Case, work: Path, cache: HttpCache, key: SigningKey, image_registry: Registry
) -> Iterator[Site]:
    """Where labels arrive, nothing but labels says what a Nix layer is."""
    by_content = case.manner is NixLayerManner.PLACEHOLDERS
    (work / "fusesnap.toml").write_text(f"recognise-by-content = {str(by_content).lower()}\n")
    source = Source([cache.url], [key.public])
    options = ["--config", str(work / "fusesnap.toml")]
    release = containerd_release(case.version)
    with (
        fusesnap_daemon(work / "s", source=source, options=options) as daemon,
        recorder(work / "recorder.sock", daemon.address) as between,
        containerd(
            work / "c",
            proxy=between.address,
            cri=case.way in (Way.CRI, Way.CRI_TRANSFER),
            annotations=case.way is Way.CRI,
            release=release,
        ) as client,
    ):
        yield Site(Node(client, daemon, image_registry, work), between, case.way)


def test_images_run_and_leave_nothing(
    site: Site,
    case: Case,
    cache: HttpCache,
    nix_store: NixStore,
    simple: SimpleClosure,
    list_path: str,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    lazy = site.obtain([base_layer, nix_layers(case.manner)], ["/bin/sleep", "1000"])
    listed = {list_path} if case.manner is NixLayerManner.CLOSURE else set()
    assert cache.requested_nars([*simple.closure.paths, list_path]) == listed
    lives_lazily(site, lazy, cache, simple)
    ordinary = site.obtain(ordinary_layers(nix_store, simple), [f"{simple.busybox}/bin/sh"])
    lives_as_any(site, ordinary, simple)
    looked_at(site)
    remove_images(site)
    assert_nothing_is_left(site)
    assert_mounts_are_single(site.recorder.answers())


def lives_lazily(site: Site, image: str, cache: HttpCache, simple: SimpleClosure) -> None:
    """Cold, only what is read is fetched; a second container finds it there, and has a root of its own."""
    tail = f"{simple.large}/data"
    with site.containerd.started(image, "one") as one:
        assert f"{site.daemon.state}/lazy" in one.mounts()
        assert simple.large not in cache.requested_nars(simple.closure.paths)
        assert one.execute("/bin/wc", "-c", tail).split()[0] == "5000000"
        one.execute("/bin/sh", "-c", "echo mine >/root/mine")
        cache.clear_requests()
        with site.containerd.started(image, "two") as two:
            assert two.execute("/bin/wc", "-c", tail).split()[0] == "5000000"
            assert two.execute("/bin/ls", "-A", "/root").split() == [".keep"]
            assert two.execute("/bin/cat", "/etc/hostname") == "test\n"
        assert cache.requested_nars(simple.closure.paths) == set()
        assert one.execute("/bin/cat", "/root/mine") == "mine\n"


def ordinary_layers(store: NixStore, simple: SimpleClosure) -> list[Layer]:
    """An image that carries its program, and whose upper layers hide and replace what is below."""
    return [
        store_paths_layer(store, [simple.busybox]),
        ordinary_layer({"etc/kept": b"kept\n", "etc/gone": b"gone\n", "etc/new": b"old\n"}),
        ordinary_layer({whiteout("etc/gone"): b"", "etc/new": b"new\n"}),
    ]


def lives_as_any(site: Site, image: str, simple: SimpleClosure) -> None:
    program = f"{simple.busybox}/bin/busybox"
    with site.containerd.started(image, "three", program, "sleep", "1000") as three:
        assert three.execute(program, "cat", "/etc/kept", "/etc/new") == "kept\nnew\n"
        assert three.execute(program, "ls", "/etc").split() == ["kept", "new"]
        assert f"{site.daemon.state}/lazy" not in three.mounts()


def looked_at(site: Site) -> None:
    """containerd's other calls, for every image: a view of it, its mounts asked again, labels, usage."""
    name, metadata = (
        site.containerd.snapshotter,
        (("containerd-namespace", site.containerd.namespace),),
    )
    with grpc.insecure_channel(f"unix:{site.containerd.address}") as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        lists = stub.List(snapshots_pb2.ListSnapshotsRequest(snapshotter=name), metadata=metadata)
        for parent in [info.name for each in lists for info in each.info]:
            # Without that label containerd may collect it at any moment.
            labels = {"containerd.io/gc.root": "now"}
            view = ViewSnapshotRequest(snapshotter=name, key="look", parent=parent, labels=labels)
            shown = stub.View(view, metadata=metadata).mounts
            mounts = MountsRequest(snapshotter=name, key="look")
            assert stub.Mounts(mounts, metadata=metadata).mounts == shown
            usage = snapshots_pb2.UsageRequest(snapshotter=name, key=parent)
            assert stub.Usage(usage, metadata=metadata).inodes > 0
            info = snapshots_pb2.Info(name="look", labels={**labels, "looked": "at"})
            update = snapshots_pb2.UpdateSnapshotRequest(snapshotter=name, info=info)
            update.update_mask.paths.append("labels.looked")
            assert stub.Update(update, metadata=metadata).info.labels["looked"] == "at"
            remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=name, key="look")
            stub.Remove(remove, metadata=metadata)


def remove_images(site: Site) -> None:
    site.containerd.ctr("images", "rm", "--sync", *sorted(site.containerd.images()))


def assert_nothing_is_left(site: Site) -> None:
    """No snapshot, on either side, and nothing on disk that was there for one."""
    with grpc.insecure_channel(f"unix:{site.daemon.address}") as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)

        def snapshots() -> list[str]:
            lists = stub.List(snapshots_pb2.ListSnapshotsRequest(), timeout=10)
            return [info.name for each in lists for info in each.info]

        site.daemon.service.wait_until(lambda: not snapshots())
        stub.Cleanup(snapshots_pb2.CleanupRequest(), timeout=30)
    state = site.daemon.state
    assert [path.name for path in (state / "snapshots").iterdir()] == []
    assert [path.name for path in (state / "farms").iterdir()] == []
    assert mounts_below(state) == [f"{state}/lazy"]
    assert mounts_below(site.node.work / "c") == []


def assert_mounts_are_single(answers: list[Answer]) -> None:
    """Every answer with mounts holds one, writable as the call says.

    containerd 1.6 cannot mount a second inside the first; newer ones look at the last of several alone, and take a
    read-only answer to Prepare for a layer that is there already, which they then neither fetch nor unpack
    (``core/unpack/unpacker.go``, ``isStaged``).
    """
    views = set()
    seen = set()
    for answer in answers:
        if answer.method not in REQUESTS:
            continue
        key = REQUESTS[answer.method].FromString(answer.request).key
        (mount,) = snapshots_pb2.MountsResponse.FromString(answer.response).mounts
        if answer.method == "View":
            views.add(key)
        assert read_only(mount) == (key in views), (answer.method, key, mount)
        seen.add((answer.method, mount.type))
    assert seen >= {("Prepare", "bind"), ("Prepare", "overlay"), ("View", "overlay")}
    assert {method for method, _ in seen} == REQUESTS.keys()


def read_only(mount: mount_pb2.Mount) -> bool:
    """Whether nothing can be written through it; containerd asks for the word ``ro``."""
    if mount.type == "overlay":
        return not any(option.startswith("upperdir=") for option in mount.options)
    return "ro" in mount.options
