from __future__ import annotations

import pytest

from fusesnap.errors import InvalidConfiguration
from fusesnap.substituter.addresses import (
    CacheAddress,
    parse_cache_url,
    parse_file_url,
    parse_http_url,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://cache.example.org", CacheAddress("https://cache.example.org", "https", "/")),
        ("http://localhost:8080/", CacheAddress("http://localhost:8080", "http", "/")),
        ("https://[::1]:443/a/b/", CacheAddress("https://[::1]:443/a/b", "https", "/a/b")),
        ("HTTPS://Example.ORG/A", CacheAddress("https://example.org/A", "https", "/A")),
        (
            "https://me:p%40ss@example.org/x?priority=10",
            CacheAddress("https://example.org/x", "https", "/x", 10, "me", "p@ss"),
        ),
        ("http://example.org?priority=0", CacheAddress("http://example.org", "http", "/", 0)),
        ("file:///srv/cache", CacheAddress("file:///srv/cache", "file", "/srv/cache")),
        ("file:///srv/a%20b/", CacheAddress("file:///srv/a%20b", "file", "/srv/a b")),
    ],
)
def test_urls(text: str, address: CacheAddress) -> None:
    assert parse_cache_url(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cache.example.org",
        "/srv/cache",
        "s3://bucket",
        "ssh://host",
        "https://",
        "https:///path",
        "http://host:port",
        "http://[::1",
        "https://host/#fragment",
        "https://host/a b",
        "https://host/\n",
        "https://host/?compression=xz",
        "https://host/?priority=",
        "https://host/?priority=-1",
        "https://host/?priority=1&priority=x",
        "file://srv/cache",
        "file:cache",
        "file:///srv/%00",
    ],
)
def test_urls_that_cannot_be_used(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="substituter"):
        parse_cache_url(text)


@pytest.mark.parametrize(
    "text",
    ["s3://user:secret@bucket", "https://user:secret@host/#x", "https://user:secret@host?x=secret"],
)
def test_passwords_are_not_shown(text: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        parse_cache_url(text)
    assert "user:secret" not in str(caught.value)
    assert "secret" not in repr(parse_cache_url("https://user:secret@host"))


def test_each_kind_of_cache_takes_its_own_scheme() -> None:
    assert parse_http_url("http://host").url == "http://host"
    assert parse_file_url("file:///srv").path == "/srv"
    with pytest.raises(InvalidConfiguration, match="https or http"):
        parse_http_url("file:///srv")
    with pytest.raises(InvalidConfiguration, match="file"):
        parse_file_url("http://host")
