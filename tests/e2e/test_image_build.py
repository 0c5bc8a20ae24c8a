"""``fusesnap image build`` without Nix: a few KiB, the same each time, for any snapshotter of Nix images."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey
from testbed.images import (
    NixLayerManner,
    nix_layer,
    ordinary_layer,
    write_build_image,
    write_image,
)
from testbed.nix_store import NixStore
from testbed.processes import CommandFailed
from testbed.synthetic import SimpleClosure

from fusesnap.images.opening import open_image
from fusesnap.images.platform import Platform

from .commands import fusesnap
from .conftest import Node

FUSESNAP = Path(sys.executable).with_name("fusesnap")


def build(state: Path, caches: str, key: SigningKey, *arguments: str | Path) -> str:
    """Run ``fusesnap image build``; returns what it says on both streams. Raises CommandFailed."""
    options = ["--state", state, "-s", caches, "--trusted-public-key", key.public]
    return fusesnap("image", "build", *arguments, *options)


def parts(archive: Path) -> tuple[Any, Any, dict[str, tuple[bytes, int, str]]]:
    """An image's manifest, configuration, and the entries of its topmost layer: type, mode and target by name."""
    machine = Platform.of_machine(os.uname().machine)
    with open_image(archive, str(archive), machine, archive.parent) as image:
        packed = b"".join(image.blob(image.image.layers[-1]))
        documents = [json.loads(each.data) for each in (image.image.manifest, image.image.config)]
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        entries = {each.name: (each.type, each.mode, each.linkname) for each in tar}
    return documents[0], documents[1], entries


def test_the_same_bytes_each_time_and_what_nix_snapshotter_would_have_made(
    work: Path,
    cache: HttpCache,
    simple: SimpleClosure,
    key: SigningKey,
    cache_files: CacheFiles,
    nix_store: NixStore,
) -> None:
    options = ["--tag", "registry.example/simple:1", "--entrypoint", "/x", "-e", "A=ä"]
    build(work / "a", cache.url, key, simple.root, "-o", work / "a.tar", *options)
    # A link to a directory within a path: what it is, that path says.
    fetched = [path.name for path in (work / "a/layer/.fusesnap-store").iterdir()]
    assert fetched == [Path(simple.tree).name]
    received = sum(request.size for request in cache.requests())
    assert received < cache_files.compressed_size(simple.closure.paths) / 4
    caches = ["-s", f"file://{cache_files.directory}", "--trusted-public-key", key.public]
    again = [
        simple.root,
        *options,
        "--realise",
        "-o",
        str(work / "b.tar"),
        "--state",
        str(work / "b"),
    ]
    subprocess.run(
        [FUSESNAP, "image", "build", *again, *caches],
        env={
            **os.environ,
            "LC_ALL": "C",
            "TZ": "Pacific/Kiritimati",
            "HOME": "/nowhere",
        },
        umask=0o077,
        check=True,
    )
    data = (work / "a.tar").read_bytes()
    assert data == (work / "b.tar").read_bytes()
    assert len(data) < 16 * 1024
    layer = nix_layer(nix_store, simple.closure, NixLayerManner.PATHS)
    theirs = write_image(work / "theirs.tar", [layer], name="x:1")
    manifest, _, entries = parts(work / "a.tar")
    expected_manifest, _, expected_entries = parts(theirs)
    annotations = manifest["layers"][0]["annotations"]
    expected = expected_manifest["layers"][0]["annotations"]
    assert sorted(annotations.values()) == sorted(expected.values())
    assert annotations.keys() == expected.keys()
    assert entries == expected_entries


def test_they_run(
    node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    key: SigningKey,
    work: Path,
    nix_store: NixStore,
) -> None:
    """An image of a package, one on a base image with compressed layers, and one of nix-snapshotter's own."""
    said = build(
        work / "b", cache.url, key, simple.script, "-o", work / "a.tar", "-t", "x.example/s:1"
    )
    assert "store paths in a layer of" in said
    own = node.containerd.import_archive(work / "a.tar")
    assert own == "x.example/s:1"
    assert node.containerd.run(own, "one") == "hello from a store path\n"

    base = write_image(
        work / "base.tar",
        [ordinary_layer({"etc/motd": b"from the base\n"})],
        name="base:1",
        environment={"PATH": "/bin", "MOTD": "/etc/motd"},
    )
    (work / "base.tar.gz").write_bytes(gzip.compress(base.read_bytes()))
    shell = f"{simple.root}/bin/sh"
    options = ["--from", f"{work}/base.tar.gz", "--entrypoint", shell, "-t", "x.example/b:1"]
    options += ["--copy-to-root", simple.busybox]
    build(work / "b", cache.url, key, simple.root, *options, "-o", work / "b.tar")
    based = node.containerd.import_archive(work / "b.tar")
    command = ["sh", "-c", "/bin/cat $MOTD; echo $PATH"]
    assert node.containerd.run(based, "two", *command) == (
        f"from the base\n{simple.root}/bin:/bin\n"
    )

    theirs = write_build_image(
        work / "c.tar",
        nix_store,
        simple.closure,
        name="docker.io/library/simple:latest",
        entrypoint=["/bin/cat", simple.text],
    )
    parts(theirs)  # and we read it
    reference = node.containerd.import_archive(theirs)
    assert node.containerd.run(reference, "three") == "a text that is its own address\n"


def test_what_it_says_of_a_package_without_a_main_program_and_of_what_cannot_be_built(
    work: Path, cache: HttpCache, simple: SimpleClosure, key: SigningKey, list_path: str
) -> None:
    said = build(work / "s", cache.url, key, simple.root, "-o", work / "a.tar")
    assert "note: no entrypoint: simple has " in said
    assert "none of them is called simple" in said
    assert "Entrypoint" not in parts(work / "a.tar")[1]["config"]

    options = ["--closure-list", list_path, "--json", "-o", str(work / "c.tar")]
    built = json.loads(build(work / "s", cache.url, key, simple.root, *options))
    assert built["paths"] == len(simple.closure.paths)
    assert "none of them is called simple" in built["remark"]
    annotations = parts(work / "c.tar")[0]["layers"][0]["annotations"]
    assert annotations["containerd.io/snapshot/nix-closure"] == list_path
    for arguments, reason in (
        ([f"/nix/store/{'0' * 32}-absent"], "no substituter has it"),
        ([simple.root, "--copy-to-root", simple.script], "expected a directory"),
        ([simple.root, "--closure-list", simple.script], "store-paths"),
    ):
        with pytest.raises(CommandFailed) as caught:
            build(work / "s", cache.url, key, *arguments, "-o", work / "b.tar")
        assert reason in str(caught.value)
        assert not (work / "b.tar").exists()
