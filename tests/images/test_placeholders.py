from __future__ import annotations

import io
import tarfile

import pytest

from fusesnap.errors import InvalidArgument
from fusesnap.fetch.kinds import Root
from fusesnap.images.layer import FileKind
from fusesnap.images.links import Links
from fusesnap.images.placeholders import nix_layer_tar, placeholder_kinds
from fusesnap.nix.nar import NarEnd
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Tree, TreeBuilder

from ..store import conftest as made

STORE = StoreDir()


def path(name: str) -> StorePath:
    return made.path_named(name)


def full(name: str) -> str:
    return STORE.format(path(name))


def tree(content: made.Tree) -> Tree:
    builder = TreeBuilder()
    for event in (*made.tree_events(content), NarEnd()):
        builder.receive(event)
    return builder.tree()


async def test_links_have_the_placeholder_of_what_they_lead_to() -> None:
    trees: dict[str, made.Tree] = {
        "directory": {"sub": {}, "file": b""},
        "file": b"x",
        "to-directory": full("directory"),
        "to-link": full("to-directory"),
        "to-sub": f"../store/{path('directory')}/sub",
        "to-inner-file": f"{full('directory')}/file",
        "to-file": path("file").base_name,
        "to-nowhere": "/etc",
        "round-1": full("round-2"),
        "round-2": full("round-1"),
    }

    async def tree_of(wanted: StorePath) -> Tree:
        return tree(trees[wanted.name])

    roots = {
        path(name): Root(tree(content).kind(0), tree(content).link_target(0))
        for name, content in trees.items()
    }
    kinds = await placeholder_kinds(roots, Links(roots.keys(), tree_of, STORE))
    directories = {found.name for found, kind in kinds.items() if kind is FileKind.DIRECTORY}
    assert directories == {"directory", "to-directory", "to-link", "to-sub"}
    assert set(kinds.values()) == {FileKind.DIRECTORY, FileKind.REGULAR}


def test_what_is_copied_to_the_root_is_linked() -> None:
    copied = {
        path("one"): tree({"bin": {"a": (b"",), "b": "a"}, "etc": {"x": b""}}),
        path("two"): tree({"bin": {"c": (b"",)}}),
    }
    kinds = dict.fromkeys(copied, FileKind.DIRECTORY)
    with tarfile.open(fileobj=io.BytesIO(nix_layer_tar(kinds, copied, STORE))) as tar:
        found = {each.name: each.linkname if each.issym() else each.mode for each in tar}
        order = tar.getnames()
    placeholders = {full(name).lstrip("/"): 0o755 for name in ("one", "two")}
    assert found == {
        "bin": 0o755,
        "bin/a": f"{full('one')}/bin/a",
        "bin/b": f"{full('one')}/bin/b",
        "bin/c": f"{full('two')}/bin/c",
        "etc": 0o755,
        "etc/x": f"{full('one')}/etc/x",
        "nix": 0o755,
        "nix/store": 0o755,
        **placeholders,
    }
    assert all(
        order.index(name) > order.index(name.rpartition("/")[0]) for name in order if "/" in name
    )


@pytest.mark.parametrize(
    ("trees", "reason"),
    [
        (({"bin": {"a": b""}}, {"bin": {"a": b""}}), "'bin/a' is there already, from /nix/store/"),
        (({"bin": {"a": b""}}, {"bin": b""}), "'bin' is there already, from /nix/store/"),
        (({"nix": b""},), "'nix' is there already, where store paths are"),
        (({"nix": {"store": {"x": b""}}},), "it has 'nix/store/x'"),
        ((b"file",), "expected a directory"),
    ],
)
def test_what_cannot_be_copied_to_the_root(trees: tuple[made.Tree, ...], reason: str) -> None:
    copied = {path(f"p{number}"): tree(content) for number, content in enumerate(trees)}
    kinds = dict.fromkeys(copied, FileKind.DIRECTORY)
    with pytest.raises(InvalidArgument) as caught:
        nix_layer_tar(kinds, copied, STORE)
    assert reason in str(caught.value)
