"""Clients made from a configuration, against a real nginx."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest

from fusesnap.errors import InvalidConfiguration, PathNotFound, Unavailable
from fusesnap.nix.narinfo import NarInfo
from fusesnap.substituter.client import make_client, open_substituter, tls_context
from fusesnap.substituter.file import FileSubstituter
from fusesnap.substituter.http import HttpSubstituter
from fusesnap.substituter.late_tls import LateContext
from fusesnap.substituter.retry import Refusal
from tests.substituter.conftest import Nginx
from tests.substituter.samples import Sample, sample
from tests.substituter.scripted_server import MemoryNetwork, Reply


async def read(substituter: HttpSubstituter, info: NarInfo) -> bytes:
    async with substituter.nar(info) as pieces:
        return b"".join([piece async for piece in pieces])


def publish(nginx: Nginx, published: Sample) -> None:
    (nginx.root / "nar").mkdir(exist_ok=True)
    (nginx.root / published.narinfo_name).write_bytes(published.narinfo)
    (nginx.root / published.info.url).write_bytes(published.file)


async def test_certificate_of_a_stranger(nginx: Nginx) -> None:
    async with make_client() as client:
        with pytest.raises(Refusal, match=r"certificate is not accepted: .*unable to get"):
            await HttpSubstituter(nginx.https, client).narinfo(sample().path)


async def test_certificate_for_another_name(nginx: Nginx) -> None:
    url = nginx.https.replace("127.0.0.1", "localhost")
    async with make_client(ca_file=nginx.ca_file) as client:
        with pytest.raises(Refusal, match=r"certificate is not accepted: .*localhost"):
            await HttpSubstituter(url, client).narinfo(sample().path)


async def test_http2_can_be_switched_off(nginx: Nginx) -> None:
    versions = []

    async def note(response: httpx.Response) -> None:
        versions.append(response.http_version)

    for http2 in (True, False):
        async with make_client(ca_file=nginx.ca_file, http2=http2) as client:
            client.event_hooks["response"].append(note)
            with pytest.raises(PathNotFound):
                await HttpSubstituter(nginx.https, client).narinfo(sample("none").path)
    assert versions == ["HTTP/2", "HTTP/1.1"]


async def test_nars_that_are_given_up_do_not_hold_up_the_others(nginx: Nginx) -> None:
    published = sample("large", size=6 << 20, compression="none")
    publish(nginx, published)
    async with (
        make_client(ca_file=nginx.ca_file) as client,
        make_client(ca_file=nginx.ca_file, http2=False) as transfers,
    ):
        cache = HttpSubstituter(nginx.https, client, transfers=transfers)
        for _ in range(6):
            async with cache.nar(published.info) as pieces:
                await anext(pieces)
        assert await read(cache, await cache.narinfo(published.path)) == published.file


async def test_nothing_listens(nginx: Nginx) -> None:
    async with make_client() as client:
        with pytest.raises(Unavailable, match=r"no connection: .*refused"):
            await HttpSubstituter("http://127.0.0.1:1", client).narinfo(sample().path)


@pytest.mark.parametrize("contents", [None, "no certificate"])
def test_certificate_authorities_that_cannot_be_read(tmp_path: Path, contents: str | None) -> None:
    file = tmp_path / "ca.pem"
    if contents is not None:
        file.write_text(contents)
    with pytest.raises(InvalidConfiguration, match=str(file)):
        make_client(ca_file=file)


@pytest.mark.parametrize("proxy", ["no-scheme", "ftp://host", "http://host:port"])
def test_proxy_that_cannot_be_used(proxy: str) -> None:
    with pytest.raises(InvalidConfiguration, match="proxy"):
        make_client(proxy=proxy)


async def test_proxy_carries_requests(nginx: Nginx, network: MemoryNetwork) -> None:
    published = sample()
    proxy = network.server("proxy")
    proxy.on(f"http://cache/{published.narinfo_name}", Reply(200, published.narinfo))
    client = make_client(proxy="http://proxy:3128")
    for transport in client._mounts.values():
        transport._pool._network_backend = network  # type: ignore[union-attr]
    async with client:
        cache = HttpSubstituter("http://cache", client)
        assert await cache.narinfo(published.path) == published.info


async def test_each_scheme_has_its_substituter(tmp_path: Path) -> None:
    async with make_client() as client:
        directory = open_substituter(f"file://{tmp_path}/?priority=3", client)
        assert isinstance(directory, FileSubstituter)
        assert (directory.url, directory.priority) == (f"file://{tmp_path}", 3)
        server = open_substituter("https://host/?priority=0", client)
        assert isinstance(server, HttpSubstituter)
        assert (server.url, server.priority) == ("https://host", 0)
        with pytest.raises(InvalidConfiguration):
            open_substituter("s3://bucket", client)


async def test_authorities_are_read_when_a_connection_is_encrypted(nginx: Nginx) -> None:
    made = []
    versions = []

    def read_authorities() -> ssl.SSLContext:
        made.append(tls_context(nginx.ca_file))
        return made[-1]

    async def note(response: httpx.Response) -> None:
        versions.append(response.http_version)

    published = sample("late")
    publish(nginx, published)
    async with make_client(tls=LateContext(read_authorities)) as client:
        client.event_hooks["response"].append(note)
        await HttpSubstituter(nginx.http, client).narinfo(published.path)
        assert not made
        await HttpSubstituter(nginx.https, client).narinfo(published.path)
        await HttpSubstituter(nginx.https, client).narinfo(published.path)
    assert len(made) == 1
    assert versions == ["HTTP/1.1", "HTTP/2", "HTTP/2"]


async def test_authorities_that_are_read_late_refuse_a_stranger_too(nginx: Nginx) -> None:
    async with make_client(tls=LateContext(tls_context)) as client:
        with pytest.raises(Refusal, match=r"certificate is not accepted: .*unable to get"):
            await HttpSubstituter(nginx.https, client).narinfo(sample().path)
