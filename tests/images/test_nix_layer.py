from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import InvalidData
from fusesnap.images.layer import LayerTar
from fusesnap.images.layer_cache import LayerCache
from fusesnap.images.layout import open_layout
from fusesnap.images.merge import MergeLayer, merge_layers
from fusesnap.images.mountable import open_rootfs
from fusesnap.images.nix_layer import Placeholder, layer_labels
from fusesnap.images.platform import Platform
from fusesnap.images.rootfs import RootFs
from fusesnap.images.source import parse_source
from fusesnap.nix.closure_labels import ClosureLabel, PathLabels
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import EntryKind

Item = tuple[tarfile.TarInfo, bytes]
Merged = Callable[..., RootFs]
X = StorePath("a" * 32, "x-1.0")
Y = StorePath("b" * 32, "y.conf")
NX, NY = f"nix/store/{X}", f"nix/store/{Y}"


def made(name: str, kind: bytes, data: bytes = b"", target: str = "") -> Item:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, 0o755
    return info, data


def file(name: str, data: bytes = b"") -> Item:
    return made(name, tarfile.REGTYPE, data)


def folder(name: str) -> Item:
    return made(name, tarfile.DIRTYPE)


def link(name: str, target: str) -> Item:
    return made(name, tarfile.SYMTYPE, target=target)


# As nix-snapshotter's images have it: placeholders, and links at the root to what is in the paths.
NIX = [folder("nix"), folder("nix/store"), folder(NX), file(NY), link("bin", f"/{NX}/bin")]
ORDINARY = [folder("etc"), file("etc/passwd", b"root")]


@pytest.fixture
def merged(make_tar: Callable[..., bytes], open_tar: Callable[[bytes], LayerTar]) -> Merged:
    """Merges layers; those in ``stated`` have labels with these paths."""

    def merge(
        *layers: list[Item],
        stated: dict[int, tuple[StorePath, ...]] | None = None,
        recognise_content: bool = True,
        store_dir: StoreDir = StoreDir(),  # noqa: B008 - immutable
    ) -> RootFs:
        tars = [
            MergeLayer(open_tar(make_tar(items)), (stated or {}).get(position))
            for position, items in enumerate(layers)
        ]
        return merge_layers(tars, store_dir, recognise_content=recognise_content)

    return merge


def paths(rootfs: RootFs) -> dict[int, list[StorePath]]:
    return {
        layer.position: [placeholder.path for placeholder in layer.placeholders]
        for layer in rootfs.nix_layers
    }


def placeholders(rootfs: RootFs) -> set[StorePath]:
    """Whose content shows where the tree has a node."""
    nodes = range(len(rootfs))
    found = {path for node in nodes if (path := rootfs.placeholder(node)) is not None}
    assert all(rootfs.placeholder(rootfs.store_node(path) or 0) == path for path in found)
    return found


def tree(rootfs: RootFs) -> set[bytes]:
    return {rootfs.path(node) for node in range(1, len(rootfs))}


# ---------------------------------------------------------------- recognition


def test_recognised_by_content(merged: Merged) -> None:
    with merged(ORDINARY, NIX, ORDINARY) as rootfs:
        (layer,) = rootfs.nix_layers
        assert layer.position == 1
        assert layer.placeholders == (
            Placeholder(X, EntryKind.DIRECTORY),
            Placeholder(Y, EntryKind.REGULAR),
        )
        assert placeholders(rootfs) == {X, Y}
        assert rootfs.overridden == frozenset()
        assert rootfs.store_directory == rootfs.find(b"nix/store")


@pytest.mark.parametrize(
    "items",
    [
        ORDINARY,
        [folder("nix"), folder("nix/store")],
        [*NIX, file(f"{NX}/bin", b"")],
        [*NIX, file("nix/store/other")],
        [*NIX, folder("nix/store/.links")],
        [*NIX, file(NY, b"content")],
        [*NIX, link(NX, "/etc")],
        [*NIX, made(NX, tarfile.FIFOTYPE)],
        [*NIX, made(NX, tarfile.LNKTYPE, target=NY)],
        [*NIX, file(f"nix/store/.wh.{Y}")],
        [*NIX, file("nix/store/.wh..wh..opq")],
        [*NIX, file(f"{NX}/.wh.y")],
        [*NIX, file("nix/store/" + "é" * 40)],
    ],
)
def test_ordinary_content(merged: Merged, items: list[Item]) -> None:
    with merged(items) as rootfs:
        assert rootfs.nix_layers == ()
        assert placeholders(rootfs) == set()


def test_new_metadata_for_content_that_the_image_has_is_no_placeholder(merged: Merged) -> None:
    lower = [folder(NX), file(f"{NX}/bin", b"x"), file(NY, b"y")]
    with merged(lower, [folder(NX)]) as rootfs:
        assert rootfs.nix_layers == ()
        assert f"{NX}/bin".encode() in tree(rootfs)
    with merged(lower, [folder(NY)]) as rootfs:
        assert rootfs.nix_layers == ()


def test_new_metadata_for_a_path_that_shows_already_is_no_placeholder(merged: Merged) -> None:
    upper = [file(f"{NX}/more", b"1")]
    with merged(NIX, upper, [folder(NX)]) as rootfs:
        assert paths(rootfs) == {0: [X, Y]}
        assert f"{NX}/more".encode() in tree(rootfs)


def test_two_layers_that_share_a_path(merged: Merged) -> None:
    upper = [file(f"{NX}/more", b"1")]
    with merged([folder(NX)], upper, NIX) as rootfs:
        assert paths(rootfs) == {0: [X], 2: [X, Y]}
        assert placeholders(rootfs) == {X, Y}
        assert f"{NX}/more".encode() in tree(rootfs)


def test_recognition_can_be_turned_off(merged: Merged) -> None:
    with merged(NIX, recognise_content=False) as rootfs:
        assert rootfs.nix_layers == ()


def test_another_store_directory(merged: Merged) -> None:
    items = [folder(f"opt/store/{X}")]
    with merged(items, store_dir=StoreDir("/opt/store")) as rootfs:
        assert paths(rootfs) == {0: [X]}
    with merged(items) as rootfs:
        assert rootfs.nix_layers == ()


def test_labels_win(merged: Merged) -> None:
    with merged([*NIX, file(f"{NX}/more", b"own")], stated={0: (X,)}) as rootfs:
        (layer,) = rootfs.nix_layers
        assert layer.placeholders == (Placeholder(X, EntryKind.DIRECTORY),)
        assert placeholders(rootfs) == {X}
        assert rootfs.store_node(Y) is not None


def test_labels_without_placeholders(merged: Merged) -> None:
    with merged(ORDINARY, stated={0: (X, Y)}) as rootfs:
        (layer,) = rootfs.nix_layers
        assert layer.placeholders == (Placeholder(X, None), Placeholder(Y, None))
        assert rootfs.store_directory is not None
        assert (rootfs.store_node(X), placeholders(rootfs)) == (None, set())
        assert rootfs.overridden == frozenset()


def test_a_link_for_a_placeholder_that_labels_state(merged: Merged) -> None:
    with merged([link(NX, "elsewhere")], stated={0: (X,)}) as rootfs:
        assert rootfs.nix_layers[0].placeholders == (Placeholder(X, EntryKind.SYMLINK),)


def test_labels_that_state_nothing(merged: Merged) -> None:
    with merged(NIX, stated={0: ()}) as rootfs:
        assert rootfs.nix_layers[0].placeholders == ()
        assert placeholders(rootfs) == set()


def test_no_store_in_an_ordinary_image(merged: Merged) -> None:
    with merged(ORDINARY) as rootfs:
        assert (rootfs.store_directory, rootfs.store_node(X)) == (None, None)


# ------------------------------------------------------------------ overrides

OVERRIDES: dict[str, tuple[list[Item], set[StorePath]]] = {
    "nothing": (ORDINARY, set()),
    "added to": ([file(f"{NX}/etc/more")], set()),
    "a directory over it": ([folder(NX)], set()),
    "a directory over a file": ([folder(NY)], {Y}),
    "a file over a directory": ([file(NX, b"new")], {X}),
    "a link over it": ([link(NX, "elsewhere")], {X}),
    "a hard link over it": ([file("f"), made(NX, tarfile.LNKTYPE, target="f")], {X}),
    "a new file over a file": ([file(NY, b"new")], {Y}),
    "whited out": ([file(f"nix/store/.wh.{X}")], {X}),
    "whited out and added again": ([file(f"nix/store/.wh.{X}"), file(f"{NX}/own")], {X}),
    "opaque": ([folder(NX), file(f"{NX}/.wh..wh..opq"), file(f"{NX}/own")], {X}),
    "something in it whited out": ([file(f"{NX}/.wh.bin")], set()),
    "something in it opaque": ([file(f"{NX}/bin/.wh..wh..opq")], set()),
    "the store opaque": ([file("nix/store/.wh..wh..opq")], {X, Y}),
    "nix opaque": ([file("nix/.wh..wh..opq")], {X, Y}),
    "the root opaque": ([file(".wh..wh..opq")], {X, Y}),
    "the store whited out": ([file("nix/.wh.store")], {X, Y}),
    "nix whited out": ([file(".wh.nix")], {X, Y}),
    "a link over the store": ([link("nix/store", "/etc")], {X, Y}),
    "a file over nix": ([file("nix")], {X, Y}),
    "by way of a link": ([link("way", "nix/store"), file(f"way/.wh.{X}")], {X}),
    "elsewhere": ([file(".wh.store"), file(f"etc/.wh.{X}"), file(f"{X}")], set()),
}


@pytest.mark.parametrize("placeholder", [True, False])
@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(merged: Merged, name: str, placeholder: bool) -> None:
    items, expected = OVERRIDES[name]
    lowest = NIX if placeholder else ORDINARY
    if not placeholder and name == "a directory over a file":
        expected = set()  # nobody knows yet that it is a file
    with merged(lowest, items, stated={0: (X, Y)}) as rootfs:
        assert rootfs.overridden == expected
        assert placeholders(rootfs).isdisjoint(expected)
        assert paths(rootfs) == {0: [X, Y]}


def test_what_is_overridden_is_the_images_own(merged: Merged) -> None:
    with merged(NIX, [file(f"nix/store/.wh.{X}"), file(f"{NX}/own", b"1")]) as rootfs:
        node = rootfs.store_node(X)
        assert node is not None
        assert rootfs.placeholder(node) is None
        assert [rootfs.node(child).name for child in rootfs.children(node)] == [b"own"]


def test_additions_are_there_to_be_merged(merged: Merged) -> None:
    upper = [file(f"{NX}/lib/new", b"1"), file(f"{NX}/.wh.bin"), file(f"{NX}/share/.wh..wh..opq")]
    with merged(NIX, upper) as rootfs:
        node = rootfs.store_node(X)
        assert node is not None
        assert rootfs.placeholder(node) == X
        assert [rootfs.node(child).name for child in rootfs.children(node)] == [b"lib", b"share"]
        assert rootfs.hidden(node) == {b"bin"}
        lib, share = rootfs.children(node)
        assert (rootfs.opaque(lib), rootfs.opaque(share)) == (False, True)
        assert rootfs.node(lib).layer is None


def test_what_lower_layers_have_in_the_place_of_a_path_is_gone(merged: Merged) -> None:
    lower = [folder(NX), file(f"{NX}/old", b"1"), file(f"{NX}/.wh.bin")]
    for top in (NIX, ORDINARY):
        with merged(lower, top, stated={1: (X,)}) as rootfs:
            assert f"{NX}/old".encode() not in tree(rootfs)
            node = rootfs.store_node(X)
            assert node is None or rootfs.hidden(node) == frozenset()


def test_the_same_paths_stated_again_show_again(merged: Merged) -> None:
    gone = [file(".wh.nix"), file("etc/x")]
    with merged(NIX, gone, NIX) as rootfs:
        assert rootfs.overridden == frozenset()
        assert placeholders(rootfs) == {X, Y}
        assert set(paths(rootfs)) == {0, 2}
    with merged(NIX, gone, NIX, gone) as rootfs:
        assert rootfs.overridden == {X, Y}


def test_a_nix_layer_hides_only_what_is_lower(merged: Merged) -> None:
    again = [file(".wh..wh..opq"), file("nix/store/.wh..wh..opq"), *NIX[2:3]]
    with merged(NIX, again, stated={1: (X,)}) as rootfs:
        assert rootfs.overridden == {Y}
        assert placeholders(rootfs) == {X}


@pytest.mark.parametrize("lower", [link("nix", "/data"), file("nix"), link("nix/store", "/data")])
def test_the_store_directory_of_a_nix_layer_is_real(merged: Merged, lower: Item) -> None:
    with merged([lower], [folder(NX)]) as rootfs:
        assert placeholders(rootfs) == {X}
        assert tree(rootfs) == {b"nix", b"nix/store", NX.encode()}


# ------------------------------------------------------------------- an image


def test_an_image_with_labels(layout: Any, make_tar: Callable[..., bytes], tmp_path: Path) -> None:
    prefix = "containerd.io/snapshot/"
    annotations: list[dict[str, str]] = [
        {},
        {f"{prefix}nix-layer": "true", f"{prefix}nix-store-path.0": f"/{NX}"},
        {f"{prefix}nix-closure": f"/{NY}"},
    ]
    tars = [make_tar(items) for items in (ORDINARY, NIX, [folder("more")])]
    layer_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    layers = [
        layout.blob(gzip.compress(tar), layer_type, annotations=given)
        for tar, given in zip(tars, annotations, strict=True)
    ]
    layout.add(layout.manifest(tars, layers=layers))
    with open_layout(parse_source(f"oci:{layout.directory}")) as opened:
        image = opened.image(Platform("linux", "amd64"))
        labels = [layer_labels(layer, StoreDir()) for layer in image.layers]
        assert labels == [None, PathLabels((X,)), ClosureLabel(Y)]
        cache = LayerCache(tmp_path / "cache")
        closures = {1: (X,), 2: (X, Y)}
        rootfs = open_rootfs(opened, image, cache, StoreDir(), closures)
    with rootfs:
        assert paths(rootfs) == {1: [X], 2: [X, Y]}
        names = {"etc", "etc/passwd", "more", "bin", "nix", "nix/store", NX}
        assert tree(rootfs) == {name.encode() for name in names}


def test_a_label_that_is_no_store_path(layout: Any, make_tar: Callable[..., bytes]) -> None:
    tar = make_tar(NIX)
    annotations = {"containerd.io/snapshot/nix-closure": "/etc/passwd"}
    layer = layout.blob(tar, "application/vnd.oci.image.layer.v1.tar", annotations=annotations)
    layout.add(layout.manifest([tar], layers=[layer]))
    with open_layout(parse_source(f"oci:{layout.directory}")) as opened:
        (found,) = opened.image(Platform("linux", "amd64")).layers
    with pytest.raises(InvalidData, match=rf"^layer 0 \({found.digest}\): label .*'/etc/passwd'"):
        layer_labels(found, StoreDir())


def test_a_damaged_layer_closes_what_was_opened(
    layout: Any, make_tar: Callable[..., bytes], tmp_path: Path
) -> None:
    layout.add(layout.manifest([make_tar(ORDINARY), b"not a tar" * 100]))
    before = set(Path("/proc/self/fd").iterdir())
    with open_layout(parse_source(f"oci:{layout.directory}")) as opened:
        image = opened.image(Platform("linux", "amd64"))
        with pytest.raises(InvalidData, match=r"layer 1 \(sha256:.*damaged tar"):
            open_rootfs(opened, image, LayerCache(tmp_path / "cache"), StoreDir(), {})
    assert set(Path("/proc/self/fd").iterdir()) == before
