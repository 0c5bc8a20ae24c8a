"""Which layers are Nix layers, and what becomes of those whose store paths cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import (
    ClosureUnavailable,
    FusesnapError,
    InvalidArgument,
    NotFound,
    PathNotFound,
    Unavailable,
)
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Kind
from fusesnap.snapshots.layer_content import Found, LayerContent
from fusesnap.snapshots.recognition import recognise
from fusesnap.snapshots.records import PathKind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from tests.snapshots.conftest import Bench

TREE = {"bin": {"tool": b"tool"}}
PREFIX = "containerd.io/snapshot/"
MARK = {f"{PREFIX}nix-layer": "true"}


def numbered(*paths: StorePath) -> dict[str, str]:
    return MARK | {f"{PREFIX}nix-store-path.{i}": f"/nix/store/{p}" for i, p in enumerate(paths)}


def closure_label(path: StorePath) -> dict[str, str]:
    return {f"{PREFIX}nix-closure": f"/nix/store/{path}"}


def listing(*paths: StorePath) -> bytes:
    return "".join(f"/nix/store/{path}\n" for path in paths).encode()


async def kinds(bench: Bench, name: str) -> dict[StorePath, PathKind]:
    with bench.metastore.reading() as transaction:
        return dict(transaction.chain(name).paths)


async def shown(bench: Bench, name: str) -> Any:
    return bench.look(await bench.run(f"container of {name}", name) / "nix" / "store")


# By labels


async def test_numbered_labels(bench: Bench) -> None:
    tool, config = bench.path("tool", TREE), bench.path("config", b"x", committed=True)
    unknown = bench.path("unknown", TREE)
    tree = bench.placeholders(tool, config) | {"bin": {"sh": f"/nix/store/{tool}/bin/tool"}}
    await bench.layer("image", "", tree, numbered(tool, config, unknown))
    assert await kinds(bench, "image") == {
        tool: PathKind.DIRECTORY,
        config: PathKind.FILE,
        unknown: PathKind.UNKNOWN,
    }
    assert set(bench.source.admitted) == {tool, unknown}
    root = await bench.run("container", "image")
    assert (root / "bin" / "sh").readlink() == (root / f"/nix/store/{tool}/bin/tool")
    assert await shown(bench, "image") == {
        tool.base_name: TREE,
        config.base_name: b"x",
        unknown.base_name: TREE,
    }
    assert unknown in bench.source.prefetched  # its kind is known once it is here


async def test_closure_label(bench: Bench) -> None:
    tool, config = bench.path("tool", TREE), bench.path("config", b"x")
    closure = bench.path("closure", {"store-paths": listing(tool, config)})
    both = closure_label(closure) | numbered(bench.path("other", TREE))
    await bench.layer("image", "", {}, both)
    assert bench.source.expected == bench.source.realised == [closure]
    assert set(await kinds(bench, "image")) == {tool, config}
    assert await shown(bench, "image") == {tool.base_name: TREE, config.base_name: b"x"}


async def test_labels_may_come_at_commit_only(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    await bench.snapshotter.prepare("key", "", {})
    await bench.snapshotter.commit("image", "key", numbered(tool))
    assert set(await kinds(bench, "image")) == {tool}


async def test_labels_may_come_at_prepare_only(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    await bench.snapshotter.prepare("key", "", numbered(tool))
    assert bench.source.admitted == [tool]  # before the layer is fetched
    await bench.snapshotter.commit("image", "key", {})
    assert set(await kinds(bench, "image")) == {tool}


async def test_labels_win_over_content(bench: Bench) -> None:
    tool, other = bench.path("tool", TREE), bench.path("other", TREE)
    await bench.layer("image", "", bench.placeholders(tool, other), numbered(tool))
    assert set(await kinds(bench, "image")) == {tool}


async def test_a_mark_without_paths_leaves_it_to_the_content(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    await bench.layer("image", "", bench.placeholders(tool), MARK)
    assert set(await kinds(bench, "image")) == {tool}


GOOD = f"/nix/store/{'0' * 32}-good"


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("nix-store-path.0", f"{GOOD}/bin"),
        ("nix-store-path.0", f"/gnu/store/{'0' * 32}-x"),
        ("nix-store-path.0", f"/nix/store/../store/{'0' * 32}-x"),
        ("nix-store-path.0", f"{GOOD}\n"),
        ("nix-store-path.x", GOOD),
        ("nix-closure", "/etc"),
        ("nix-closure", f"{GOOD}/store-paths"),
        ("nix-layer", "yes"),
    ],
)
async def test_bad_labels_are_refused(bench: Bench, label: str, value: str) -> None:
    labels = MARK | {PREFIX + label: value}
    with pytest.raises(InvalidArgument) as caught:
        await bench.snapshotter.prepare("key", "", labels)
    assert label in str(caught.value)
    assert repr(value)[1:-1] in str(caught.value)
    with pytest.raises(NotFound):
        await bench.snapshotter.stat("key")
    await bench.snapshotter.prepare("key", "", {})
    with pytest.raises(InvalidArgument):
        await bench.snapshotter.commit("name", "key", labels)
    assert (await bench.snapshotter.stat("key")).kind is Kind.ACTIVE


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({}, "expected a file store-paths in it: No such file"),
        (b"a file", "expected a file store-paths in it: Not a directory"),
        ({"store-paths": {}}, "store-paths is not a regular file"),
        ({"store-paths": "/etc/passwd"}, "expected a file store-paths in it: Too many levels"),
        ({"store-paths": b""}, "lists no store path"),
        ({"store-paths": b"/etc/passwd\n"}, "store-paths line 1: .*'/etc/passwd'"),
        ({"store-paths": GOOD.encode() + b"/bin\n"}, "line 1"),
        ({"store-paths": b"\n"}, "line 1"),
        ({"store-paths": bytes(40 << 20)}, "has 41943040 bytes, expected at most"),
    ],
)
async def test_bad_closures_are_refused(bench: Bench, tree: Any, complaint: str) -> None:
    closure = bench.path("closure", tree, committed=True)
    with pytest.raises(InvalidArgument, match=complaint) as caught:
        await bench.layer("image", "", {}, closure_label(closure))
    assert f"/nix/store/{closure}" in str(caught.value)


# By content


async def test_content_alone(bench: Bench) -> None:
    tool, config = bench.path("tool", TREE), bench.path("config", b"x")
    links = {"bin": {"tool": f"/nix/store/{tool}/bin/tool"}, "etc": {"x": b"x"}}
    await bench.layer("image", "", bench.placeholders(tool, config) | links)
    assert await kinds(bench, "image") == {tool: PathKind.DIRECTORY, config: PathKind.FILE}


async def test_a_layer_that_changes_an_images_own_store_paths_is_ordinary(bench: Bench) -> None:
    """``RUN chmod`` on a store path of an image that carries it leaves an empty directory of that name in a layer."""
    tool = bench.path("tool", TREE)
    await bench.layer("image", "", {"nix": {"store": {tool.base_name: TREE}}})
    await bench.layer("changed", "image", {"nix": {"store": {tool.base_name: {}}}})
    assert not await kinds(bench, "changed")


async def test_recognition_by_content_can_be_off(bench: Bench) -> None:
    bench.close()
    bench.open(by_content=False)
    tool = bench.path("tool", TREE)
    await bench.nix_layer("plain", "", tool)
    assert not await kinds(bench, "plain")
    await bench.layer("labelled", "", {}, numbered(tool))
    assert set(await kinds(bench, "labelled")) == {tool}


@pytest.mark.parametrize(
    "more",
    [
        {"not-a-store-path": {}},
        {".links": {}},
        {f"{'0' * 32}-full": {"bin": {}}},
        {f"{'0' * 32}-full": b"content"},
        {f"{'0' * 32}-link": "target"},
        {f"{'0' * 32}-gone": None},
        {f"{'e' * 32}-not-nix32": {}},
    ],
    ids=str,
)
async def test_ordinary_layers(bench: Bench, more: dict[str, Any]) -> None:
    tool = bench.path("tool", TREE)
    tree = bench.placeholders(tool)
    tree["nix"]["store"] |= more
    await bench.layer("image", "", tree)
    assert not await kinds(bench, "image")
    assert not bench.source.admitted


@pytest.mark.parametrize(
    "tree", [{}, {"nix": {}}, {"nix": {"store": {}}}, {"nix": {"store": [{}]}}]
)
async def test_layers_without_placeholders(bench: Bench, tree: dict[str, Any]) -> None:
    await bench.layer("image", "", tree)
    assert not await kinds(bench, "image")


async def test_links_in_a_layer_are_not_followed(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    outside = bench.state / "outside"
    bench.plant(outside, {"store": {tool.base_name: {}}})
    await bench.layer("one", "", {"nix": str(outside)})
    await bench.layer("two", "", {"nix": {"store": str(outside / "store")}})
    assert not await kinds(bench, "one")
    assert not await kinds(bench, "two")
    glibc = bench.path("glibc", TREE)
    await bench.nix_layer("three", "one", glibc)
    assert await shown(bench, "three") == {glibc.base_name: TREE}


# A pull never lies


async def test_a_closure_that_cannot_be_had_fails_the_pull(bench: Bench) -> None:
    tool, lost = bench.path("tool", TREE), bench.path("lost", TREE)
    del bench.source.contents[lost]
    tree: Any = {"nix": {"store": {tool.base_name: {}, lost.base_name: {}}}}
    with pytest.raises(ClosureUnavailable, match=f"{lost}: no cache has it") as caught:
        await bench.layer("image", "", tree)
    assert not caught.value.retryable
    with pytest.raises(NotFound):
        await bench.snapshotter.stat("image")
    with pytest.raises(ClosureUnavailable):
        await bench.layer("labelled", "", {}, numbered(tool, lost), key="labelled key")
    with pytest.raises(NotFound):  # labels are looked at before there is a snapshot
        await bench.snapshotter.stat("labelled key")
    # The client gives up as containerd's unpacker does, and the same pull succeeds later.
    await bench.snapshotter.remove("k8s.io/1/extract-1-x image")
    bench.source.contents[lost] = TREE
    await bench.nix_layer("image", "", tool, lost)
    assert await shown(bench, "image") == {tool.base_name: TREE, lost.base_name: TREE}


async def test_commit_can_be_asked_again(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    bench.source.failures[tool] = Unavailable("no route to the cache")
    with pytest.raises(ClosureUnavailable, match="no route") as caught:
        await bench.layer("image", "", bench.placeholders(tool), key="key")
    assert caught.value.retryable
    bench.source.failures.clear()
    await bench.snapshotter.commit("image", "key", {})
    assert set(await kinds(bench, "image")) == {tool}


@pytest.mark.parametrize("error", [Unavailable("away"), PathNotFound("nowhere")])
async def test_a_closure_path_that_cannot_be_had(bench: Bench, error: FusesnapError) -> None:
    closure = bench.path("closure", {"store-paths": listing(bench.path("tool", TREE))})
    bench.source.failures[closure] = error
    with pytest.raises(type(error), match=str(error)):
        await bench.snapshotter.prepare("key", "", closure_label(closure))


async def test_adding_to_a_path_that_cannot_be_had(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    await bench.nix_layer("one", "", tool)
    bench.source.failures[tool] = Unavailable("away")
    tree: Any = {"nix": {"store": {tool.base_name: {"more": b""}}}}
    with pytest.raises(ClosureUnavailable, match="away"):
        await bench.layer("two", "one", tree, key="key")
    assert (await bench.snapshotter.stat("key")).kind is Kind.ACTIVE
    bench.source.failures.clear()
    await bench.snapshotter.commit("two", "key", {})
    assert await shown(bench, "two") == {tool.base_name: TREE | {"more": b""}}


async def test_without_a_lazy_layer_a_failure_names_every_path(bench: Bench) -> None:
    bench.close()
    bench.open(lazy=False)
    paths = [bench.path(name, TREE) for name in ("a", "b", "c")]
    await bench.nix_layer("image", "", *paths)
    for path in paths[:2]:
        bench.source.failures[path] = Unavailable(f"{path} is away")
    with pytest.raises(ClosureUnavailable) as caught:
        await bench.snapshotter.prepare("container", "image", {})
    assert all(f"{path} is away" in str(caught.value) for path in paths[:2])
    with pytest.raises(NotFound):
        await bench.snapshotter.stat("container")


async def test_waiting_for_paths_can_be_cancelled(bench: Bench) -> None:
    tool = bench.path("tool", TREE)
    reached = trio.Event()

    async def admit(
        paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        reached.set()
        await trio.sleep_forever()
        return {}

    bench.source.admit = admit  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.layer, "image", "", bench.placeholders(tool), {}, "key")
        await reached.wait()
        nursery.cancel_scope.cancel()
    assert (await bench.snapshotter.stat("key")).kind is Kind.ACTIVE


# The rules, for any layer above any chain

STORE_PATHS = [StorePath("0" * 31 + digit, "x") for digit in "0123"]
CHAINS = st.dictionaries(st.sampled_from(STORE_PATHS), st.sampled_from(PathKind))
CONTENTS = st.builds(
    LayerContent,
    st.booleans(),
    st.dictionaries(
        st.sampled_from([*(path.base_name for path in STORE_PATHS), "other"]),
        st.sampled_from(Found),
    ),
)


@given(CONTENTS, st.lists(st.sampled_from(STORE_PATHS)), CHAINS, st.booleans())
def test_rules(
    content: LayerContent,
    labelled: list[StorePath],
    below: dict[StorePath, PathKind],
    by_content: bool,
) -> None:
    found = recognise(content, labelled, below, by_content=by_content)
    parts = [set(found.paths), found.hidden, found.added_to]
    assert sum(map(len, parts)) == len(set().union(*parts))  # no path is two things
    assert found.hidden | found.added_to <= below.keys()
    if labelled:
        assert set(found.paths) == set(labelled)
    elif not by_content:
        assert not found.paths
    for path in below.keys() - found.paths.keys():
        entry = content.entries.get(path.base_name)
        if content.hides_below or entry in (Found.WHITEOUT, Found.FILE, Found.OPAQUE_DIRECTORY):
            assert path in found.hidden
        elif entry is None:
            assert path not in found.hidden | found.added_to
        elif entry is Found.DIRECTORY:
            assert path in found.hidden | found.added_to
