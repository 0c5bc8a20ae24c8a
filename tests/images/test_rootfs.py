from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import ContentMismatch, InvalidArgument, StorageFailure
from fusesnap.images.layer import FileKind, LayerTar
from fusesnap.images.merge import MergeLayer, merge_layers
from fusesnap.images.rootfs import ROOT, Extent, RootFs
from fusesnap.nix.store_path import StoreDir

Item = tuple[tarfile.TarInfo, bytes]
OpenTar = Callable[[bytes], LayerTar]
MakeTar = Callable[..., bytes]


def item(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> Item:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, target, 0o755, 5
    return info, data


@pytest.fixture
def rootfs(make_tar: MakeTar, open_tar: OpenTar) -> RootFs:
    lower = [
        item("b/z", b"lower z"),
        item("a", b"a's contents"),
        item("b/link", kind=tarfile.SYMTYPE, target="../a"),
        item("hard", kind=tarfile.LNKTYPE, target="a"),
    ]
    upper = [item("b/c", b"upper c"), item("d", kind=tarfile.DIRTYPE), item("b/.wh.gone")]
    tars = [open_tar(make_tar(items)) for items in (lower, upper)]
    return merge_layers([MergeLayer(tar) for tar in tars], StoreDir())


def test_numbers_go_breadth_first_in_the_order_of_names(rootfs: RootFs) -> None:
    with rootfs:
        paths = [rootfs.path(index) for index in range(len(rootfs))]
    assert paths == [b"", b"a", b"b", b"d", b"hard", b"b/c", b"b/link", b"b/z"]


def test_walking(rootfs: RootFs) -> None:
    with rootfs:
        b = rootfs.child(ROOT, b"b")
        assert b is not None
        assert [rootfs.node(child).name for child in rootfs.children(b)] == [b"c", b"link", b"z"]
        assert {rootfs.parent(child) for child in rootfs.children(b)} == {b}
        assert rootfs.parent(ROOT) == ROOT
        assert rootfs.find(b"b/z") == rootfs.child(b, b"z")
        assert rootfs.find(b"") == ROOT
        for absent in (b"", b"A", b"bb", b"y", b"zz"):
            assert rootfs.child(b, absent) is None
        assert rootfs.find(b"b/z/x") is None
        assert rootfs.find(b"no/where") is None
        file = rootfs.find(b"a")
        assert file is not None
        assert len(rootfs.children(file)) == 0


def test_nodes(rootfs: RootFs) -> None:
    with rootfs:
        root, a, b, d, hard = (rootfs.node(index) for index in range(5))
        link = rootfs.node(6)
    assert (root.kind, root.mode, root.layer, root.nlink) == (FileKind.DIRECTORY, 0o755, None, 4)
    assert (a.size, a.nlink, a.inode, hard.inode, hard.name) == (12, 2, 1, 1, b"hard")
    assert a.content == hard.content
    assert isinstance(a.content, Extent)
    assert (a.content.layer, a.content.size) == (0, 12)
    assert (b.layer, b.nlink, b.mtime_ns, b.content) == (None, 2, 0, None)
    assert (d.layer, d.mtime_ns, d.st_mode) == (1, 5_000_000_000, 0o40755)
    assert (link.kind, link.target, link.size) == (FileKind.SYMLINK, b"../a", 4)


def test_reading(rootfs: RootFs) -> None:
    with rootfs:
        a, c = rootfs.find(b"a"), rootfs.find(b"b/c")
        assert a is not None
        assert c is not None
        assert rootfs.read(a, 0, 100) == b"a's contents"
        assert rootfs.read(a, 4, 3) == b"con"
        assert rootfs.read(a, 12, 10) == rootfs.read(a, 10**12, 1) == rootfs.read(a, 3, 0) == b""
        assert rootfs.read(c, 0, 100) == b"upper c"


@pytest.mark.parametrize(
    ("path", "offset", "size"), [(b"", 0, 1), (b"b/link", 0, 1), (b"a", -1, 1), (b"a", 0, -1)]
)
def test_what_cannot_be_read(rootfs: RootFs, path: bytes, offset: int, size: int) -> None:
    index = rootfs.find(path)
    assert index is not None
    with rootfs, pytest.raises(InvalidArgument, match="expected a regular file and a range"):
        rootfs.read(index, offset, size)


def test_closing_closes_the_layers(rootfs: RootFs) -> None:
    rootfs.close()
    with pytest.raises(StorageFailure, match="Bad file descriptor"):
        rootfs.read(1, 0, 1)


def test_a_cached_layer_that_was_changed(
    make_tar: MakeTar, open_tar: OpenTar, tmp_path: Path
) -> None:
    data = make_tar([item("a", b"x" * 5000)])
    (tmp_path / "layer").write_bytes(data)
    with open_tar(data) as same:
        tar = LayerTar(os.open(tmp_path / "layer", os.O_RDONLY), same.diff_id, "the layer")
    with merge_layers([MergeLayer(tar)], StoreDir()) as rootfs:
        os.truncate(tmp_path / "layer", 2000)
        with pytest.raises(ContentMismatch, match="the layer: expected 5000 bytes at offset 512"):
            rootfs.read(1, 0, 5000)


def test_hidden_and_opaque(make_tar: MakeTar, open_tar: OpenTar) -> None:
    layers: Sequence[list[Item]] = [
        [item("d/a"), item("d/e/x"), item("o/a")],
        [item("d/.wh.a"), item("d/.wh.e"), item("d/e/y"), item("o/.wh..wh..opq"), item("d/.wh.n")],
        [item("d/a", kind=tarfile.DIRTYPE), item("p")],
        [item("p", kind=tarfile.DIRTYPE)],
    ]
    tars = [open_tar(make_tar(items)) for items in layers]
    with merge_layers([MergeLayer(tar) for tar in tars], StoreDir()) as rootfs:
        d, o = rootfs.find(b"d"), rootfs.find(b"o")
        assert d is not None
        assert o is not None
        assert rootfs.hidden(d) == {b"a", b"e", b"n"}
        assert rootfs.hidden(ROOT) == {b"p"}  # a file stood there
        assert rootfs.hidden(o) == frozenset()
        assert [rootfs.opaque(index) for index in (ROOT, d, o)] == [False, False, True]


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory, open_tar: OpenTar) -> tuple[RootFs, bytes]:
    """A sparse file as GNU tar wrote it, and what is in it."""
    directory = tmp_path_factory.mktemp("sparse")
    with (directory / "sparse").open("wb") as file:
        for offset, piece in [(0, b"start"), (200_000, b"middle" * 999), (500_000, b"end")]:
            file.seek(offset)
            file.write(piece)
        file.truncate(600_000)
    command = ["tar", "-C", str(directory), "--format=posix", "-S", "-cf", "-", "sparse"]
    tar = subprocess.run(command, check=True, capture_output=True).stdout
    rootfs = merge_layers([MergeLayer(open_tar(tar))], StoreDir())
    return rootfs, (directory / "sparse").read_bytes()


@given(st.integers(0, 610_000), st.integers(0, 610_000))
def test_sparse_files(sparse: tuple[RootFs, bytes], offset: int, size: int) -> None:
    rootfs, contents = sparse
    content = rootfs.node(1).content
    assert content is not None
    assert content.segments is not None
    assert content.size < 100_000
    assert rootfs.read(1, offset, size) == contents[offset : offset + size]
