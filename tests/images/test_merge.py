from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.images.layer import LayerTar
from fusesnap.images.merge import MergeLayer, merge_layers
from fusesnap.images.rootfs import RootFs
from fusesnap.nix.store_path import StoreDir

Item = tuple[tarfile.TarInfo, bytes]
Facts = dict[str, dict[str, Any]]
OpenTar = Callable[[bytes], LayerTar]
MakeTar = Callable[..., bytes]
Shown = Callable[[RootFs], Facts]
Unpacked = Callable[[Sequence[bytes]], Facts | None]


def made(name: str, kind: bytes, data: bytes = b"", **fields: Any) -> Item:
    info = tarfile.TarInfo(name)
    info.type, info.mtime = kind, 1000
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def file(name: str, data: bytes = b"", **fields: Any) -> Item:
    return made(name, tarfile.REGTYPE, data, **fields)


def folder(name: str, mode: int = 0o755, **fields: Any) -> Item:
    return made(name, tarfile.DIRTYPE, mode=mode, **fields)


def link(name: str, target: str) -> Item:
    return made(name, tarfile.SYMTYPE, linkname=target)


def hard(name: str, target: str) -> Item:
    return made(name, tarfile.LNKTYPE, linkname=target)


def merged(tars: Sequence[bytes], open_tar: OpenTar) -> RootFs:
    return merge_layers([MergeLayer(open_tar(tar)) for tar in tars], StoreDir())


def comparable(facts: Facts, implied: set[str]) -> Facts:
    """Without the metadata of directories that no layer declares: each tool has its own."""
    return {
        path: {
            key: value
            for key, value in fact.items()
            if path not in implied or key not in ("mode", "owner")
        }
        for path, fact in facts.items()
    }


def implied_directories(rootfs: RootFs) -> set[str]:
    nodes = range(len(rootfs))
    return {os.fsdecode(rootfs.path(node)) for node in nodes if rootfs.node(node).layer is None}


CASES: dict[str, tuple[list[list[Item]], set[str]]] = {
    "an upper layer adds and replaces": (
        [[folder("d"), file("d/a", b"1"), file("d/b")], [file("d/a", b"2"), file("d/c")]],
        {"d", "d/a", "d/b", "d/c"},
    ),
    "a directory over a directory merges and brings its metadata": (
        [[folder("d", 0o700, uid=5), file("d/a")], [folder("d", 0o1777, gid=6)]],
        {"d", "d/a"},
    ),
    "a file over a directory replaces all of it": (
        [[folder("d"), folder("d/e"), file("d/e/a")], [file("d", b"x")]],
        {"d"},
    ),
    "a directory over a file replaces it": (
        [[file("d", b"x")], [folder("d"), file("d/a")]],
        {"d", "d/a"},
    ),
    "a directory over a link replaces it": (
        [[folder("real"), file("real/a"), link("d", "real")], [folder("d"), file("d/b")]],
        {"real", "real/a", "d", "d/b"},
    ),
    "a whiteout hides a file": ([[file("a"), file("b")], [file(".wh.a")]], {"b"}),
    "a whiteout hides a directory": (
        [[folder("d"), file("d/a"), file("b")], [file(".wh.d")]],
        {"b"},
    ),
    "a whiteout of nothing": ([[file("b")], [file(".wh.a"), file("no/.wh.a")]], {"b"}),
    "a whiteout and then the same name": (
        [[folder("d"), file("d/a")], [file(".wh.d"), folder("d"), file("d/b")]],
        {"d", "d/b"},
    ),
    "the same name and then its whiteout": (
        [[folder("d"), file("d/a")], [folder("d"), file("d/b"), file(".wh.d")]],
        {"d", "d/b"},
    ),
    "a whiteout does not hide its own layer's file": ([[file("a"), file(".wh.a")]], {"a"}),
    "an opaque directory": (
        [[folder("d"), file("d/a")], [folder("d"), file("d/.wh..wh..opq"), file("d/b")]],
        {"d", "d/b"},
    ),
    "an opaque directory, its mark last": (
        [[folder("d"), file("d/a")], [folder("d"), file("d/b"), file("d/.wh..wh..opq")]],
        {"d", "d/b"},
    ),
    "an opaque directory, its mark first": (
        [[folder("d"), file("d/a")], [file("d/.wh..wh..opq"), file("d/b"), folder("d", 0o700)]],
        {"d", "d/b"},
    ),
    "opaque hides deep content, and not what its layer adds there": (
        [
            [folder("d"), folder("d/e"), file("d/e/a"), file("d/e/b")],
            [folder("d"), folder("d/e"), file("d/e/c"), file("d/.wh..wh..opq")],
        ],
        {"d", "d/e", "d/e/c"},
    ),
    "an opaque root": ([[file("a")], [file(".wh..wh..opq"), file("b")]], {"b"}),
    "opaque in one layer does not hide later ones": (
        [[folder("d"), file("d/a")], [folder("d"), file("d/.wh..wh..opq")], [file("d/c")]],
        {"d", "d/c"},
    ),
    "hard links": (
        [[file("a", b"x"), hard("b", "a"), hard("c", "./b")]],
        {"a", "b", "c"},
    ),
    "a hard link to a lower layer's file": (
        [[file("a", b"x")], [hard("b", "a")]],
        {"a", "b"},
    ),
    "a hard link keeps what its name had at the time": (
        [[file("a", b"old")], [hard("b", "a")], [file("a", b"new")]],
        {"a", "b"},
    ),
    "a hard link survives the whiteout of its other name": (
        [[file("a", b"x"), hard("b", "a")], [file(".wh.a")]],
        {"b"},
    ),
    "a hard link to what the same layer then hides": (
        [[file("a", b"x")], [hard("b", "a"), file(".wh.a")]],
        {"b"},
    ),
    "a hard link to a link": ([[link("a", "nowhere"), hard("b", "a")]], {"a", "b"}),
    "entries below a link go where it points": (
        [[folder("usr"), folder("usr/lib"), link("lib", "usr/lib")], [file("lib/x", b"1")]],
        {"usr", "usr/lib", "usr/lib/x", "lib"},
    ),
    "links never lead out of the root": (
        [[folder("etc"), link("out", "../../../etc")], [file("out/x"), file("out/.wh.y")]],
        {"etc", "etc/x", "out"},
    ),
    "absolute links": (
        [[folder("etc"), file("etc/y"), link("out", "/etc")], [file("out/x"), file("out/.wh.y")]],
        {"etc", "etc/x", "out"},
    ),
    "a whiteout below a link that its layer replaces hides nothing there": (
        [[folder("real"), file("real/a"), link("d", "real")], [folder("d"), file("d/.wh.a")]],
        {"real", "real/a", "d"},
    ),
    "parents that no layer declares": ([[file("x/y/z")]], {"x", "x/y", "x/y/z"}),
    "devices and fifos": (
        [
            [
                made("c", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
                made("b", tarfile.BLKTYPE, devmajor=7, devminor=300),
                made("p", tarfile.FIFOTYPE, mode=0o600, uid=3),
            ]
        ],
        {"c", "b", "p"},
    ),
    "modes and owners": (
        [
            [
                file("a", mode=0o4755, uid=10, gid=20),
                folder("d", 0o2750, uid=30),
                file("d/b", mode=0),
            ]
        ],
        {"a", "d", "d/b"},
    ),
    "extended attributes": (
        [
            [
                file("a", pax_headers={"SCHILY.xattr.user.x": "1", "SCHILY.xattr.user.y": "2"}),
                folder("d", pax_headers={"SCHILY.xattr.user.old": "1"}),
            ],
            [folder("d", pax_headers={"SCHILY.xattr.user.new": "2"})],
        ],
        {"a", "d"},
    ),
    "extended attributes that an upper layer's directory has not": (
        [[folder("d", pax_headers={"SCHILY.xattr.user.old": "1"})], [folder("d")]],
        {"d"},
    ),
    "times": ([[file("a", mtime=1700000000.5), file("b", mtime=0)]], {"a", "b"}),
    "the root's own metadata": ([[folder("./", 0o700, uid=9)], [folder("./", 0o711)]], set()),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(
    name: str, make_tar: MakeTar, open_tar: OpenTar, shown: Shown, unpacked: Unpacked
) -> None:
    layers, expected = CASES[name]
    tars = [make_tar(layer) for layer in layers]
    with merged(tars, open_tar) as rootfs:
        found, implied = shown(rootfs), implied_directories(rootfs)
    assert set(found) - {""} == expected
    theirs = unpacked(tars)
    assert theirs is not None
    assert comparable(found, implied) == comparable(theirs, implied)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([[file(".wh.")]], "whiteout '.wh.': expected the name that it hides"),
        ([[file("d/.wh..")]], "whiteout 'd/.wh..': expected the name"),
        ([[file("d/.wh...")]], "whiteout 'd/.wh...': expected the name"),
        ([[folder(".wh.d"), file(".wh.d/x")]], "entry '.wh.d/x' is in a whiteout"),
        ([[hard("b", "a"), file("a")]], "hard link 'b' to 'a': expected a file of this or a lower"),
        (
            [[file("a")], [hard("a", "a")]],
            "hard link 'a' to 'a': expected a file of this or a lower",
        ),
        ([[file("a")], [file(".wh.a")], [hard("b", "a")]], "hard link 'b' to 'a': expected a file"),
        ([[folder("d"), hard("b", "d")]], "hard link 'b' to 'd': expected a file, got a directory"),
        ([[file("a"), hard(".", "a")]], "entry '' is the root: expected a directory"),
        ([[hard("b", ".")]], "hard link 'b' to '': expected a file, got a directory"),
        ([[file("a")], [file("a/b")]], "'a': expected a directory at 'a', which is another file"),
        (
            [[file("x"), folder("d"), link("d/l", "../x")], [file("d/l/b")]],
            "'d/l': expected a directory at 'x', which is another file",
        ),
        (
            [[link("a", "b"), link("b", "a"), file("a/x")]],
            "'a': expected at most 40 symbolic links",
        ),
    ],
)
def test_what_nothing_can_unpack(
    layers: list[list[Item]], reason: str, make_tar: MakeTar, open_tar: OpenTar
) -> None:
    with pytest.raises(InvalidData) as caught:
        merged([make_tar(layer) for layer in layers], open_tar)
    assert str(caught.value).startswith("layer sha256:")
    assert reason in str(caught.value)


def test_what_aufs_kept_for_itself_is_passed_over(
    make_tar: MakeTar, open_tar: OpenTar, shown: Shown
) -> None:
    items = [folder(".wh..wh.plnk"), file(".wh..wh.plnk/1.2"), file(".wh..wh.aufs"), file("a")]
    with merged([make_tar(items)], open_tar) as rootfs:
        assert set(shown(rootfs)) == {"", "a"}


def test_names_that_only_look_like_whiteouts(
    make_tar: MakeTar, open_tar: OpenTar, shown: Shown
) -> None:
    with merged([make_tar([file("a.wh.b"), file("b")])], open_tar) as rootfs:
        assert set(shown(rootfs)) == {"", "a.wh.b", "b"}


def test_too_many_entries_in_all_layers_together(
    make_tar: MakeTar, open_tar: OpenTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusesnap.images.merge.MAX_ENTRIES", 3)
    tars = [make_tar([file("a"), file("b")]), make_tar([file("a"), file("b")])]
    with pytest.raises(InvalidData, match="expected at most 3 entries in the image's layers"):
        merged(tars, open_tar)


def test_paths_as_deep_as_they_may_be(make_tar: MakeTar, open_tar: OpenTar) -> None:
    deep = "/".join(["d"] * 2000)
    with merged([make_tar([file(deep)]), make_tar([file(".wh.d")])], open_tar) as rootfs:
        assert len(rootfs) == 1
    with merged([make_tar([file(deep)])], open_tar) as rootfs:
        assert rootfs.path(len(rootfs) - 1) == deep.encode()


# ------------------------------------------------------------ stacks at random

directories = st.lists(st.sampled_from("de"), max_size=2).map("/".join)
modes = st.sampled_from([0o644, 0o755, 0o4711, 0o700, 0o1777])


def inside(names: str, prefix: str = "") -> st.SearchStrategy[str]:
    leaves = st.sampled_from(names)
    return st.builds(lambda d, n: f"{d}/{prefix}{n}".lstrip("/"), directories, leaves)


# Mostly one kind a name, so that stacks are refused now and then only; and links at the end of paths
# only: what a whiteout means for a link that its own layer goes through depends on the tar's order.
items = st.one_of(
    st.builds(file, inside("fgde"), st.binary(max_size=3), mode=modes, uid=st.integers(0, 2)),
    st.builds(file, inside("fg"), st.binary(max_size=3), mtime=st.integers(0, 10**9)),
    st.builds(folder, inside("de"), modes),
    st.builds(folder, inside("def"), modes),
    st.builds(link, inside("s"), st.sampled_from(["f", "../d", "/e"])),
    st.builds(hard, inside("fgh"), inside("fg")),
    st.builds(file, inside("defgs", prefix=".wh.")),
    st.builds(file, directories.map(lambda d: f"{d}/.wh..wh..opq".lstrip("/"))),
)
stacks = st.lists(st.lists(items, min_size=1, max_size=7), min_size=1, max_size=4)


@given(stacks)
def test_as_umoci(
    make_tar: MakeTar,
    open_tar: OpenTar,
    shown: Shown,
    unpacked: Unpacked,
    layers: list[list[Item]],
) -> None:
    tars = [make_tar(layer) for layer in layers]
    theirs = unpacked(tars)
    try:
        rootfs = merged(tars, open_tar)
    except InvalidData:
        assert theirs is None
        return
    with rootfs:
        # It refuses a hard link to a lower file that a whiteout further up in the tar hides.
        if theirs is not None:
            implied = implied_directories(rootfs)
            assert comparable(shown(rootfs), implied) == comparable(theirs, implied)
