"""What a container has changed becomes a layer, the one that containerd would make; nothing is fetched for it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import secrets
import socket
import stat
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import zstandard
from google.protobuf.timestamp_pb2 import Timestamp
from testbed.binary_cache import HttpCache
from testbed.containerd import Container
from testbed.containerd_configuration import DIFFER
from testbed.debian import containerd_release
from testbed.images import (
    OPAQUE,
    WHITEOUT,
    Device,
    Directory,
    File,
    HardLink,
    Layer,
    Link,
    Pipe,
    ordinary_layer,
)
from testbed.processes import run
from testbed.synthetic import SimpleClosure

from fusesnap.services.api import (
    content_pb2,
    content_pb2_grpc,
    descriptor_pb2,
    diff_pb2,
    diff_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    mount_pb2,
    snapshots_pb2,
    snapshots_pb2_grpc,
)

from .conftest import Node, NodeMaker

NixLayers = Callable[..., Layer]

TAR = "application/vnd.oci.image.layer.v1.tar"
LONG = "a-name-of-many-bytes-" * 11
# A version 2 capability, cap_net_raw=ep (include/uapi/linux/capability.h).
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
MAPPING = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
LARGE = 5_000_000  # bytes of the closure's large file
NAMESPACE = (("containerd-namespace", "default"),)

# Every way in which a container can change what it sees: of the image, of store paths, and of its own.
SCRIPT = """
set -e
cd /work
echo changed > changed; chmod 600 mode; chown 7:8 owner; touch -d @99 time
rm gone; rm -r gone-tree; rm -r replaced; echo file > replaced; rm file; mkdir -p file/inner; echo x > file/inner/x
rm -r opaque; mkdir opaque; echo new > opaque/new; mkdir opaque/deep; echo d > opaque/deep/e
ln one/target two/link; ln one/target one/another; ln -s /somewhere/else soft; ln hard-a hard-c
ln soft soft-too; mkfifo pipe; mknod null c 1 3; mknod disk b 8 1; mkdir empty sticky; chmod 1777 sticky
cp copied copy && cat copy > copied; chmod 644 kept; chmod 600 kept; chmod 644 kept; touch -d @7 kept
mkdir -p "$0/$0"; echo long > "$0/$0/$0"; ln -s "$0/$0/$0" "long link"; echo e > "$(printf 'odd\\351 \\303\\251')"
echo big > uid; chown 3000000:4000000 uid; touch -d @-5 early || true; touch -d @9000000000 late
mv moved-file moved; cp -a moved-tree renamed; rm -r moved-tree
chmod 755 $1/bin; echo in a store path > $1/bin/new; rm $1/bin/cat; rm $2; rm -r $3; ln $4 script
"""


# A layer over the one that is worked on, with every kind of entry.
MORE = ordinary_layer(
    {
        "etc/passwd": File(b"root", mode=0o4640, uid=3, gid=4, mtime=5),
        "work": Directory(mode=0o1777, mtime=9),
        f"work/one/{WHITEOUT}target": b"",
        "work/gone-tree/a": Directory(),
        f"work/gone-tree/a/{OPAQUE}": b"",
        f"work/{WHITEOUT}never-there": b"",
        "work/changed": File(b"changed", mode=0o644, mtime=7),  # as it was
        "work/kept": File(b"tpek", mode=0o644, mtime=7),
        "work/replaced": Link("two"),
        "work/two/other": HardLink("etc/passwd"),
        "dev/null": Device(1, 3),
        "dev/disk": Device(8, 1, block=True),
        "run/pipe": Pipe(mode=0o600),
        f"{LONG}/{LONG}": Link(LONG),
        "caps": File(b"x", xattrs={"security.capability": CAPABILITY}),
    }
)


@contextmanager
def channel(node: Node) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{node.containerd.address}") as opened:
        yield opened


def _lease(channel: grpc.Channel) -> str:
    """A lease, as containerd's own clients have one: without it the collector may take a layer while it is written."""
    request = leases_pb2.CreateRequest(id=f"test-{secrets.token_hex(8)}")
    leases_pb2_grpc.LeasesStub(channel).Create(request, metadata=NAMESPACE)
    return request.id


class Diffs:
    """Asks containerd for diffs of our snapshots."""

    def __init__(self, node: Node, channel: grpc.Channel) -> None:
        self._node = node
        self._channel = channel
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
        self._diff = diff_pb2_grpc.DiffStub(channel)
        self._metadata = (*NAMESPACE, ("containerd-lease", _lease(channel)))
        self._views = 0

    def view(self, name: str) -> Sequence[mount_pb2.Mount]:
        self._views += 1
        request = snapshots_pb2.ViewSnapshotRequest(
            snapshotter="fusesnap",
            key=f"test-view-{self._views}",
            parent=name,
            # Nothing refers to it: without this containerd's collector may take it.
            labels={"containerd.io/gc.root": "1970-01-01T00:00:00Z"},
        )
        return self._snapshots.View(request, metadata=NAMESPACE).mounts

    def states(self, name: str) -> tuple[Sequence[mount_pb2.Mount], Sequence[mount_pb2.Mount]]:
        """The mounts of a snapshot's parent, and its own, as containerd's client asks for them."""
        stat = snapshots_pb2.StatSnapshotRequest(snapshotter="fusesnap", key=name)
        info = self._snapshots.Stat(stat, metadata=NAMESPACE).info
        if info.kind == snapshots_pb2.COMMITTED:
            return self.view(info.parent), self.view(name)
        request = snapshots_pb2.MountsRequest(snapshotter="fusesnap", key=name)
        return self.view(info.parent), self._snapshots.Mounts(request, metadata=NAMESPACE).mounts

    def of(
        self, name: str, *, walking: bool = False, media_type: str = TAR, epoch: int | None = None
    ) -> descriptor_pb2.Descriptor:
        """The layer of a snapshot; with ``walking`` by containerd's own differ, to which such mounts are left."""
        left, right = self.states(name)
        if walking:
            left, right = [[_spelled_otherwise(one) for one in side] for side in (left, right)]
        request = diff_pb2.DiffRequest(left=left, right=right, media_type=media_type)
        if epoch is not None:
            request.source_date_epoch.CopyFrom(Timestamp(seconds=epoch))
        return self._diff.Diff(request, metadata=self._metadata, timeout=60).diff

    def chain(self) -> list[str]:
        """The committed snapshots of the one image, lowest first."""
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter="fusesnap")
        blocks = self._snapshots.List(request, metadata=NAMESPACE)
        above = {info.parent: info.name for block in blocks for info in block.info}
        names = [above[""]]
        while names[-1] in above:
            names.append(above[names[-1]])
        return names

    def labels(self, descriptor: descriptor_pb2.Descriptor) -> Mapping[str, str]:
        """The labels of content."""
        request = content_pb2.InfoRequest(digest=descriptor.digest)
        return (
            content_pb2_grpc.ContentStub(self._channel)
            .Info(request, metadata=NAMESPACE)
            .info.labels
        )

    def content(self, descriptor: descriptor_pb2.Descriptor) -> bytes:
        digest = descriptor.digest.removeprefix("sha256:")
        (blob,) = (self._node.work / "c/root").glob(f"*content*/blobs/sha256/{digest}")
        assert blob.stat().st_size == descriptor.size
        return blob.read_bytes()


def _spelled_otherwise(mount: mount_pb2.Mount) -> mount_pb2.Mount:
    """The same mount in other words, which we do not know as ours."""
    words = [
        word.replace("=/", "=/./").replace(":/", ":/./") if "dir=" in word else word
        for word in mount.options
    ]
    source = mount.source.replace("/", "/./", 1) if mount.type == "bind" else mount.source
    return mount_pb2.Mount(type=mount.type, source=source, options=words)


@pytest.fixture
def worked_on() -> Layer:
    """A layer with what the script changes."""
    return ordinary_layer(
        {
            "work": Directory(mode=0o777),
            **{
                f"work/{name}": File(name.encode(), mode=0o644, mtime=7)
                for name in (
                    [
                        "changed",
                        "mode",
                        "owner",
                        "time",
                        "gone",
                        "file",
                        "copied",
                        "kept",
                        "hard-a",
                        "moved-file",
                        "one/target",
                        "uid",
                    ]
                )
            },
            "work/gone-tree/a/b": b"b",
            "work/replaced/a/b": b"b",
            "work/opaque/old": b"old",
            "work/opaque/deep/old": b"old",
            "work/opaque/new": b"old",
            "work/two/other": b"other",
            "work/hard-b": HardLink("work/hard-a"),
            "work/moved-tree/x": b"x",
            "work/unchanged": b"unchanged",
        }
    )


def change(container: Container, simple: SimpleClosure) -> None:
    """Change all there is to change."""
    container.execute(
        "/bin/sh", "-c", SCRIPT, LONG, simple.root, simple.file, simple.tree, simple.script
    )
    work = container.root() / "work"
    os.setxattr(work / "changed", "security.capability", CAPABILITY)
    os.setxattr(work / "changed", "user.note", b"not kept")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(work / "socket"))


def seen(container: Container, simple: SimpleClosure) -> dict[str, tuple[object, ...]]:
    """What a container sees where it was changed. A socket is nothing without who listens."""
    found: dict[str, tuple[object, ...]] = {}
    root = container.root()
    for top in ("work", "nix/store", f"{simple.root.lstrip('/')}/bin"):
        for path in sorted((root / top).glob("**/*" if top == "work" else "*")):
            status = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(status.st_mode) and top == "work" else b""
            target = str(path.readlink()) if path.is_symlink() else ""
            kind = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev)
            if not stat.S_ISSOCK(status.st_mode):
                # containerd unpacks nothing as of before 1970.
                time = max(int(status.st_mtime), 0)
                found[str(path.relative_to(root))] = (*kind, time, target, data)
    return found


def members(layer: bytes) -> dict[str, tuple[object, ...]]:
    """What a layer says, by name, with the content of files."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(layer), errors="surrogateescape") as tar:
        for one in tar:
            data = tar.extractfile(one).read() if one.isreg() else b""  # type: ignore[union-attr]
            found[one.name] = (one.type, one.mode, one.uid, one.gid, one.linkname, data)
    return found


def without_whiteout_times(layer: bytes) -> bytes:
    """Before 2.0 containerd wrote the time of the diff into whiteouts, and with it the checksum differs."""
    blocks = bytearray(layer)
    with tarfile.open(fileobj=io.BytesIO(layer), errors="surrogateescape") as tar:
        for one in tar:
            if Path(one.name).name.startswith(WHITEOUT):
                blocks[one.offset_data - 512 + 136 : one.offset_data - 512 + 156] = bytes(20)
    return bytes(blocks)


@pytest.mark.parametrize("version", ["1.7", "2"])
def test_the_layer_of_a_cold_container_is_containerds_own_and_nothing_is_fetched_for_it(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    worked_on: Layer,
    version: str,
) -> None:
    node = make_node(cache.url, release=containerd_release(version), differ="walking")
    reference = node.pull([base_layer, worked_on, nix_layers()])
    with (
        node.containerd.started(reference, "one", "/bin/sleep", "1000") as container,
        channel(node) as opened,
    ):
        change(container, simple)
        before = seen(container, simple)
        diffs = Diffs(node, opened)
        cache.clear_requests()
        ours = diff_of(node, "one", "--media-type", TAR)
        assert cache.requests() == []
        assert "wrote layer" in node.daemon.service.log_text()
        assert simple.large.removeprefix("/nix/store/") not in ours.decode(errors="replace")
        theirs = diffs.content(diffs.of("one", walking=True))
        assert node.daemon.service.log_text().count("wrote layer") == 1
    assert members(ours) == members(theirs)
    assert list(members(ours)) == list(members(theirs))
    assert without_whiteout_times(ours) == without_whiteout_times(theirs)
    if node.containerd.release.major >= 2:
        assert ours == theirs
        # An image with that layer on top shows what the container saw.
        committed = node.pull([base_layer, worked_on, nix_layers(), Layer(ours)])
        with node.containerd.started(committed, "two", "/bin/sleep", "1000") as two:
            assert seen(two, simple) == before


def test_the_layers_of_images_are_containerds_own_in_every_compression(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    worked_on: Layer,
) -> None:
    node = make_node(cache.url, release=containerd_release("2"), differ=DIFFER)
    # containerd's transfer service has been given our differ to unpack with, and nothing else.
    reference = node.push([worked_on, MORE, nix_layers()])
    node.containerd.pull(reference, transfer=True)
    with channel(node) as opened:
        diffs = Diffs(node, opened)
        chain = diffs.chain()
        bottom, more, nix = (diffs.content(diffs.of(name)) for name in chain)
        # Single files are on their way as soon as there is a view.
        files = {simple.file, simple.script, simple.empty, simple.text}
        assert cache.requested_nars(simple.closure.paths) <= files
        # Of a layer that stands for store paths there is what came with the image, and not what it stands for.
        assert members(nix).keys() == members(nix_layers().tar).keys()
        for ours, name in zip((bottom, more), chain, strict=False):
            assert ours == diffs.content(diffs.of(name, walking=True))
        assert f"work/{OPAQUE}" not in members(more)
        assert {"work/one/.wh.target", "work/gone-tree/a/.wh.b"} <= members(more).keys()

        # Nobody refers to what was written yet; a lease of its own keeps it.
        digest = diffs.of(chain[1]).digest
        node.containerd.ctr("content", "prune", "references")
        assert digest in node.containerd.ctr("content", "ls")
        assert "containerd.io/gc.expire" in node.containerd.ctr("leases", "ls")

        epoch = diffs.content(diffs.of(chain[1], epoch=8))
        assert epoch == diffs.content(diffs.of(chain[1], epoch=8, walking=True)) != more
        for ending, opener in (("+gzip", gzip.decompress), ("+zstd", unpacked)):
            found = diffs.of(chain[1], media_type=TAR + ending)
            assert opener(diffs.content(found)) == more
            assert (found.media_type, diffs.labels(found)["containerd.io/uncompressed"]) == (
                TAR + ending,
                f"sha256:{hashlib.sha256(more).hexdigest()}",
            )


def test_a_container_with_a_user_namespace_changes_what_it_would_change_without(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    release = containerd_release("2")
    node = make_node(cache.url, release=release, differ="walking", remap_ids=True)
    node.work.chmod(0o711)  # runc goes to the container's root as the container's root
    reference = node.pull([base_layer, nix_layers()])
    script = f"""
        ls -l /nix/store  # waits for single files, which are on their way
        echo mine > /mine; chown 1000:7 /mine; mkdir /tmp/d; echo changed > /etc/hostname
        chmod u+w {simple.root}/bin; rm {simple.root}/bin/cat; ln -s x {simple.root}/bin/new; rm {simple.file}
    """
    layers = []
    for name, mapping in (("plain", ()), ("mapped", (*MAPPING, "--remap-labels"))):
        argv = ("/bin/sh", "-c", f"{script} touch /done; exec sleep 1000")
        options = ("--detach", *mapping)
        run(node.containerd.run_command(reference, name, *argv, options=options))
        done = Container(node.containerd, name, node.work / "log").root() / "done"
        node.daemon.service.wait_until(done.exists)
        cache.clear_requests()
        layers.append(members(diff_of(node, name, "--media-type", TAR)))
        assert cache.requests() == []
        node.containerd.remove(name)
    assert layers[0] == layers[1]
    assert layers[1]["mine"][2:4] == (1000, 7)


def test_the_walking_differ_of_1_6_reads_no_contents(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    node = make_node(cache.url, release=containerd_release("1.6"))
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
        container.execute(
            "/bin/sh", "-c", 'echo mine > /mine; find "$1" | wc -l', "sh", simple.large
        )
        before = bytes_read(node)
        container.execute("/bin/cat", f"{simple.large}/data")
        assert bytes_read(node) - before >= LARGE  # that is where it shows
        before = bytes_read(node)
        layer = diff_of(node, "one", "--media-type", TAR)
        assert [name for name in members(layer) if "mine" in name] == ["mine"]
        assert bytes_read(node) - before < LARGE


def bytes_read(node: Node) -> int:
    """What the worker, which serves the mount, has read from files."""
    pid = node.daemon.status()["worker"]["pid"]
    counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counters["rchar"])


def unpacked(layer: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(layer) as reader:
        return reader.read()


def diff_of(node: Node, name: str, *options: str) -> bytes:
    """What ``ctr snapshots diff`` says of a container's snapshot."""
    command = node.containerd.command(
        "snapshots", "--snapshotter", "fusesnap", "diff", *options, name
    )
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
