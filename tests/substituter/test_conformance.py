"""What every implementation of a binary cache must do, whatever the bytes come through."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from fusesnap.errors import FusesnapError, InvalidData, PathNotFound, Unavailable
from fusesnap.nix.cache_info import CacheInfo
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.base import Bookmark, Substituter
from fusesnap.substituter.client import make_client
from fusesnap.substituter.file import FileSubstituter
from fusesnap.substituter.http import HttpSubstituter
from fusesnap.substituter.memory import MemorySubstituter
from fusesnap.substituter.retry import Refusal, RetryPolicy
from tests.substituter.conftest import Nginx
from tests.substituter.samples import CACHE_INFO, COMPRESSORS, Sample, sample

_numbers = itertools.count()


class World(ABC):
    """A cache and the power to change what is in it."""

    substituter: Substituter

    @abstractmethod
    def put(self, name: str, data: bytes) -> None: ...

    def publish(self, published: Sample) -> Sample:
        self.put(published.narinfo_name, published.narinfo)
        self.put(published.info.url, published.file)
        return published


class MemoryWorld(World):
    def __init__(self) -> None:
        self.substituter = self.memory = MemorySubstituter()

    def put(self, name: str, data: bytes) -> None:
        self.memory.files[name] = data


class DirectoryWorld(World):
    def __init__(self, directory: Path, substituter: Substituter) -> None:
        self.directory = directory
        self.substituter = substituter

    def put(self, name: str, data: bytes) -> None:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


@pytest.fixture(params=["memory", "file", "http1", "http2"])
async def world(request: Any, tmp_path: Path, nginx: Nginx) -> AsyncIterator[World]:
    if request.param == "memory":
        yield MemoryWorld()
    elif request.param == "file":
        yield DirectoryWorld(tmp_path, FileSubstituter(f"file://{tmp_path}"))
    else:
        async with _http_world(request.param, nginx) as client:
            name = f"{next(_numbers)}"
            url = nginx.http if request.param == "http1" else nginx.https
            directory = nginx.root / name
            directory.mkdir()
            retry = RetryPolicy(first_wait=0)
            yield DirectoryWorld(directory, HttpSubstituter(f"{url}/{name}", client, retry=retry))


def _http_world(kind: str, nginx: Nginx) -> httpx.AsyncClient:
    expected = {"http1": "HTTP/1.1", "http2": "HTTP/2"}[kind]

    async def check_protocol(response: httpx.Response) -> None:
        assert response.http_version == expected

    client = make_client(ca_file=nginx.ca_file)
    client.event_hooks["response"].append(check_protocol)
    return client


async def read(world: World, info: NarInfo) -> bytes:
    async with world.substituter.nar(info) as pieces:
        return b"".join([piece async for piece in pieces])


async def failure(ask: Callable[[], Any], kind: type[FusesnapError], world: World) -> str:
    """The message of the error, which is of exactly this kind and names the cache."""
    with pytest.raises(kind) as caught:
        await ask()
    message = str(caught.value)
    assert message.startswith(f"{world.substituter.url}: ")
    return message


async def test_cache_info(world: World) -> None:
    world.put("nix-cache-info", CACHE_INFO)
    assert await world.substituter.cache_info() == CacheInfo("/nix/store", True, 40)


async def test_cache_without_cache_info_is_taken_for_nix_store(world: World) -> None:
    assert await world.substituter.cache_info() == CacheInfo("/nix/store", False, None)


async def test_cache_info_that_is_a_web_page(world: World) -> None:
    world.put("nix-cache-info", b"<html><body>Welcome to the hotel</body></html>")
    await failure(world.substituter.cache_info, InvalidData, world)


async def test_cache_info_without_end(world: World) -> None:
    world.put("nix-cache-info", CACHE_INFO + b"X: y\n" * 20_000)
    assert "65536" in await failure(world.substituter.cache_info, InvalidData, world)


async def test_narinfo(world: World) -> None:
    published = world.publish(sample())
    assert await world.substituter.narinfo(published.path) == published.info


async def test_narinfo_that_is_not_there(world: World) -> None:
    message = await failure(lambda: world.substituter.narinfo(sample().path), PathNotFound, world)
    assert message.endswith("not found")


async def test_narinfo_that_comes_later_is_found(world: World) -> None:
    published = sample()
    with pytest.raises(PathNotFound):
        await world.substituter.narinfo(published.path)
    world.publish(published)
    assert await world.substituter.narinfo(published.path) == published.info


@pytest.mark.parametrize(
    "garbage",
    [b"<html>captive portal</html>\n", b"", b"\x00\xff" * 100, b"StorePath: /nix/store/"],
    ids=["page", "empty", "binary", "cut"],
)
async def test_narinfo_that_is_garbage(world: World, garbage: bytes) -> None:
    published = sample()
    world.put(published.narinfo_name, garbage)
    message = await failure(lambda: world.substituter.narinfo(published.path), InvalidData, world)
    assert published.narinfo_name in message


async def test_narinfo_of_another_path_with_the_same_hash(world: World) -> None:
    published = sample()
    other = published.but(store_path=type(published.path)(published.path.hash_part, "other"))
    world.put(published.narinfo_name, other.narinfo)
    message = await failure(lambda: world.substituter.narinfo(published.path), InvalidData, world)
    assert str(published.path) in message
    assert str(other.path) in message


async def test_narinfo_of_another_store_directory(world: World) -> None:
    published = sample()
    foreign = published.but(store_dir=StoreDir("/opt/store"))
    world.put(published.narinfo_name, foreign.narinfo)
    await failure(lambda: world.substituter.narinfo(published.path), InvalidData, world)


async def test_narinfo_that_is_too_long(world: World) -> None:
    published = sample()
    world.put(published.narinfo_name, published.narinfo + b"X: y\n" * (MAX_NARINFO_SIZE // 5))
    message = await failure(lambda: world.substituter.narinfo(published.path), InvalidData, world)
    assert str(MAX_NARINFO_SIZE) in message


@pytest.mark.parametrize("compression", COMPRESSORS)
async def test_nar_is_the_file_as_it_is_stored(world: World, compression: str) -> None:
    published = world.publish(sample(compression=compression, size=300_000))
    info = await world.substituter.narinfo(published.path)
    assert await read(world, info) == published.file


async def test_nar_comes_in_pieces_of_a_bounded_size(world: World) -> None:
    published = world.publish(sample(size=5 << 20, compression="none"))
    hasher = hashlib.sha256()
    async with world.substituter.nar(published.info) as pieces:
        async for piece in pieces:
            assert 0 < len(piece) <= 1 << 20
            hasher.update(piece)
    assert hasher.digest() == hashlib.sha256(published.file).digest()


async def test_nar_whose_size_the_narinfo_does_not_say(world: World) -> None:
    published = world.publish(sample().but(file_size=None, file_hash=None))
    assert await read(world, published.info) == published.file


async def test_nar_that_is_gone(world: World) -> None:
    info = sample().info
    message = await failure(lambda: read(world, info), PathNotFound, world)
    assert info.url in message


async def test_entering_without_reading_asks_nothing(world: World) -> None:
    async with world.substituter.nar(sample().info):
        pass  # the file does not exist: asking for it would fail


@pytest.mark.parametrize("size", [0, 500, 2000])
async def test_nar_of_another_length_than_announced(world: World, size: int) -> None:
    published = world.publish(sample(compression="none"))
    world.put(published.info.url, published.file[:size].ljust(size, b"+"))
    message = await failure(lambda: read(world, published.info), Unavailable, world)
    assert str(len(published.file)) in message


async def test_nar_that_is_far_longer_than_its_contents_can_be(world: World) -> None:
    published = world.publish(sample().but(file_size=None))
    world.put(published.info.url, bytes(200_000))
    await failure(lambda: read(world, published.info), Unavailable, world)


async def test_announcement_that_no_compression_explains(world: World) -> None:
    published = world.publish(sample().but(file_size=1 << 40))
    message = await failure(lambda: read(world, published.info), Unavailable, world)
    assert str(1 << 40) in message


async def test_reader_that_leaves_in_the_middle(world: World) -> None:
    published = world.publish(sample(size=5 << 20, compression="none"))
    for _ in range(3):
        async with world.substituter.nar(published.info) as pieces:
            first = await anext(pieces)
        assert published.file.startswith(first)
    assert await world.substituter.narinfo(published.path) == published.info


# NARs do not go over HTTP/2, where a response that is given up can hold up those after it: see HttpSubstituter.
CAN_BE_LEFT = pytest.mark.parametrize("world", ["memory", "file", "http1"], indirect=True)


@CAN_BE_LEFT
async def test_another_reading_goes_on_at_a_bookmark(world: World) -> None:
    published = world.publish(sample(size=3 << 20, compression="none"))
    bookmark, came = Bookmark(), b""
    for stop_at in (1 << 20, 2 << 20, len(published.file)):
        with trio.CancelScope() as scope:
            async with world.substituter.nar(published.info, bookmark=bookmark) as pieces:
                async for piece in pieces:
                    came += piece
                    if len(came) >= stop_at:
                        scope.cancel()
        assert bookmark.received == len(came)
        assert bookmark.resumable
    assert came == published.file
    assert bookmark.length == len(published.file)


@CAN_BE_LEFT
async def test_bookmark_in_a_file_that_is_another_by_now(world: World) -> None:
    published = world.publish(sample(size=3 << 20, compression="none"))
    bookmark = Bookmark()
    async with world.substituter.nar(published.info, bookmark=bookmark) as pieces:
        await anext(pieces)
    world.put(published.info.url, published.file + b"+")
    unknown = published.but(file_size=None)
    with pytest.raises(Unavailable):
        async with world.substituter.nar(unknown.info, bookmark=bookmark) as pieces:
            async for _ in pieces:
                pass


async def test_reader_that_is_cancelled_in_the_middle(world: World) -> None:
    published = world.publish(sample(size=5 << 20, compression="none"))
    with trio.CancelScope() as scope:
        async with world.substituter.nar(published.info) as pieces:
            async for _ in pieces:
                scope.cancel()
    assert scope.cancelled_caught
    assert await read(world, published.info) == published.file


async def test_error_of_the_reader_passes_unchanged(world: World) -> None:
    published = world.publish(sample(size=5 << 20, compression="none"))
    with pytest.raises(ZeroDivisionError):
        async with world.substituter.nar(published.info) as pieces:
            async for _ in pieces:
                raise ZeroDivisionError


async def test_many_at_once(world: World) -> None:
    published = [world.publish(sample(f"many-{number}")) for number in range(400)]
    answers: dict[int, tuple[NarInfo, bytes]] = {}

    async def ask(number: int) -> None:
        info = await world.substituter.narinfo(published[number].path)
        answers[number] = (info, await read(world, info))

    async with trio.open_nursery() as nursery:
        for number in range(400):
            nursery.start_soon(ask, number)
    for number in range(400):
        assert answers[number] == (published[number].info, published[number].file)


async def test_url_has_no_slash_at_its_end(world: World) -> None:
    assert not world.substituter.url.endswith("/")


async def part(world: World, info: NarInfo, start: int, end: int) -> bytes:
    async with world.substituter.part(info, start, end) as pieces:
        return b"".join([piece async for piece in pieces])


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1000, 200_000), (299_999, 300_000)])
async def test_part_of_a_file(world: World, start: int, end: int) -> None:
    published = world.publish(sample(size=300_000))
    assert await part(world, published.info, start, end) == published.file[start:end]


async def test_part_that_is_the_whole_file(world: World) -> None:
    published = world.publish(sample())
    assert await part(world, published.info, 0, len(published.file)) == published.file


async def test_part_beyond_the_end(world: World) -> None:
    published = world.publish(sample())
    size = len(published.file)
    await failure(lambda: part(world, published.info, size - 5, size + 5), Refusal, world)


async def test_part_of_a_file_that_is_gone(world: World) -> None:
    await failure(lambda: part(world, sample().info, 0, 10), PathNotFound, world)


async def test_part_that_is_given_up_in_its_middle(world: World) -> None:
    published = world.publish(sample(size=300_000))
    async with world.substituter.part(published.info, 0, 290_000) as pieces:
        first = await anext(aiter(pieces))
    assert published.file.startswith(first)
    assert await part(world, published.info, 5, 10) == published.file[5:10]


async def test_small_file(world: World) -> None:
    world.put("nar/x.narindex", b"index")
    assert await world.substituter.small_file("nar/x.narindex", 5) == b"index"


async def test_small_file_that_is_large(world: World) -> None:
    world.put("nar/x.narindex", b"index!")
    await failure(lambda: world.substituter.small_file("nar/x.narindex", 5), InvalidData, world)


async def test_small_file_that_is_not_there(world: World) -> None:
    await failure(lambda: world.substituter.small_file("nar/none", 5), PathNotFound, world)
