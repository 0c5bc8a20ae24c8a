from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fusesnap.daemon.build import leaves
from fusesnap.errors import InvalidConfiguration, InvalidData, Unavailable, UntrustedPath
from fusesnap.fetch.bandwidth import Bandwidth
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StoreDir
from fusesnap.publish.destination import Destination, DirectoryDestination
from fusesnap.publish.packing import Packer
from fusesnap.publish.publisher import Publisher
from fusesnap.publish.source import CacheSource, Source, StoreSource, in_order
from fusesnap.substituter.memory import Fault, MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

from ..store.conftest import path_named
from ..substituter.samples import KEY, TRUSTED, sample, secret_key
from .conftest import LEAF


def digest(source: Source, info: NarInfo) -> bytes:
    with source.nar(info) as pieces:
        return hashlib.sha256(b"".join(pieces)).digest()


@pytest.fixture
def cache() -> MemorySubstituter:
    return MemorySubstituter()


@pytest.fixture
def bandwidth() -> Bandwidth:
    return Bandwidth(0)


@pytest.fixture
def cache_source(
    cache: MemorySubstituter, nursery: trio.Nursery, bandwidth: Bandwidth
) -> CacheSource:
    pool = SubstituterPool(
        [cache],
        store_dir=StoreDir(),
        trusted_keys=TRUSTED,
        narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
        retry=RetryPolicy(attempts=1),
        deadline=10.0,
    )
    return CacheSource(pool, nursery, bandwidth.pay)


async def test_a_store_gives_the_nar_that_its_database_tells_of(source: StoreSource) -> None:
    info = await source.info(LEAF)
    found = await trio.to_thread.run_sync(digest, source, info)
    assert found == info.nar_hash.digest


@pytest.mark.parametrize("compression", ["xz", "none", "bzip2"])
async def test_a_cache_gives_the_nar_however_it_is_compressed(
    cache: MemorySubstituter, cache_source: CacheSource, compression: str
) -> None:
    made = sample(size=300_000, compression=compression).signed_by(KEY)
    cache.publish(made.info, made.file)
    info = await cache_source.info(made.path)
    found = await trio.to_thread.run_sync(digest, cache_source, info)
    assert found == info.nar_hash.digest


async def test_a_path_that_nobody_trusted_has_signed_is_not_published(
    cache: MemorySubstituter, cache_source: CacheSource
) -> None:
    made = sample().signed_by(secret_key("stranger-1"))
    cache.publish(made.info, made.file)
    with pytest.raises(UntrustedPath, match="stranger-1"):
        await cache_source.info(made.path)


async def test_a_download_that_breaks_is_told_to_who_reads(
    cache: MemorySubstituter, cache_source: CacheSource
) -> None:
    made = sample(size=300_000).signed_by(KEY)
    cache.publish(made.info, made.file)
    info = await cache_source.info(made.path)
    cache.script(info.url, Fault(Unavailable("gone"), after=100_000))
    with pytest.raises(Unavailable, match="gone"):
        await trio.to_thread.run_sync(digest, cache_source, info)


async def test_a_nar_that_is_not_the_one_that_was_signed_is_not_published(
    cache: MemorySubstituter,
    cache_source: CacheSource,
    packer: Packer,
    destination: DirectoryDestination,
    directory: Path,
) -> None:
    made = sample().signed_by(KEY)
    cache.publish(made.info, sample("other").file)
    publisher = Publisher(cache_source, destination, packer, KEY, StoreDir(), priority=40)
    with pytest.raises(BaseExceptionGroup) as caught:
        await publisher.publish([await cache_source.info(made.path)])
    assert all(isinstance(error, InvalidData) for error in leaves(caught.value))
    assert not list(directory.glob("*.narinfo"))  # noqa: ASYNC240


async def test_an_upstream_path_keeps_its_signature(
    cache: MemorySubstituter,
    cache_source: CacheSource,
    packer: Packer,
    destination: DirectoryDestination,
    make_publisher: Callable[[Destination], Publisher],
) -> None:
    made = sample().signed_by(KEY)
    cache.publish(made.info, made.file)
    own = secret_key("own-1")
    publisher = Publisher(cache_source, destination, packer, own, StoreDir(), priority=40)
    (result,) = await publisher.publish([await cache_source.info(made.path)])
    assert not result.kept
    text = Path(destination.url, f"{made.path.hash_part}.narinfo").read_text()  # noqa: ASYNC240
    assert [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("Sig")] == [
        "key-1",
        "own-1",
    ]


def test_a_directory_without_a_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="no store there"):
        StoreSource.at(tmp_path, StoreDir())
    assert list(tmp_path.iterdir()) == []


async def test_the_order_is_references_first(source: StoreSource) -> None:
    one = await source.info(LEAF)
    names = ["a", "b", "c"]
    infos = [
        replace(
            one,
            store_path=path_named(name),
            references=tuple(path_named(x) for x in (*names[position + 1 :], name, "elsewhere")),
        )
        for position, name in enumerate(names)
    ]
    assert [info.store_path.name for info in in_order(infos)] == ["c", "b", "a"]
    circle = [
        replace(infos[0], references=(path_named("b"),)),
        replace(infos[1], references=(path_named("a"),)),
    ]
    with pytest.raises(InvalidData, match="reference one another"):
        in_order(circle)
