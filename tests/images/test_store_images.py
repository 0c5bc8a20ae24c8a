from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from fusesnap.errors import (
    ClosureUnavailable,
    FusesnapError,
    InvalidArgument,
    InvalidData,
    PathNotFound,
)
from fusesnap.fetch.builder import Builder
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.link import open_link
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Limits, Realiser
from fusesnap.fetch.unpacking import ThreadUnpackers
from fusesnap.images.digest import Digest
from fusesnap.images.platform import Platform
from fusesnap.images.reference import parse_reference
from fusesnap.images.store_images import ImageFetch, StoreImages
from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.memory import MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

from ..store import conftest as made
from ..substituter.samples import KEY, TRUSTED

Publish = Callable[..., StorePath]
MakeImages = Callable[..., StoreImages]
TAR = bytes(10240)
PACKAGE: made.Tree = {"bin": {"hello": (b"#!/bin/sh",)}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: 0.0) as opened:
        yield opened


@pytest.fixture
def cache() -> MemorySubstituter:
    return MemorySubstituter()


@pytest.fixture
def publish(cache: MemorySubstituter) -> Publish:
    """Publishes a tree under a name, signed."""

    def publish(name: str, tree: made.Tree, references: tuple[str, ...] = ()) -> StorePath:
        info, events = made.make_path(name, tree, references)
        signed = replace(info, signatures=(KEY.sign(info.fingerprint()),))
        cache.publish(signed, b"".join(nar_bytes(events)))
        return info.store_path

    return publish


@pytest.fixture
async def make_images(
    store: LocalStore, cache: MemorySubstituter, nursery: trio.Nursery, tmp_path: Path
) -> MakeImages:
    """Makes what opens images, perhaps with a builder."""

    async def at_once(seconds: float) -> None:
        await trio.lowlevel.checkpoint()

    pool = SubstituterPool(
        [cache],
        store_dir=StoreDir(),
        trusted_keys=TRUSTED,
        narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
        retry=RetryPolicy(sleep=at_once),
        deadline=10.0,
    )
    link, unpackers = open_link(nursery), ThreadUnpackers(store)

    def make(builder: Builder | None = None, fetch: ImageFetch | None = None) -> StoreImages:
        realiser = Realiser(
            store,
            pool,
            unpackers,
            link,
            nursery,
            Limits(),
            lambda pid: Reader(pid, "test"),
            builder=builder,
        )
        return StoreImages(store, realiser, Platform("linux", "amd64"), tmp_path, fetch)

    return make


@pytest.fixture
def images(make_images: MakeImages) -> StoreImages:
    return make_images()


async def refusal(
    images: StoreImages, path: StorePath, kind: type[FusesnapError] = InvalidData, **more: Any
) -> str:
    with pytest.raises(kind) as caught:
        async with images.open(path, **more):
            pytest.fail("it was opened")
    return str(caught.value)


async def test_a_reference_is_resolved(images: StoreImages, publish: Publish) -> None:
    path = publish("gtk+3-3.24", b"x")
    for spelling in ("", "-gtk-3-3.24:latest", "-gtk+3-3.24"):
        reference = parse_reference(f"nix:0/nix/store/{path.hash_part}{spelling}", StoreDir())
        assert reference is not None
        assert await images.resolve(reference) == path
    other = parse_reference(f"nix:0/nix/store/{path.hash_part}-gtk-4", StoreDir())
    unknown = parse_reference(f"nix:0/nix/store/{'0' * 32}", StoreDir())
    assert other is not None
    assert unknown is not None
    with pytest.raises(InvalidArgument, match="which is not called 'gtk-4'"):
        await images.resolve(other)
    with pytest.raises(PathNotFound, match="no substituter has it"):
        await images.resolve(unknown)


async def test_an_archive(
    images: StoreImages, publish: Publish, layout: Any, tmp_path: Path
) -> None:
    layout.add(layout.manifest([TAR]))
    path = publish("image.tar", layout.archive(tmp_path / "x.tar").read_bytes())
    async with images.open(path) as image:
        (layer,) = image.image.layers
        assert len(b"".join(image.blob(layer))) == layer.size
        assert image.store_paths == ()


async def test_a_package(images: StoreImages, publish: Publish, cache: MemorySubstituter) -> None:
    libc = publish("libc", {"lib": {}})
    path = publish("hello-2.12", PACKAGE, ("libc",))
    async with images.open(path) as image:
        digest = image.image.manifest.digest
        assert image.store_paths == tuple(sorted([path, libc]))
        config = json.loads(image.image.config.data)
        assert config["config"]["Entrypoint"] == [f"/nix/store/{path}/bin/hello"]
    # Of the closure, narinfos alone.
    assert [name for name in cache.requests if name.startswith("nar/")] == ["nar/hello-2.12.nar"]
    async with images.open(path, digest) as image:
        assert image.image.manifest.digest == digest
    other = Digest.parse(f"sha256:{'0' * 64}")
    said = await refusal(images, path, digest=other)
    assert f"/nix/store/{path}: expected an image with manifest {other}, got {digest}" in said


async def test_a_package_with_a_bin_elsewhere(images: StoreImages, publish: Publish) -> None:
    real = publish("real", PACKAGE)
    path = publish("wrapper", {"bin": f"/nix/store/{real}/bin"}, ("real",))
    async with images.open(path) as image:
        config = json.loads(image.image.config.data)
    assert config["config"]["Entrypoint"] == [f"/nix/store/{path}/bin/hello"]


async def test_nothing_is_kept_from_collection_afterwards(
    images: StoreImages, publish: Publish, store: LocalStore
) -> None:
    publish("libc", {"lib": {}})
    path = publish("hello-2.12", PACKAGE, ("libc",))
    async with images.open(path):
        assert await trio.to_thread.run_sync(lambda: store.collect(None).paths) == ()
        assert store.is_committed(path)
    await trio.to_thread.run_sync(store.collect, None)
    assert not store.is_committed(path)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (b"", "a file that is neither archive nor program"),
        (b"text", "a file that is neither archive nor program"),
        ({"share": {}}, "it is no archive and has no bin"),
        ({"index.json": b"{}"}, "expected an OCI image layout with a file oci-layout"),
        ({"oci-layout": b"{}", "bin": {}}, "oci-layout: imageLayoutVersion: Field required"),
        ({"manifest.json": b"{}"}, "manifest.json: "),
        (b"\x1f\x8b" + bytes(100), "gzip: file is unreadable"),
        (b"BZh" + bytes(100), "bzip2: file is unreadable"),
        (bytes(257) + b"ustar\x0000" + bytes(5000), "damaged tar"),
    ],
)
async def test_what_is_no_image(
    images: StoreImages, publish: Publish, tree: made.Tree, reason: str
) -> None:
    path = publish("thing", tree)
    said = await refusal(images, path)
    assert said.startswith(f"/nix/store/{path}")
    assert reason in said


async def test_a_path_that_no_cache_has(images: StoreImages) -> None:
    path = made.path_named("absent")
    assert "no substituter has it" in await refusal(images, path, PathNotFound)


async def test_a_closure_that_no_cache_has(images: StoreImages, publish: Publish) -> None:
    path = publish("hello", PACKAGE, ("absent",))
    said = await refusal(images, path, ClosureUnavailable)
    assert "absent: no substituter has it" in said


async def test_cancelled_while_an_archive_is_decompressed(
    images: StoreImages, publish: Publish, tmp_path: Path
) -> None:
    path = publish("image.tar.gz", gzip.compress(bytes(64 * 1024 * 1024), 1))
    async with images.open(publish("hello", PACKAGE)):
        pass
    with trio.CancelScope() as scope:
        scope.cancel()
        async with images.open(path):
            pytest.fail("it was opened")
    assert scope.cancelled_caught
    assert os.listdir(tmp_path) == ["state"]


def elf(machine: int, order: bytes = b"\1") -> bytes:
    """The first bytes of an ELF file."""
    numbers = machine.to_bytes(2, "little" if order == b"\1" else "big")
    return b"\x7fELF\2" + order + bytes(12) + numbers + bytes(44)


@pytest.mark.parametrize(
    ("machine", "order", "architecture"),
    [(183, b"\1", "arm64"), (22, b"\2", "s390x"), (243, b"\1", "riscv64")],
)
async def test_a_package_for_another_platform(
    images: StoreImages, publish: Publish, machine: int, order: bytes, architecture: str
) -> None:
    for name, tree in (
        ("hello-1", {"bin": {"hello": (elf(machine, order),)}}),
        ("hello", (elf(machine, order),)),
    ):
        path = publish(name, tree)
        said = await refusal(images, path)
        assert (
            f"expected a package for linux/amd64, its program {name[:5]} is for {architecture}"
            in said
        )


@pytest.mark.parametrize("start", [elf(62), elf(3), elf(4711), b"#!/bin/sh", b"\x7fELF"])
async def test_a_package_that_may_run(images: StoreImages, publish: Publish, start: bytes) -> None:
    path = publish("hello-1", {"bin": {"hello": (start,), "link": "hello"}})
    async with images.open(path) as image:
        assert b"bin/hello" in image.image.config.data


class Elsewhere:
    """Who fetches for this process; what it is asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def expect(self, root: HashPart) -> None:
        self.asked.append(root)

    async def realise(self, path: StorePath, priority: Priority) -> None:
        self.asked.append((path, priority))


async def test_another_process_fetches_where_there_is_one(
    make_images: MakeImages, publish: Publish, cache: MemorySubstituter
) -> None:
    """Before this one looks a reference up: it may be told of more than it asks for."""
    path = publish("hello", {"bin": {"hello": b"#!/bin/sh\n"}})
    elsewhere = Elsewhere()
    images = make_images(fetch=elsewhere)
    reference = parse_reference(f"nix:0/nix/store/{path}", StoreDir())
    assert reference is not None
    assert await images.resolve(reference) == path
    assert not await images.is_image(path)
    assert elsewhere.asked == [HashPart(path.hash_part), (path, Priority.TRACE)]
