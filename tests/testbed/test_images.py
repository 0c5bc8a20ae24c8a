"""Images that the test bed makes are images to others, and always the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from testbed.images import (
    Device,
    Directory,
    Entries,
    Entry,
    File,
    HardLink,
    Layer,
    NixLayerManner,
    Pipe,
    nix_layer,
    opaque,
    ordinary_layer,
    whiteout,
    write_image,
)
from testbed.nix_store import Closure, NixStore
from testbed.processes import run

BASE: Entries = {
    "bin/tool": File(b"#!/bin/sh\n", mode=0o755),
    "bin/same": HardLink("bin/tool"),
    "bin/link": "tool",
    "etc/gone": b"x",
    "hidden/below": b"x",
    "tmp": Directory(mode=0o1777),
    "owned": File(b"", uid=7, gid=8, mtime=1_000_000_000, xattrs={"user.note": b"kept"}),
    "null": Device(1, 3, mode=0o666),
    "pipe": Pipe(mode=0o600),
}
CHANGES: Entries = {
    whiteout("etc/gone"): File(),
    opaque("hidden"): File(),
    "hidden/above": b"y",
}


def write(archive: Path) -> Path:
    layers = [ordinary_layer(BASE), ordinary_layer(CHANGES)]
    return write_image(archive, layers, name="sample:latest", command=["/bin/tool"])


def test_whiteouts_are_named_as_the_specification_says() -> None:
    assert whiteout("etc/gone") == "etc/.wh.gone"
    assert whiteout("top") == ".wh.top"
    assert opaque("hidden") == "hidden/.wh..wh..opq"


def test_the_same_description_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def test_skopeo_reads_it(tmp_path: Path) -> None:
    archive = write(tmp_path / "image.tar")
    config = json.loads(run(["skopeo", "inspect", "--config", f"oci-archive:{archive}"]))
    assert config["config"]["Cmd"] == ["/bin/tool"]
    manifest = json.loads(run(["skopeo", "inspect", "--raw", f"oci-archive:{archive}"]))
    assert len(manifest["layers"]) == 2


def test_umoci_unpacks_what_was_described(tmp_path: Path) -> None:
    archive, layout = write(tmp_path / "image.tar"), tmp_path / "layout"
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci-archive:{archive}"]
    run([*command, f"oci:{layout}:latest"])
    run(["umoci", "unpack", "--image", f"{layout}:latest", tmp_path / "bundle"])
    root = tmp_path / "bundle/rootfs"
    assert (root / "bin/tool").samefile(root / "bin/same")
    assert (root / "bin/link").readlink() == Path("tool")
    assert not list((root / "etc").iterdir())
    assert [file.name for file in (root / "hidden").iterdir()] == ["above"]
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    owned = (root / "owned").stat()
    assert (owned.st_uid, owned.st_gid, owned.st_mtime) == (7, 8, 1_000_000_000)
    assert os.getxattr(root / "owned", "user.note") == b"kept"
    assert (root / "null").is_char_device()
    assert (root / "pipe").is_fifo()


PATHS = tuple(f"/nix/store/{letter * 32}-{letter}" for letter in "abcd")


@pytest.fixture
def store(tmp_path: Path) -> NixStore:
    """A store whose paths are a directory, a file, a link to the directory and a link to the file."""
    store = NixStore(tmp_path)
    directory, file, to_directory, to_file = map(store.real, PATHS)
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/tool").touch()
    file.touch()
    to_directory.symlink_to(f"{PATHS[0]}/bin")
    to_file.symlink_to(PATHS[1])
    return store


@pytest.mark.parametrize(
    ("manner", "annotations"),
    [
        (NixLayerManner.CLOSURE, {"containerd.io/snapshot/nix-closure": "/nix/store/list"}),
        (
            NixLayerManner.PATHS,
            {
                "containerd.io/snapshot/nix-layer": "true",
                "containerd.io/snapshot/nix-store-path.0": PATHS[0],
                "containerd.io/snapshot/nix-store-path.1": PATHS[1],
                "containerd.io/snapshot/nix-store-path.2": PATHS[2],
                "containerd.io/snapshot/nix-store-path.3": PATHS[3],
            },
        ),
        (NixLayerManner.PLACEHOLDERS, {}),
    ],
)
def test_a_nix_layer_has_placeholders_and_says_what_they_stand_for(
    store: NixStore, manner: NixLayerManner, annotations: dict[str, str]
) -> None:
    closure = Closure(PATHS[0], PATHS, 0)
    layer = nix_layer(store, closure, manner, list_path="/nix/store/list")
    assert layer.annotations == annotations
    directory, file = Directory(), File(mode=0o555)
    kinds: tuple[Entry, ...] = (directory, file, directory, file)
    placeholders = {path.lstrip("/"): kind for path, kind in zip(PATHS, kinds, strict=True)}
    assert layer == Layer(ordinary_layer(placeholders).tar, annotations)


def test_a_nix_layer_can_link_the_programs_to_the_root(store: NixStore) -> None:
    closure = Closure(PATHS[0], PATHS[:1], 0)
    layer = nix_layer(store, closure, NixLayerManner.PLACEHOLDERS, copy_to_root=True)
    expected: Entries = {PATHS[0].lstrip("/"): Directory(), "bin/tool": f"{PATHS[0]}/bin/tool"}
    assert layer.tar == ordinary_layer(expected).tar


def test_a_nix_layer_that_names_its_list_needs_one(store: NixStore) -> None:
    closure = Closure(PATHS[0], PATHS, 0)
    with pytest.raises(ValueError, match="list_path"):
        nix_layer(store, closure, NixLayerManner.CLOSURE)
