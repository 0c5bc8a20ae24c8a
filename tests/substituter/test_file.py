"""What only a directory can do wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusesnap.errors import FusesnapError, PathNotFound, Unavailable
from fusesnap.substituter.file import FileSubstituter
from tests.substituter.samples import Sample, sample


def publish(directory: Path, published: Sample) -> None:
    (directory / "nar").mkdir(exist_ok=True)
    (directory / published.narinfo_name).write_bytes(published.narinfo)
    (directory / published.info.url).write_bytes(published.file)


async def read(cache: FileSubstituter, published: Sample) -> bytes:
    async with cache.nar(published.info) as pieces:
        return b"".join([piece async for piece in pieces])


async def test_directory_that_is_not_there(tmp_path: Path) -> None:
    cache = FileSubstituter(f"file://{tmp_path}/none")
    with pytest.raises(Unavailable, match=f"^file://{tmp_path}/none: No such file or directory$"):
        await cache.cache_info()


async def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = FileSubstituter(f"file://{tmp_path}/file")
    with pytest.raises(Unavailable, match=r"[Nn]ot a directory"):
        await cache.cache_info()


async def test_name_of_the_directory_is_decoded(tmp_path: Path) -> None:
    directory = tmp_path / "a b"
    directory.mkdir()
    published = sample()
    publish(directory, published)
    cache = FileSubstituter(f"file://{tmp_path}/a%20b")
    assert await cache.narinfo(published.path) == published.info


async def test_what_is_read_whole_is_metered(tmp_path: Path) -> None:
    published = sample()
    publish(tmp_path, published)
    came: list[int] = []
    cache = FileSubstituter(f"file://{tmp_path}", meter=came.append)
    assert await read(cache, published) == published.file
    assert not came
    await cache.narinfo(published.path)
    assert came == [len(published.narinfo)]


@pytest.mark.parametrize("kind", ["fifo", "directory"])
async def test_what_is_not_a_regular_file_is_not_read(tmp_path: Path, kind: str) -> None:
    published = sample()
    for name in (published.narinfo_name, "nar"):
        if kind == "fifo":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).mkdir()
    cache = FileSubstituter(f"file://{tmp_path}")
    with pytest.raises(Unavailable, match="not a regular file"):
        await cache.narinfo(published.path)
    with pytest.raises(Unavailable, match="not a regular file"):
        await read(cache, published.but(url="nar"))


async def test_absolute_url_is_not_a_file(tmp_path: Path) -> None:
    cache = FileSubstituter(f"file://{tmp_path}")
    with pytest.raises(Unavailable, match="expected a file of this directory"):
        await read(cache, sample().but(url="http://host/it.nar"))


async def test_link_that_leads_nowhere(tmp_path: Path) -> None:
    published = sample()
    (tmp_path / published.narinfo_name).symlink_to("nowhere")
    with pytest.raises(PathNotFound):
        await FileSubstituter(f"file://{tmp_path}").narinfo(published.path)


async def test_link_in_a_circle(tmp_path: Path) -> None:
    published = sample()
    (tmp_path / published.narinfo_name).symlink_to(published.narinfo_name)
    with pytest.raises(FusesnapError, match="symbolic links"):
        await FileSubstituter(f"file://{tmp_path}").narinfo(published.path)


async def test_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    published = sample(size=2 << 20, compression="none")
    publish(tmp_path, published)
    with pytest.raises(Unavailable, match="more bytes than expected"):
        async with FileSubstituter(f"file://{tmp_path}").nar(published.info) as pieces:
            await anext(pieces)
            with (tmp_path / published.info.url).open("ab") as file:
                file.write(b"more")
            async for _ in pieces:
                pass


async def test_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    published = sample(size=2 << 20, compression="none")
    publish(tmp_path, published)
    with pytest.raises(Unavailable, match="ended after"):
        async with FileSubstituter(f"file://{tmp_path}").nar(published.info) as pieces:
            await anext(pieces)
            os.truncate(tmp_path / published.info.url, 1 << 20)
            async for _ in pieces:
                pass
