"""A directory, a real nginx that takes PUT, and a bucket: each passes the same tests."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import httpx
import pytest
from testbed.processes import free_port

from fusesnap.errors import (
    FusesnapError,
    InvalidConfiguration,
    InvalidData,
    PathNotFound,
    StorageFailure,
    Unavailable,
)
from fusesnap.publish.destination import (
    BUNDLE,
    NAR,
    NARINFO,
    PIECE,
    SPOOL_PREFIX,
    Destination,
    DirectoryDestination,
    read_whole,
    spooled,
)
from fusesnap.publish.http_destination import HttpDestination
from fusesnap.publish.s3_destination import S3Address, S3Destination
from fusesnap.substituter.retry import Refusal, RetryPolicy

from .conftest import RETRY
from .s3_server import BUCKET, Bucket


async def test_what_is_put_is_read(each: Destination) -> None:
    data = os.urandom(3 * PIECE + 5)
    file = each.spool / "made"
    file.write_bytes(data)
    await each.put("nar/one.nar.zst", file, NAR)
    await each.put_bytes("x.narinfo", b"text", NARINFO)
    assert await each.size("nar/one.nar.zst") == len(data)
    assert b"".join([piece async for piece in each.read("nar/one.nar.zst")]) == data
    assert await read_whole(each, "x.narinfo", 4) == b"text"
    await each.put_bytes("x.narinfo", b"other", NARINFO)
    assert await read_whole(each, "x.narinfo", 5) == b"other"


async def test_what_is_not_there_is_told(each: Destination) -> None:
    assert await each.size("nar/none") is None
    assert await read_whole(each, "none.narinfo", 10) is None
    with pytest.raises(PathNotFound, match=r"none: (not found|404)"):
        await anext(each.read("nar/none"))


async def test_a_small_file_that_is_large_is_not_read_whole(each: Destination) -> None:
    await each.put_bytes("x.narinfo", bytes(100), NARINFO)
    with pytest.raises(InvalidData, match="more than 99 bytes"):
        await read_whole(each, "x.narinfo", 99)


async def test_the_files_of_a_directory_are_listed_where_they_can_be(each: Destination) -> None:
    await each.put_bytes("b.narinfo", b"", NARINFO)
    await each.put_bytes("a.narinfo", b"", NARINFO)
    await each.put_bytes("nar/c.nar.zst", b"", NAR)
    listed = [await each.names(), await each.names("nar"), await each.names("none")]
    if isinstance(each, HttpDestination):
        assert listed == [None, None, None]
    else:
        assert listed == [["a.narinfo", "b.narinfo"], ["nar/c.nar.zst"], []]


async def test_objects_say_how_long_they_last(bucket: Bucket, tmp_path: Path) -> None:
    destination = S3Destination(bucket.url, tmp_path)
    assert destination.url == f"s3://{BUCKET}/cache"
    await destination.put_bytes("nar/x", b"1", NAR)
    await destination.put_bytes("x.narinfo", b"2", NARINFO)
    await destination.put_bytes("bundle/x", b"3", BUNDLE)
    assert {key: headers for key, (_, headers) in bucket.objects.items()} == {
        "cache/nar/x": {
            "Content-Type": "application/x-nix-nar",
            "Cache-Control": "public, max-age=31536000, immutable",
        },
        "cache/x.narinfo": {
            "Content-Type": "text/x-nix-narinfo",
            "Cache-Control": "public, max-age=300",
        },
        "cache/bundle/x": {
            "Content-Type": "application/x-nix-startup-bundle",
            "Cache-Control": "public, max-age=300",
        },
    }
    assert bucket.refused == 0


async def test_a_bucket_that_is_busy_is_asked_again(bucket: Bucket, tmp_path: Path) -> None:
    bucket.failures = 2
    await S3Destination(bucket.url, tmp_path).put_bytes("x", b"1", NAR)
    assert "cache/x" in bucket.objects


async def test_a_wrong_secret_is_refused(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Refusal, match="s3://bucket/cache/x: "):
        await S3Destination(bucket.url, tmp_path).put_bytes("x", b"1", NAR)
    assert (bucket.refused, bucket.objects) == (1, {})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b", S3Address("b", "", None, "us-east-1", True)),
        ("s3://b/p/q/?region=x", S3Address("b", "p/q", None, "x", True)),
        ("s3://b?endpoint=h:1&scheme=http", S3Address("b", "", "http://h:1", "us-east-1", False)),
        (
            "s3://b?endpoint=h&addressing-style=virtual",
            S3Address("b", "", "https://h", "us-east-1", True),
        ),
    ],
)
def test_buckets_are_spelled_as_nix_spells_them(url: str, expected: S3Address) -> None:
    assert S3Address.parse(url) == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "expected s3://bucket"),
        ("s3://me:x@b", "without user name"),
        ("s3://b?profile=x", "setting 'profile', expected some of endpoint, region"),
        ("s3://b?scheme=ftp", "scheme is 'ftp', expected http or https"),
        ("s3://b?addressing-style=x", "addressing-style is 'x', expected virtual or path"),
    ],
)
def test_what_is_no_bucket_is_told(url: str, said: str) -> None:
    with pytest.raises(InvalidConfiguration, match=said):
        S3Address.parse(url)


async def test_a_server_that_forbids_is_named(
    server: str, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    destination = HttpDestination(f"{server}/forbidden", client, tmp_path, retry=RETRY)
    with pytest.raises(Refusal, match="/forbidden/x: 403 forbidden"):
        await destination.put_bytes("x", b"1", NAR)
    with pytest.raises(Refusal, match="403"):
        await destination.size("x")


async def test_user_name_and_password_are_those_of_the_url(
    server: str, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    locked = server.replace("http://", "http://me:{}@") + "/locked"
    with pytest.raises(Refusal, match="/locked/x: 401 unauthorized"):
        await HttpDestination(locked.format("wrong"), client, tmp_path).put_bytes("x", b"1", NAR)
    await HttpDestination(locked.format("secret"), client, tmp_path).put_bytes("x", b"1", NAR)


async def test_a_server_that_is_gone_is_tried_again_and_then_named(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    tried = []

    async def count(seconds: float) -> None:
        tried.append(seconds)

    retry = RetryPolicy(attempts=3, sleep=count)
    destination = HttpDestination(f"http://127.0.0.1:{free_port()}", client, tmp_path, retry=retry)
    with pytest.raises(Unavailable, match="no connection"):
        await destination.put_bytes("x", b"1", NAR)
    assert len(tried) == 2


async def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    destination = DirectoryDestination(directory)
    (directory / "nar").write_text("in the way")
    with pytest.raises(StorageFailure):
        await destination.put_bytes("nar/x", b"1", NAR)
    assert [path.name for path in directory.iterdir()] == ["nar"]
    with pytest.raises(StorageFailure), contextlib.suppress(InvalidConfiguration):
        DirectoryDestination(directory / "nar")


async def test_errors_are_ours(tmp_path: Path) -> None:
    destination = DirectoryDestination(tmp_path / "cache")
    with pytest.raises(FusesnapError):
        await destination.put("x", tmp_path / "nowhere", NAR)


def test_what_a_killed_run_left_is_removed_and_what_another_makes_is_not(tmp_path: Path) -> None:
    (tmp_path / f"{SPOOL_PREFIX}dead").write_text("half of a NAR")
    with spooled(tmp_path) as made:
        made.write_text("the other half")
        DirectoryDestination(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [made.name]
    assert list(tmp_path.iterdir()) == []
