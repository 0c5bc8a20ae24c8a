from __future__ import annotations

import http.client
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, Request, http_cache, parse_requests


def test_log_lines_become_requests() -> None:
    log = (
        '{"method":"GET","path":"/nix-cache-info","status":200,"size":21}\n'
        '{"method":"HEAD","path":"/nar/a \\"b\\".nar","status":404,"size":0}\n'
    )
    assert parse_requests(log) == [
        Request("GET", "/nix-cache-info", 200, 21),
        Request("HEAD", '/nar/a "b".nar', 404, 0),
    ]


def test_an_empty_log_has_no_requests() -> None:
    assert parse_requests("") == []


def test_served_requests_are_known_as_soon_as_they_were_answered(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    with http_cache(CacheFiles(files), tmp_path / "nginx") as cache:
        assert get(cache.port, "/nix-cache-info") == (200, b"StoreDir: /nix/store\n")
        assert get(cache.port, "/missing.narinfo")[0] == 404
        asked = [(each.path, each.status) for each in cache.requests()]
        assert asked == [("/nix-cache-info", 200), ("/missing.narinfo", 404)]

        cache.clear_requests()
        assert cache.requests() == []

        cache.stop()
        with pytest.raises(ConnectionRefusedError):
            get(cache.port, "/nix-cache-info")
        cache.start()
        assert get(cache.port, "/nix-cache-info")[0] == 200


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
