from __future__ import annotations

import dataclasses
import errno
import fcntl
import gzip
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fusesnap.errors import ContentMismatch, FusesnapError, InvalidData, StorageFailure
from fusesnap.images.digest import Digest
from fusesnap.images.layer_cache import LayerCache
from fusesnap.images.layout import ImageLayer, ImageLayout, open_layout
from fusesnap.images.platform import Platform
from fusesnap.images.source import parse_source

MakeTar = Callable[..., bytes]
AMD64 = Platform("linux", "amd64")
LAYER = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def tar(make_tar: MakeTar) -> bytes:
    return make_tar([(tarfile.TarInfo("a"), os.urandom(300_000)), (tarfile.TarInfo("b"), b"b")])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(layout: Any) -> Iterator[ImageLayout]:
    with open_layout(parse_source(f"oci:{layout.directory}")) as found:
        yield found


def only_layer(layout: Any, opened: ImageLayout, blob: bytes, tar: bytes) -> ImageLayer:
    layers = [layout.blob(blob, LAYER)]
    layout.index["manifests"].clear()
    layout.add(layout.manifest([tar], layers=layers))
    return opened.image(AMD64).layers[0]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refusal(
    cache: LayerCache,
    opened: ImageLayout,
    layer: ImageLayer,
    kind: type[FusesnapError] = InvalidData,
) -> str:
    with pytest.raises(kind) as caught:
        cache.layer(opened, layer)
    return str(caught.value)


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    "compress",
    [
        lambda tar: tar,
        gzip.compress,
        lambda tar: gzip.compress(tar[:1000]) + gzip.compress(tar[1000:]),
        zstandard.compress,
        lambda tar: skippable(b"seek table") + zstandard.compress(tar),
    ],
    ids=["none", "gzip", "two gzip members", "zstd", "zstd with a skippable frame"],
)
def test_layers_are_unpacked_once(
    layout: Any,
    opened: ImageLayout,
    directory: Path,
    tar: bytes,
    compress: Callable[[bytes], bytes],
) -> None:
    layer = only_layer(layout, opened, compress(tar), tar)
    progress: list[int] = []
    with LayerCache(directory).layer(opened, layer, progress.append) as made:
        assert made.read(0, len(tar)) == tar
        assert [entry.path for entry in made.entries()] == [b"a", b"b"]
    assert sum(progress) == len(tar)
    assert names(directory) == [f"sha256-{layer.diff_id.hexadecimal}.tar"]

    layout.path(str(layer.digest)).unlink()
    with LayerCache(directory).layer(opened, layer, progress.append) as again:
        assert again.read(0, len(tar)) == tar
    assert sum(progress) == len(tar)


def test_diff_ids_of_another_algorithm(
    layout: Any, opened: ImageLayout, directory: Path, tar: bytes
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    hasher = Digest.parse("sha512:" + "0" * 128).algorithm.new()
    hasher.update(tar)
    layer = dataclasses.replace(layer, diff_id=Digest.parse(f"sha512:{hasher.hexdigest()}"))
    with LayerCache(directory).layer(opened, layer) as made:
        assert made.read(0, len(tar)) == tar


def test_a_diff_id_that_lies(layout: Any, opened: ImageLayout, directory: Path, tar: bytes) -> None:
    layer = only_layer(layout, opened, gzip.compress(tar), tar + b"x")
    said = refusal(LayerCache(directory), opened, layer, ContentMismatch)
    assert f"layer 0 ({layer.digest}): expected diff ID {layer.diff_id} uncompressed, got" in said
    assert names(directory) == []


def test_a_blob_digest_that_lies(
    layout: Any, opened: ImageLayout, directory: Path, tar: bytes
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    path = layout.path(str(layer.digest))
    path.write_bytes(bytes(len(tar)))
    said = refusal(LayerCache(directory), opened, layer, ContentMismatch)
    assert f"layer 0 {layer.digest}: expected that digest, got sha256:" in said
    assert names(directory) == []


def test_a_blob_size_that_lies(
    layout: Any, opened: ImageLayout, directory: Path, tar: bytes
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    os.truncate(layout.path(str(layer.digest)), 1000)
    said = refusal(LayerCache(directory), opened, layer, ContentMismatch)
    assert f"expected {len(tar)} bytes, got 1000" in said


def test_a_blob_that_is_missing(
    layout: Any, opened: ImageLayout, directory: Path, tar: bytes
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    layout.path(str(layer.digest)).unlink()
    assert "expected a blob, there is none" in refusal(LayerCache(directory), opened, layer)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_truncated_compression(
    layout: Any,
    opened: ImageLayout,
    directory: Path,
    tar: bytes,
    compress: Callable[[bytes], bytes],
) -> None:
    layer = only_layer(layout, opened, compress(tar)[:-20], tar)
    said = refusal(LayerCache(directory), opened, layer)
    assert f"layer 0 ({layer.digest}): " in said
    assert "cut short" in said
    assert names(directory) == []


def test_damaged_compression(layout: Any, opened: ImageLayout, directory: Path, tar: bytes) -> None:
    blob = bytearray(gzip.compress(tar))
    blob[-6] ^= 1  # of the checksum
    layer = only_layer(layout, opened, bytes(blob), tar)
    assert f"layer 0 ({layer.digest}): gzip" in refusal(LayerCache(directory), opened, layer)


def test_a_bomb(layout: Any, opened: ImageLayout, directory: Path) -> None:
    tar = bytes(50 << 20)
    layer = only_layer(layout, opened, zstandard.compress(tar), tar)
    cache = LayerCache(directory, max_layer_size=1 << 20)
    assert "expected at most 1048576 bytes uncompressed, got more" in refusal(cache, opened, layer)
    assert names(directory) == []


class Cancelled(BaseException):
    """As trio's: not an Exception."""


def test_work_that_is_stopped_leaves_nothing(
    layout: Any, opened: ImageLayout, directory: Path, tar: bytes
) -> None:
    def stop(_: int) -> None:
        raise Cancelled

    layer = only_layer(layout, opened, tar, tar)
    with pytest.raises(Cancelled):
        LayerCache(directory).layer(opened, layer, stop)
    assert names(directory) == []


def test_a_full_disk(
    layout: Any,
    opened: ImageLayout,
    directory: Path,
    tar: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    layer = only_layer(layout, opened, tar, tar)
    cache = LayerCache(directory)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageFailure, match="cache: No space left on device") as caught:
        cache.layer(opened, layer)
    assert caught.value.errno == errno.ENOSPC
    assert names(directory) == []


def test_the_file_is_synced_before_it_is_visible(
    layout: Any,
    opened: ImageLayout,
    directory: Path,
    tar: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    steps: list[str] = []
    real_sync = os.fsync

    def sync(descriptor: int) -> None:
        present = [name[:7] for name in names(directory)]
        steps.append(f"sync {' '.join(present)}")
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    LayerCache(directory).layer(opened, layer).close()
    assert steps == ["sync .partia", "sync sha256-"]


def test_leftovers_of_the_dead_are_removed_and_the_living_are_left_alone(directory: Path) -> None:
    LayerCache(directory)
    for name in (".partial-dead", ".partial-living", "sha256-x.tar"):
        (directory / name).write_bytes(b"x")
    living = os.open(directory / ".partial-living", os.O_RDONLY)
    try:
        fcntl.flock(living, fcntl.LOCK_EX)
        LayerCache(directory)
        assert names(directory) == [".partial-living", "sha256-x.tar"]
    finally:
        os.close(living)


def test_a_partial_file_that_another_process_took_for_a_leftover(
    layout: Any,
    opened: ImageLayout,
    directory: Path,
    tar: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    cache = LayerCache(directory)
    taken: list[Path] = []
    real_lock = fcntl.flock

    def lock(descriptor: int, how: int) -> None:
        if not taken:
            taken.extend(directory.glob(".partial-*"))
            taken[0].unlink()
        real_lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with cache.layer(opened, layer) as made:
        assert made.read(0, len(tar)) == tar
    assert len(taken) == 1


def test_a_link_for_a_cached_layer_is_not_followed(
    layout: Any, opened: ImageLayout, directory: Path, tar: bytes, tmp_path: Path
) -> None:
    layer = only_layer(layout, opened, tar, tar)
    cache = LayerCache(directory)
    (tmp_path / "other").write_bytes(tar)
    (directory / f"sha256-{layer.diff_id.hexadecimal}.tar").symlink_to(tmp_path / "other")
    assert "symbolic links" in refusal(cache, opened, layer, StorageFailure)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailure, match="file/cache: Not a directory"):
        LayerCache(tmp_path / "file/cache")


WITHOUT_PRIVILEGES = """
import sys
from pathlib import Path
from fusesnap.images.layer_cache import LayerCache
from fusesnap.images.layout import open_layout
from fusesnap.images.mountable import open_rootfs
from fusesnap.images.platform import Platform
from fusesnap.images.source import parse_source
from fusesnap.nix.store_path import StoreDir
with open_layout(parse_source(sys.argv[1])) as layout:
    image = layout.image(Platform("linux", "amd64"))
    rootfs = open_rootfs(layout, image, LayerCache(Path(sys.argv[2])), StoreDir(), {})
with rootfs:
    for index in range(1, len(rootfs)):
        node = rootfs.node(index)
        print(oct(node.st_mode), node.uid, node.rdev, dict(node.xattrs))
"""


def test_no_privileges_are_needed(
    layout: Any, make_tar: MakeTar, directory: Path, tmp_path: Path
) -> None:
    """Devices, others' files, set-user-ID and capabilities, by a process that may make none."""
    device, file = tarfile.TarInfo("a"), tarfile.TarInfo("b")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    file.uid, file.mode = 12345, 0o4755
    file.pax_headers = {"SCHILY.xattr.security.capability": "x"}
    layout.add(layout.manifest([make_tar([(device, b""), (file, b"")])]))
    archive = layout.archive(tmp_path / "image.tar")
    setpriv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    program = [sys.executable, "-c", WITHOUT_PRIVILEGES, f"oci-archive:{archive}", str(directory)]
    done = subprocess.run(
        [*setpriv, *program],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.splitlines() == [
        f"0o20644 0 {os.makedev(1, 3)} {{}}",
        "0o104755 12345 0 {b'security.capability': b'x'}",
    ]
