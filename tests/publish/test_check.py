from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir
from fusesnap.publish.check import Checked, Checker
from fusesnap.publish.destination import Destination, DirectoryDestination
from fusesnap.publish.publisher import Publisher
from fusesnap.publish.source import StoreSource, closure_of

from ..substituter.samples import TRUSTED, secret_key
from .conftest import LEAF, LIBRARY, TOP


@pytest.fixture
async def cache(
    source: StoreSource,
    make_publisher: Callable[[Destination], Publisher],
    destination: DirectoryDestination,
    directory: Path,
) -> Path:
    await make_publisher(destination).publish(await closure_of(source, [TOP]))
    return directory


def narinfo_file(cache: Path) -> Path:
    return cache / f"{LIBRARY.hash_part}.narinfo"


def library(cache: Path) -> NarInfo:
    return parse_narinfo(narinfo_file(cache).read_bytes(), StoreDir())


def index_file(cache: Path) -> Path:
    reference = IndexReference.of(library(cache))
    assert reference is not None
    return cache / reference.url


async def check(cache: Path, keys: TrustedKeys = TRUSTED) -> dict[str, Checked]:
    destination = DirectoryDestination(cache)
    names = await destination.names()
    assert names is not None
    narinfos = [name for name in names if name.endswith(".narinfo")]
    results = await Checker(destination, keys, StoreDir()).check(narinfos)
    return {result.name: result for result in results}


async def faults_of_library(cache: Path) -> str:
    results = await check(cache)
    others = [result for name, result in results.items() if name != narinfo_file(cache).name]
    assert not any(result.faults for result in others)
    return "; ".join(results[narinfo_file(cache).name].faults)


async def test_what_was_published_is_well(cache: Path) -> None:
    results = await check(cache)
    assert {result.store_path for result in results.values()} == {LEAF, LIBRARY, TOP}
    assert all(result.indexed and not result.faults for result in results.values())
    assert not any(result.missing for result in results.values())


async def test_references_that_are_elsewhere_are_told(cache: Path) -> None:
    (cache / f"{LEAF.hash_part}.narinfo").unlink()
    results = await check(cache)
    assert results[narinfo_file(cache).name].missing == (LEAF,)
    assert not any(result.faults for result in results.values())


async def test_a_key_that_readers_do_not_have_is_told(cache: Path) -> None:
    results = await check(cache, TrustedKeys((secret_key("other-1").public_key(),)))
    for result in results.values():
        said = "; ".join(result.faults)
        assert "it is only signed by 'key-1', not trusted" in said
        assert "index is signed by 'key-1', not trusted" in said


async def test_a_path_without_an_index_is_well(cache: Path) -> None:
    lines = narinfo_file(cache).read_text().splitlines(keepends=True)
    narinfo_file(cache).write_text("".join(x for x in lines if not x.startswith("NarIndex")))
    result = (await check(cache))[narinfo_file(cache).name]
    assert (result.faults, result.indexed) == ((), False)


@pytest.mark.parametrize("place", [random.Random(5).random() for _ in range(24)])  # noqa: S311
async def test_any_flipped_bit_of_a_nar_is_found(cache: Path, place: float) -> None:
    file = cache / library(cache).url
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0x10
    file.write_bytes(data)
    assert await faults_of_library(cache)


@pytest.mark.parametrize("place", [random.Random(6).random() for _ in range(24)])  # noqa: S311
async def test_any_flipped_bit_of_an_index_is_found(cache: Path, place: float) -> None:
    data = bytearray(index_file(cache).read_bytes())
    data[int(place * len(data))] ^= 0x10
    index_file(cache).write_bytes(data)
    assert "index" in await faults_of_library(cache)


async def test_files_that_are_gone_are_named(cache: Path) -> None:
    index, nar = index_file(cache), cache / library(cache).url
    index.unlink()
    assert await faults_of_library(cache) == f"nar/{index.name} is not there"
    nar.unlink()
    said = await faults_of_library(cache)
    assert f"nar/{index.name} is not there" in said
    assert f"{nar}: not found" in said


async def test_an_index_of_another_path_is_found(cache: Path) -> None:
    text = (cache / f"{TOP.hash_part}.narinfo").read_text()
    other = next(line for line in text.splitlines() if line.startswith("NarIndex"))
    lines = narinfo_file(cache).read_text().splitlines()
    changed = [other if line.startswith("NarIndex") else line for line in lines]
    narinfo_file(cache).write_text("\n".join(changed) + "\n")
    assert f"index of {LIBRARY}: its store path is {TOP}" in await faults_of_library(cache)


async def test_a_narinfo_that_is_not_what_it_should_be_is_told(cache: Path) -> None:
    (cache / f"{'1' * 32}.narinfo").write_bytes(narinfo_file(cache).read_bytes())
    (cache / f"{'2' * 32}.narinfo").write_text("StorePath\n")
    results = await check(cache)
    assert results[f"{'1' * 32}.narinfo"].faults == (f"it is the narinfo of {LIBRARY}",)
    assert "expected 'Name: value'" in results[f"{'2' * 32}.narinfo"].faults[0]


async def test_a_nar_that_is_compressed_otherwise_is_found(cache: Path) -> None:
    """The NAR and every signature are right; only the chunks are no frames of their own any more."""
    text = narinfo_file(cache).read_text()
    narinfo_file(cache).write_text(text.replace("Compression: zstd", "Compression: none"))
    assert await faults_of_library(cache)
