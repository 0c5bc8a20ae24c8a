from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from fusesnap.daemon.build import leaves
from fusesnap.errors import ContentMismatch, InvalidConfiguration, PathNotFound, Unavailable
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.nar_index import parse_nar_index
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trust import check_trust
from fusesnap.publish.destination import Destination, DirectoryDestination, Kind
from fusesnap.publish.packing import Packer
from fusesnap.publish.publisher import Published, Publisher
from fusesnap.publish.source import StoreSource, closure_of, infos_of

from ..substituter.samples import KEY, TRUSTED, secret_key
from .conftest import LEAF, LIBRARY, TOP

Make = Callable[[Destination], Publisher]


def narinfo_in(directory: Path, path: StorePath) -> NarInfo:
    return parse_narinfo((directory / f"{path.hash_part}.narinfo").read_bytes(), StoreDir())


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Watched:
    """A destination that looks, at each step, whether a reader finds whatever it is told of; and that can fail."""

    def __init__(self, inner: DirectoryDestination, directory: Path, fails_after: int = -1) -> None:
        self._inner = inner
        self._directory = directory
        self._left = fails_after
        self.put_names: list[str] = []

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def spool(self) -> Path:
        return self._inner.spool

    async def size(self, name: str) -> int | None:
        return await self._inner.size(name)

    def read(self, name: str) -> AsyncGenerator[bytes]:
        return self._inner.read(name)

    async def put(self, name: str, file: Path, kind: Kind) -> None:
        self._step(name)
        await self._inner.put(name, file, kind)
        self._look()

    async def put_bytes(self, name: str, data: bytes, kind: Kind) -> None:
        self._step(name)
        await self._inner.put_bytes(name, data, kind)
        self._look()

    async def names(self, directory: str = "") -> Iterable[str] | None:
        return await self._inner.names(directory)

    def _step(self, name: str) -> None:
        if self._left == 0:
            raise Unavailable(f"{name}: the disk went away")
        self._left -= 1
        self.put_names.append(name)

    def _look(self) -> None:
        for file in self._directory.glob("*.narinfo"):
            info = parse_narinfo(file.read_bytes(), StoreDir())
            reference = IndexReference.of(info)
            assert reference is not None
            assert (self._directory / info.url).exists()
            assert (self._directory / reference.url).exists()
            for path in info.references:
                assert (self._directory / f"{path.hash_part}.narinfo").exists()


async def test_a_closure_becomes_a_cache(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    told: list[Published] = []
    infos = await closure_of(source, [TOP])
    assert [info.store_path for info in infos] == [LEAF, LIBRARY, TOP]
    results = await make_publisher(Watched(destination, directory)).publish(infos, told.append)
    assert sorted(told, key=str) == sorted(results, key=str)
    assert (directory / "nix-cache-info").read_text() == (
        "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
    )
    for info in infos:
        found = narinfo_in(directory, info.store_path)
        check_trust(found, TRUSTED)
        reference = IndexReference.of(found)
        assert reference is not None
        data = (directory / reference.url).read_bytes()
        assert (len(data), KEY.name) == (reference.size, reference.key_name)
        index = parse_nar_index(data, TRUSTED, StoreDir())
        index.check_matches(found)
        listing = json.loads((directory / f"{info.store_path.hash_part}.ls").read_bytes())
        assert listing["version"] == 1
    assert not [name for name in files_of(directory) if name.startswith(".fusesnap-publish-")]


async def test_what_is_there_is_neither_made_nor_written_again(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    infos = await closure_of(source, [TOP])
    await make_publisher(destination).publish(infos)
    before = files_of(directory)
    watched = Watched(destination, directory)
    results = await make_publisher(watched).publish(infos)
    assert [result.kept for result in results] == [True, True, True]
    assert watched.put_names == []
    assert files_of(directory) == before


async def test_interrupted_anywhere_it_goes_on_and_sends_nothing_twice(
    source: StoreSource, make_publisher: Make, tmp_path: Path
) -> None:
    infos = await closure_of(source, [TOP])
    whole = DirectoryDestination(tmp_path / "whole")
    await make_publisher(whole).publish(infos)
    expected = files_of(tmp_path / "whole")
    for steps in range(len(expected)):
        directory = tmp_path / f"broken-{steps}"
        first = Watched(DirectoryDestination(directory), directory, steps)
        with pytest.raises((BaseExceptionGroup, Unavailable)) as caught:
            await make_publisher(first).publish(infos)
        assert any(isinstance(error, Unavailable) for error in leaves(caught.value))
        second = Watched(DirectoryDestination(directory), directory)
        await make_publisher(second).publish(infos)
        assert files_of(directory) == expected
        twice = set(first.put_names) & set(second.put_names)
        assert all(name.endswith(".ls") for name in twice)  # they are too small to ask for


async def test_signatures_of_the_source_and_of_the_cache_are_kept(
    source: StoreSource, packer: Packer, destination: DirectoryDestination, directory: Path
) -> None:
    (info,) = await infos_of(source, [LEAF])
    upstream = secret_key("upstream-1").sign(info.fingerprint())
    signed = replace(info, signatures=(upstream,))
    for name in ("first-1", "second-1"):
        publisher = Publisher(
            source, destination, packer, secret_key(name), StoreDir(), priority=40
        )
        (result,) = await publisher.publish([signed])
        assert not result.kept
    found = narinfo_in(directory, LEAF)
    assert [s.key_name for s in found.signatures] == ["upstream-1", "first-1", "second-1"]
    reference = IndexReference.of(found)
    assert reference is not None
    assert reference.key_name == "second-1"


async def test_a_path_of_a_stock_cache_gets_its_index(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    (info,) = await infos_of(source, [LEAF])
    stock = replace(info, url="nar/x.nar.xz", signatures=(KEY.sign(info.fingerprint()),))
    (directory / f"{LEAF.hash_part}.narinfo").write_text(stock.to_text())
    (result,) = await make_publisher(destination).publish([info])
    assert not result.kept
    assert IndexReference.of(narinfo_in(directory, LEAF)) is not None


async def test_another_nar_of_the_path_is_not_replaced(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    (info,) = await infos_of(source, [LEAF])
    other = replace(info, nar_hash=Hash(HashAlgorithm.SHA256, bytes(32)))
    (directory / f"{LEAF.hash_part}.narinfo").write_text(other.to_text())
    with pytest.raises(BaseExceptionGroup) as caught:
        await make_publisher(destination).publish([info])
    (error,) = leaves(caught.value)
    assert isinstance(error, ContentMismatch)
    assert "remove its narinfo from the cache to replace it" in str(error)


async def test_a_narinfo_that_cannot_be_read_is_written_anew(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    (directory / f"{LEAF.hash_part}.narinfo").write_text("StorePath: cut sh")
    infos = await infos_of(source, [LEAF])
    (result,) = await make_publisher(destination).publish(infos)
    assert not result.kept
    assert narinfo_in(directory, LEAF).nar_hash == infos[0].nar_hash


async def test_what_the_source_has_by_now_is_held_against_its_database(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    (info,) = await infos_of(source, [LEAF])
    wrong = replace(info, nar_hash=Hash(HashAlgorithm.SHA256, bytes(32)))
    with pytest.raises(BaseExceptionGroup) as caught:
        await make_publisher(destination).publish([wrong])
    assert "the source is damaged" in str(next(leaves(caught.value)))
    assert set(files_of(directory)) == {"nix-cache-info"}


async def test_a_cache_of_another_store_directory_is_left_alone(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination, directory: Path
) -> None:
    (directory / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    with pytest.raises(InvalidConfiguration, match="its store directory is /gnu/store"):
        await make_publisher(destination).publish([])


async def test_a_path_that_is_not_there_is_named(source: StoreSource) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await infos_of(source, [StorePath("0" * 32, "nowhere")])
    (error,) = leaves(caught.value)
    assert isinstance(error, PathNotFound)
    assert "-nowhere: not valid in" in str(error)
