"""Images of Nix packages on real overlay mounts: the view of DESIGN's section 3, and each of its traps."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fusesnap.nix.store_path import MAX_NAME_LENGTH
from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.snapshots.interface import Usage

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

HELLO = {"bin": {"hello": b"#!hello", "hi": "hello"}, "share": {"doc": {}}}
GLIBC = {"lib": {"libc.so": b"\x7fELF"}}
CONFIG = b"a single file"


def store_of(root: Path) -> Path:
    return root / "nix" / "store"


def fuse_layers(bench: Bench, directories: list[Path]) -> list[Path]:
    return [path for path in directories if path.is_relative_to(bench.state / "lazy")]


# Cold and warm


async def test_a_complete_closure_needs_no_fuse(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    hello = bench.path("hello", HELLO, committed=True)
    config = bench.path("config", CONFIG, committed=True)
    link = bench.path("link", "/nix/store/elsewhere", committed=True)
    await bench.nix_layer("image", "", hello, config, link)
    mounts = await bench.snapshotter.prepare("container", "image", {})
    assert mounts[0].options[-1] == "redirect_dir=follow"
    farm, *below = lowers(mounts)
    assert farm.parent == bench.state / "farms"
    assert below == [bench.store.layer, bench.state / "snapshots" / "1" / "fs"]
    store = store_of(bench.mounts.mount(mounts))
    assert bench.look(store) == {
        hello.base_name: HELLO,
        config.base_name: CONFIG,
        link.base_name: "/nix/store/elsewhere",
    }
    assert not bench.source.admitted
    assert not bench.source.prefetched


async def test_what_is_missing_is_served_by_the_lazy_layer(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    hello = bench.path("hello", HELLO, committed=True)
    glibc = bench.path("glibc", GLIBC)
    config = bench.path("config", CONFIG)
    await bench.nix_layer("image", "", hello, glibc, config)
    assert bench.source.admitted == sorted([glibc, config])
    mounts = await bench.snapshotter.prepare("container", "image", {})
    assert bench.source.prefetched == [config]
    lazy_farm, files, farm, *below = lowers(mounts)
    assert [lazy_farm.parent, farm.parent] == [bench.state / "farms"] * 2
    assert files.parent == bench.state / "lazy" / "views"
    image = bench.state / "snapshots" / "1" / "fs"
    assert below == [bench.store.layer, bench.lazy.layer, image]
    root = bench.mounts.mount(mounts)
    everything = {hello.base_name: HELLO, glibc.base_name: GLIBC, config.base_name: CONFIG}
    assert bench.look(store_of(root)) == everything
    assert not bench.source.realised
    # What arrives while the mount lives changes nothing of it.
    bench.store.commit(glibc, GLIBC)
    assert bench.look(store_of(root)) == everything


@pytest.mark.parametrize("missing", ["directory", "file"])
async def test_no_more_fuse_than_needed(
    bench: Bench, lowers: Callable[..., list[Path]], missing: str
) -> None:
    glibc = bench.path("glibc", GLIBC, committed=missing != "directory")
    config = bench.path("config", CONFIG, committed=missing != "file")
    await bench.nix_layer("image", "", glibc, config)
    mounts = await bench.snapshotter.view("view", "image", {})
    expected = bench.lazy.layer if missing == "directory" else bench.state / "lazy/views/1"
    assert fuse_layers(bench, lowers(mounts)) == [expected]
    # The topmost layer is local: merged directories have its metadata.
    assert lowers(mounts)[0].parent == bench.state / "farms"
    root = bench.mounts.mount(mounts)
    assert bench.look(store_of(root)) == {glibc.base_name: GLIBC, config.base_name: CONFIG}


async def test_a_new_container_takes_what_has_arrived(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    glibc, config = bench.path("glibc", GLIBC), bench.path("config", CONFIG)
    await bench.nix_layer("image", "", glibc, config)
    cold = await bench.snapshotter.prepare("cold", "image", {})
    assert len(fuse_layers(bench, lowers(cold))) == 2
    bench.store.commit(config, CONFIG)
    half = await bench.snapshotter.prepare("half", "image", {})
    assert fuse_layers(bench, lowers(half)) == [bench.lazy.layer]
    bench.store.commit(glibc, GLIBC)
    warm = await bench.snapshotter.prepare("warm", "image", {})
    assert not fuse_layers(bench, lowers(warm))
    for mounts in (cold, half, warm):
        store = store_of(bench.mounts.mount(mounts))
        assert bench.look(store) == {glibc.base_name: GLIBC, config.base_name: CONFIG}


async def test_without_a_lazy_layer_everything_is_realised_first(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    bench.close()
    bench.open(lazy=False)
    glibc, config = bench.path("glibc", GLIBC), bench.path("config", CONFIG)
    await bench.nix_layer("image", "", glibc, config)
    assert not bench.source.realised
    mounts = await bench.snapshotter.prepare("container", "image", {})
    assert set(bench.source.realised) == {glibc, config}
    assert not fuse_layers(bench, lowers(mounts))
    store = store_of(bench.mounts.mount(mounts))
    assert bench.look(store) == {glibc.base_name: GLIBC, config.base_name: CONFIG}


async def test_the_longest_name(bench: Bench) -> None:
    long = bench.path("x" * MAX_NAME_LENGTH, HELLO, committed=True)
    lazy = bench.path("y" * MAX_NAME_LENGTH, GLIBC)
    await bench.nix_layer("image", "", long, lazy)
    store = store_of(await bench.run("container", "image"))
    assert bench.look(store) == {long.base_name: HELLO, lazy.base_name: GLIBC}


async def test_a_missing_link_may_have_a_directory_as_placeholder(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    """So nothing is said of a directory whose NAR is small enough for a link, before it is there."""
    link = bench.path("link", "/nix/store/elsewhere")
    glibc = bench.path("glibc", GLIBC)
    bench.source.nar_sizes = {link: 112 + 4096, glibc: 112 + 4097}
    placeholders: dict[str, Any] = {"nix": {"store": {link.base_name: {}, glibc.base_name: {}}}}
    await bench.layer("image", "", placeholders)
    mounts = await bench.snapshotter.prepare("container", "image", {})
    store = store_of(bench.mounts.mount(mounts))
    assert bench.look(store) == {link.base_name: "/nix/store/elsewhere", glibc.base_name: GLIBC}
    assert (
        not bench.source.prefetched
    )  # nearly always it is a directory, and perhaps nobody wants it
    bench.store.commit(link, "/nix/store/elsewhere")
    again = await bench.snapshotter.prepare("another", "image", {})
    assert fuse_layers(bench, lowers(again)) == [bench.lazy.layer]
    store = store_of(bench.mounts.mount(again))
    assert bench.look(store) == {link.base_name: "/nix/store/elsewhere", glibc.base_name: GLIBC}


async def test_a_committed_path_is_what_it_is_whatever_its_placeholder_says(bench: Bench) -> None:
    """nix-snapshotter follows links when it makes placeholders: a link to a directory gets a directory."""
    link = bench.path("link", "/nix/store/elsewhere", committed=True)
    await bench.layer("image", "", {"nix": {"store": {link.base_name: {}}}})
    store = store_of(await bench.run("container", "image"))
    assert bench.look(store) == {link.base_name: "/nix/store/elsewhere"}


# Unpacking


async def test_layers_are_unpacked_onto_plain_layers(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    hello = bench.path("hello", HELLO)
    await bench.nix_layer("one", "", hello)
    key = "default/7/extract-123-AbC_ sha256:feed"
    mounts = await bench.snapshotter.prepare(key, "one", {})
    assert lowers(mounts) == [bench.state / "snapshots" / "1" / "fs"]
    assert await bench.snapshotter.mounts(key) == mounts
    assert "redirect_dir=follow" not in mounts[0].options
    assert not list((bench.state / "farms").iterdir())


async def test_other_keys_unpack_as_well(bench: Bench) -> None:
    """Correctness does not rest on how a client names its keys."""
    hello, glibc = bench.path("hello", HELLO), bench.path("glibc", GLIBC)
    await bench.layer("one", "", bench.placeholders(hello), key="some client's key")
    await bench.layer("two", "one", bench.placeholders(glibc), key="another")
    store = store_of(await bench.run("container", "two"))
    assert bench.look(store) == {hello.base_name: HELLO, glibc.base_name: GLIBC}


async def test_placeholders_made_through_a_mount(bench: Bench) -> None:
    """Overlayfs marks new directories as opaque: they are placeholders all the same."""
    await bench.layer("base", "", {"nix": {"store": {}}, "etc": {}})
    hello, config = bench.path("hello", HELLO), bench.path("config", CONFIG)
    root = await bench.run("key", "base")
    bench.plant(root, bench.placeholders(hello, config))
    bench.mounts.unmount(root)
    await bench.snapshotter.commit("image", "key", {})
    store = store_of(await bench.run("container", "image"))
    assert bench.look(store) == {hello.base_name: HELLO, config.base_name: CONFIG}


# Several layers


@pytest.mark.parametrize("committed", [False, True], ids=["cold", "warm"])
async def test_two_nix_layers_in_one_chain(
    bench: Bench, lowers: Callable[..., list[Path]], *, committed: bool
) -> None:
    """A second closure farm's whiteout would cut the first one's redirects off: there is exactly one."""
    hello = bench.path("hello", HELLO, committed=committed)
    glibc = bench.path("glibc", GLIBC, committed=committed)
    config = bench.path("config", CONFIG, committed=committed)
    await bench.nix_layer("one", "", glibc)
    await bench.layer("two", "one", {"etc": {"passwd": b"root"}})
    await bench.nix_layer("three", "two", glibc, hello, config)
    for root in (await bench.run("container", "three"), await bench.show("view", "three")):
        assert bench.look(store_of(root)) == {
            hello.base_name: HELLO,
            glibc.base_name: GLIBC,
            config.base_name: CONFIG,
        }
        assert bench.look(root / "etc") == {"passwd": b"root"}
    farms = [
        path
        for path in lowers(await bench.snapshotter.mounts("container"))
        if path.is_relative_to(bench.state / "farms") and (path / ".fusesnap-store").exists()
    ]
    assert len(farms) == 1


@pytest.mark.parametrize("committed", [False, True], ids=["cold", "warm"])
async def test_layers_above_keep_their_order(bench: Bench, *, committed: bool) -> None:
    replaced = bench.path("replaced", HELLO, committed=committed)
    emptied = bench.path("emptied", HELLO, committed=committed)
    whited_out = bench.path("whited-out", HELLO, committed=committed)
    file_replaced = bench.path("file-replaced", CONFIG, committed=committed)
    file_whited_out = bench.path("file-whited-out", CONFIG, committed=committed)
    kept = bench.path("kept", GLIBC, committed=committed)
    await bench.nix_layer(
        "one", "", replaced, emptied, whited_out, file_replaced, file_whited_out, kept
    )
    changes = {
        replaced.base_name: [{"bin": {"mine": b"mine"}}],
        emptied.base_name: [{}],
        whited_out.base_name: None,
        file_replaced.base_name: {"now": b"a directory"},
        file_whited_out.base_name: None,
        kept.base_name: {},  # only listed, as archives list the directories above their entries
        "own": {"file": b"own"},
    }
    await bench.layer("two", "one", {"nix": {"store": changes}})
    expected = {
        replaced.base_name: {"bin": {"mine": b"mine"}},
        emptied.base_name: {},
        file_replaced.base_name: {"now": b"a directory"},
        kept.base_name: GLIBC,
        "own": {"file": b"own"},
    }
    for root in (await bench.run("container", "two"), await bench.show("view", "two")):
        assert bench.look(store_of(root)) == expected
    assert not bench.source.realised
    # A Nix layer above brings a path back.
    await bench.nix_layer("three", "two", whited_out)
    store = store_of(await bench.run("again", "three"))
    assert bench.look(store) == expected | {whited_out.base_name: HELLO}


@pytest.mark.parametrize(
    "tree",
    [{"nix": None}, {"nix": "elsewhere"}, {"nix": {"store": None}}, {"nix": {"store": b""}}],
    ids=["whiteout", "link", "store whiteout", "store file"],
)
async def test_a_layer_may_hide_the_whole_store(
    bench: Bench, lowers: Callable[..., list[Path]], tree: dict[str, object]
) -> None:
    await bench.nix_layer("one", "", bench.path("hello", HELLO, committed=True))
    await bench.layer("two", "one", tree)
    mounts = await bench.snapshotter.prepare("container", "two", {})
    assert bench.store.layer not in lowers(mounts)
    assert not store_of(bench.mounts.mount(mounts)).is_dir()


async def test_a_nix_layer_above_a_hidden_store(bench: Bench) -> None:
    await bench.nix_layer("one", "", bench.path("hello", HELLO, committed=True))
    await bench.layer("two", "one", {"nix": None})
    glibc = bench.path("glibc", GLIBC, committed=True)
    await bench.nix_layer("three", "two", glibc)
    store = store_of(await bench.run("container", "three"))
    assert bench.look(store) == {glibc.base_name: GLIBC}


@pytest.mark.parametrize("tree", [{"nix": [{"store": {}}]}, {"nix": {"store": [{}]}}])
async def test_an_opaque_store_directory_hides_what_is_below(
    bench: Bench, tree: dict[str, object]
) -> None:
    await bench.nix_layer("one", "", bench.path("hello", HELLO, committed=True))
    await bench.layer("two", "one", tree)
    assert bench.look(store_of(await bench.run("container", "two"))) == {}
    glibc = bench.path("glibc", GLIBC, committed=True)
    await bench.nix_layer("three", "two", glibc)
    store = store_of(await bench.run("again", "three"))
    assert bench.look(store) == {glibc.base_name: GLIBC}


async def test_a_layer_may_add_to_a_store_path(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    tree = {
        "bin": {"hello": b"hello", "gone": b"gone", "link": "hello"},
        "share": {"doc": {"a": b"a"}, "man": {"b": b"b"}},
        "etc": {"c": b"c"},
    }
    hello = bench.path("hello", tree)
    glibc = bench.path("glibc", GLIBC)
    await bench.nix_layer("one", "", hello, glibc)
    added = {
        "bin": {"mine": b"mine", "gone": None},
        "share": {"doc": [{"only": b"only"}]},
        "etc": {"c": b"changed"},
    }
    await bench.layer("two", "one", {"nix": {"store": {hello.base_name: added}}})
    assert bench.source.realised == [hello]
    merged = {
        "bin": {"hello": b"hello", "link": "hello", "mine": b"mine"},
        "share": {"doc": {"only": b"only"}, "man": {"b": b"b"}},
        "etc": {"c": b"changed"},
    }
    for root in (await bench.run("container", "two"), await bench.show("view", "two")):
        store = store_of(root)
        assert bench.look(store) == {hello.base_name: merged, glibc.base_name: GLIBC}
        file = (store / hello.base_name / "share/man/b").stat()
        directory = (store / hello.base_name / "share/man").stat()
        assert [stat.S_IMODE(one.st_mode) for one in (file, directory)] == [0o444, 0o555]
        assert [file.st_mtime_ns, directory.st_mtime_ns] == [STORE_MTIME_NS] * 2
    # What is then written in a container never reaches the store's inode, which the layer shares.
    root = bench.mounts.mount(await bench.snapshotter.prepare("writer", "two", {}))
    target = store_of(root) / hello.base_name / "bin/hello"
    target.chmod(0o755)
    target.write_bytes(b"overwritten")
    assert (bench.store.location(hello) / "bin/hello").read_bytes() == b"hello"
    # The next layer merges with it by overlayfs alone.
    more = {"nix": {"store": {hello.base_name: {"bin": {"more": b"more", "hello": None}}}}}
    await bench.layer("three", "two", more)
    assert bench.source.realised == [hello]
    merged["bin"] = {"link": "hello", "mine": b"mine", "more": b"more"}
    store = store_of(await bench.run("last", "three"))
    assert bench.look(store) == {hello.base_name: merged, glibc.base_name: GLIBC}
    # The store's files are not counted, but the directories that hold links to them are.
    (base,) = (bench.state / "snapshots").glob("*/base")
    layer = base.with_name("fs")
    counted = [layer, *layer.rglob("*"), base, *filter(Path.is_dir, base.rglob("*"))]
    blocks = sum(path.lstat().st_blocks for path in counted)
    assert await bench.snapshotter.usage("two") == Usage(blocks * 512, len(counted))


async def test_layers_may_be_unpacked_before_their_parents(bench: Bench) -> None:
    """As containerd does where a snapshotter has the capability "rebase"."""
    hello = bench.path("hello", {"bin": {"hello": b"hello"}}, committed=True)
    trees = {
        "one": bench.placeholders(hello),
        "two": {"nix": {"store": {hello.base_name: {"bin": {"mine": b"mine"}}}}},
        "three": {"nix": {"store": {hello.base_name: {"bin": {"hello": None}}}}, "etc": {}},
    }
    for name, tree in reversed(trees.items()):
        mounts = await bench.snapshotter.prepare(f"k8s.io/1/extract-1-x {name}", "", {})
        bench.plant(Path(mounts[0].source), tree)
    parent = ""
    for name in trees:
        await bench.snapshotter.commit(name, f"k8s.io/1/extract-1-x {name}", {}, parent)
        parent = name
    root = await bench.run("container", "three")
    assert bench.look(store_of(root)) == {hello.base_name: {"bin": {"mine": b"mine"}}}
    assert (root / "etc").is_dir()


async def test_adding_to_a_path_that_is_a_file_replaces_it(bench: Bench) -> None:
    config = bench.path("config", CONFIG)
    labels = {
        "containerd.io/snapshot/nix-layer": "true",
        "containerd.io/snapshot/nix-store-path.0": f"/nix/store/{config}",
    }
    await bench.layer("one", "", {}, labels)  # no placeholder: of unknown kind
    await bench.layer("two", "one", {"nix": {"store": {config.base_name: {"x": b"x"}}}})
    assert bench.look(store_of(await bench.run("c", "two"))) == {config.base_name: {"x": b"x"}}


async def test_a_committed_container_that_wrote_into_the_store(bench: Bench) -> None:
    hello = bench.path("hello", HELLO)
    await bench.nix_layer("image", "", hello)
    root = await bench.run("container", "image")
    path = store_of(root) / hello.base_name
    path.chmod(0o755)
    (path / "bin" / "new").write_bytes(b"new")
    (path / "bin" / "hi").unlink()
    expected = {"bin": {"hello": b"#!hello", "new": b"new"}, "share": {"doc": {}}}
    assert bench.look(path) == expected
    bench.mounts.unmount(root)
    await bench.snapshotter.commit("changed", "container", {})
    store = store_of(await bench.run("next", "changed"))
    assert bench.look(store) == {hello.base_name: expected}


# Hostile images


@pytest.mark.parametrize("committed", [False, True], ids=["cold", "warm"])
async def test_an_image_cannot_reach_into_store_paths(bench: Bench, *, committed: bool) -> None:
    hello = bench.path("hello", HELLO, committed=committed)
    config = bench.path("config", CONFIG, committed=committed)
    evil = {
        hello.base_name: {"evil": b"evil", "bin": {"evil": b"evil"}},
        config.base_name: b"evil",
    }
    await bench.layer("one", "", {".fusesnap-store": evil, ".fusesnap-lazy": evil})
    await bench.nix_layer("two", "one", hello, config)
    hostile = {".fusesnap-store": evil, ".fusesnap-lazy": evil, "nix": {"store": {"x": b""}}}
    await bench.layer("three", "two", hostile)
    for root in (await bench.run("container", "three"), await bench.show("view", "three")):
        assert bench.look(store_of(root)) == {
            hello.base_name: HELLO,
            config.base_name: CONFIG,
            "x": b"",
        }
        assert root / ".fusesnap-store" not in root.iterdir()
        with pytest.raises(FileNotFoundError):
            (root / ".fusesnap-store").lstat()


async def test_reserved_names_are_not_reachable(bench: Bench) -> None:
    await bench.nix_layer("image", "", bench.path("hello", HELLO))
    for root in (await bench.run("container", "image"), await bench.show("view", "image")):
        assert list(root.iterdir()) == [root / "nix"]
        for name in (".fusesnap-store", ".fusesnap-lazy"):
            with pytest.raises(FileNotFoundError):
                (root / name).lstat()


async def test_an_images_own_redirect_does_not_reach_the_store(
    bench: Bench, upper: Callable[..., Path]
) -> None:
    hello = bench.path("hello", HELLO, committed=True)
    glibc = bench.path("glibc", GLIBC)
    await bench.nix_layer("one", "", hello, glibc)
    key = "k8s.io/1/extract-1-x two"
    directory = upper(await bench.snapshotter.prepare(key, "one", {}))
    for number, path in enumerate((f".fusesnap-store/{hello}", f".fusesnap-lazy/{glibc}")):
        (directory / f"trap{number}").mkdir()
        os.setxattr(directory / f"trap{number}", "trusted.overlay.redirect", b"/" + path.encode())
    await bench.snapshotter.commit("two", key, {})
    root = await bench.run("container", "two")
    assert bench.look(root / "trap0") == {}
    assert bench.look(root / "trap1") == {}
    assert bench.look(store_of(root)) == {hello.base_name: HELLO, glibc.base_name: GLIBC}


async def test_a_container_cannot_set_a_redirect(bench: Bench) -> None:
    hello = bench.path("hello", HELLO, committed=True)
    await bench.nix_layer("image", "", hello)
    root = await bench.run("container", "image")
    (root / "trap").mkdir()
    try:
        os.setxattr(root / "trap", "trusted.overlay.redirect", f"/.fusesnap-store/{hello}".encode())
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.EOPNOTSUPP)
    assert bench.look(root / "trap") == {}
    bench.mounts.unmount(root)
    await bench.snapshotter.commit("changed", "container", {})
    assert bench.look((await bench.run("next", "changed")) / "trap") == {}
