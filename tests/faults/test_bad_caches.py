"""Caches that misbehave, each on a real nginx or a scripted server, in front of a whole node without its mount.

What is told as an error here is EIO to a reader (``tests/e2e/test_waiting.py``), and a line in the log.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme
from testbed.bad_caches import BadCaches, Certificate, bad_caches

from fusesnap.daemon.build import Node
from fusesnap.errors import (
    FusesnapError,
    InvalidData,
    PathNotFound,
    Unavailable,
)
from fusesnap.fetch.bandwidth import Bandwidth
from fusesnap.substituter.watched import CacheState

from ..substituter.samples import CACHE_INFO, Sample, sample
from ..substituter.scripted_server import Reply, ScriptedServer
from .conftest import LARGE, MANY, SMALL, MakeNode

Start = Callable[..., object]


async def realise(node: Node, published: Sample = SMALL) -> None:
    await node.realiser.realise(published.path)
    assert node.store.is_committed(published.path)


async def failure(node: Node, kind: type[FusesnapError], published: Sample = SMALL) -> str:
    """What a reader is told; nothing of the path is there."""
    with pytest.raises(kind) as caught:
        await node.realiser.realise(published.path)
    assert not node.store.location(published.path).exists()
    assert published.path.name in str(caught.value)
    return str(caught.value)


def state(node: Node, url: str) -> CacheState:
    return next(each for each in node.pool.states() if each.url == url)


# Another cache serves what the first cannot

# By manner: what is said of the cache, and how many requests for the NAR it gets at most.
INSTEAD = {
    "gone": ("404 not found", 2),
    "forbidden": ("403 forbidden", 2),
    "broken": ("500 internal server error", 4),
    "overloaded": ("503 service unavailable", 4),
    "throttled": ("429 too many requests", 1),
    "hanging-up": ("broken connection", 4),
    "truncated": ("has 10056 bytes, expected 20112", 1),
    "corrupt": ("hash", 1),
    "circling": ("more than 10 redirects", 11),
    "closed": ("401 unauthorized: nothing is configured", 0),
    "down": ("502 bad gateway", 0),
    "portal": ("", 0),
}


@pytest.mark.parametrize("manner", INSTEAD)
async def test_another_cache_serves(
    make_node: MakeNode, caches: BadCaches, manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    said, requests = INSTEAD[manner]
    bad, good = caches.url(manner), caches.url("good")
    async with make_node(f"{bad}?priority=1", good) as node:
        await realise(node)
        assert len(caches.nars("good")) == 1
        assert len(caches.nars(manner)) <= requests
        condition = state(node, bad)
        told = f"{condition.last_error} {caplog.text}"
        assert bad in told
        assert said in told
        if manner not in ("gone", "forbidden"):  # of those only the one file is missing
            assert not condition.reachable
            await realise(node, LARGE)
            assert len(caches.nars(manner)) <= requests
    assert (condition.bad_nars, condition.avoided_for > 50) == (
        (1, True) if manner == "corrupt" else (0, False)
    )


async def test_where_a_byte_comes_a_second_another_cache_serves(
    make_node: MakeNode, caches: BadCaches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusesnap.daemon.build.PACE_WINDOW", 1.5)
    bad, good = caches.url("slow"), caches.url("good")
    async with make_node(f"{bad}?priority=1", good) as node:
        await realise(node)
        assert "less than 1024 bytes a second" in str(state(node, bad).last_error)
    (request,) = caches.nars("slow")
    assert request.size < 1000


async def test_where_nothing_comes_another_cache_serves(
    make_node: MakeNode, caches: BadCaches
) -> None:
    urls = (f"{caches.url('mute')}?priority=1", caches.url("good"))
    async with make_node(*urls, fetch={"idle-timeout": 0.7}) as node:
        await realise(node)
        assert "no answer within 0.7 s" in str(state(node, caches.url("mute")).last_error)
    assert len(caches.nars("mute")) == 1


# A cache that is the only one

ALONE: dict[str, tuple[type[FusesnapError], str, int]] = {
    "gone": (PathNotFound, "404 not found", 2),
    "broken": (Unavailable, "500 internal server error", 8),
    "throttled": (Unavailable, "429 too many requests", 4),
    "hanging-up": (Unavailable, "broken connection", 8),
    "truncated": (Unavailable, "has 10056 bytes, expected 20112", 1),
    "corrupt": (InvalidData, "hash", 1),
    "closed": (Unavailable, "401 unauthorized", 0),
    "portal": (Unavailable, "", 0),
}


@pytest.mark.parametrize("manner", ALONE)
async def test_a_reader_is_told_what_is_wrong_and_it_works_once_it_is_mended(
    make_node: MakeNode, caches: BadCaches, manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, said, requests = ALONE[manner]
    async with make_node(caches.url(manner), fetch={"stall-timeout": 1.5}) as node:
        assert caches.url(manner) in await failure(node, kind)
        with trio.fail_after(60):
            while node.realiser.flights():  # noqa: ASYNC110 - the reader's deadline may be first
                await trio.sleep(0.01)
        assert said in caplog.text
        assert len(caches.nars(manner)) <= requests
        assert len(caches.requests(manner)) <= 12
    async with make_node(caches.url("good")) as node:
        await realise(node)


async def test_a_byte_a_second_is_no_silence_and_a_reader_can_be_let_go(
    make_node: MakeNode, caches: BadCaches
) -> None:
    async with make_node(caches.url("slow"), fetch={"stall-timeout": 1.5}) as node:
        with trio.move_on_after(3) as patience:
            await node.realiser.realise(SMALL.path)
        assert patience.cancelled_caught
        (flight,) = node.realiser.flights()
        assert flight.received > 0


# What is not a fault


@pytest.mark.parametrize("manner", ["redirecting", "relative", "without-ranges"])
async def test_ways_of_serving(make_node: MakeNode, caches: BadCaches, manner: str) -> None:
    async with make_node(caches.url(manner)) as node:
        await realise(node)
        assert state(node, caches.url(manner)).reachable
    if manner != "without-ranges":
        assert [request.status for request in caches.nars(manner)] == [302]
        assert len(caches.nars("good")) == 1


class Bill(Bandwidth):
    """Adds up what is to be paid for."""

    count = 0

    def owe(self, count: int) -> None:
        self.count += count
        super().owe(count)


async def test_every_byte_that_a_cache_sends_counts(
    make_node: MakeNode, caches: BadCaches, monkeypatch: pytest.MonkeyPatch
) -> None:
    bill = Bill(1 << 30)
    monkeypatch.setattr("fusesnap.daemon.build.Bandwidth", {1 << 20: bill}.__getitem__)
    async with make_node(caches.url("good"), fetch={"bandwidth": "1M"}) as node:
        await node.pool.get_ready()
        await realise(node)
        await realise(node, LARGE)
        for each in MANY:
            await node.pool.find(each.path)
        with pytest.raises(PathNotFound):
            await node.pool.find(sample("not-there").path)
    sent = [each.size for each in caches.requests("good")]
    assert len(sent) > len(MANY)
    assert bill.count == sum(sent)


async def test_a_token_that_is_renewed(
    make_node: MakeNode, caches: BadCaches, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    (caches.tokens / "first").touch()
    url = caches.url("token")
    async with make_node(url, token_files={url: str(token)}) as node:
        await realise(node)
        (caches.tokens / "first").rename(caches.tokens / "second")
        message = await failure(node, Unavailable, LARGE)
        assert f"401 unauthorized: the token in {token} is not accepted" in message
        token.write_text("second\n")
        await realise(node, LARGE)


async def test_a_password(make_node: MakeNode, caches: BadCaches, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password old\n")
    caches.passwords.write_text("me:{PLAIN}old\n")
    async with make_node(caches.url("password"), netrc_file=str(netrc)) as node:
        await realise(node)
        caches.passwords.write_text("me:{PLAIN}new\n")
        netrc.write_text("machine 127.0.0.1 login me password new\n")
        await realise(node, LARGE)


async def test_a_private_certificate_authority(
    make_node: MakeNode, cache_directory: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate = Certificate(tmp_path / "chain.pem", tmp_path / "key.pem")
    issued.private_key_pem.write_to_path(str(certificate.key))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(certificate.chain), append=True)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "nginx").mkdir()
    with bad_caches(tmp_path / "nginx", cache_directory, certificate=certificate) as caches:
        async with make_node(caches.url("good")) as node:
            assert "its certificate is not accepted" in await failure(node, Unavailable)
        async with make_node(caches.url("good"), ca_file=str(tmp_path / "ca.pem")) as node:
            await realise(node)


async def test_a_proxy_of_the_environment(
    make_node: MakeNode, caches: BadCaches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", caches.proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    async with make_node(caches.url("good")) as node:
        await realise(node)
    requests = [request for request in caches.requests("good") if request.proxied]
    assert [request.name for request in requests] == [
        "nix-cache-info",
        SMALL.narinfo_name,
        SMALL.info.url,
    ]


async def test_a_host_that_nobody_knows(
    make_node: MakeNode, caches: BadCaches, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def unknown(host: str, *rest: object, **options: object) -> object:
        if host != "cache.invalid":
            return resolve(host, *rest, **options)  # type: ignore[arg-type]
        names.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with make_node("http://cache.invalid?priority=1", caches.url("good")) as node:
        await realise(node)
        said = state(node, "http://cache.invalid").last_error
    assert said == "http://cache.invalid: its host name is not known: Name or service not known"
    assert len(names) <= 3


# What nginx cannot be made to do


@pytest.fixture
def start(nursery: trio.Nursery) -> Callable[[ScriptedServer], object]:
    async def start(server: ScriptedServer) -> str:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        return f"http://127.0.0.1:{listener.socket.getsockname()[1]}"

    return start


def lying(published: Sample, **reply: object) -> ScriptedServer:
    server = ScriptedServer()
    server.on("/nix-cache-info", Reply(200, CACHE_INFO))
    server.on(f"/{published.narinfo_name}", Reply(200, published.narinfo))
    server.on(f"/{published.info.url}", Reply(200, **{"body": published.file, **reply}))  # type: ignore[arg-type]
    return server


SIZE = len(SMALL.file)
LIES: dict[str, dict[str, object]] = {
    "too short": {"headers": {"Content-Length": str(SIZE - 1)}},
    "too long": {"headers": {"Content-Length": str(SIZE + 1)}},
    "no number": {"headers": {"Content-Length": "many"}},
    "cut off": {"stop_at": SIZE // 2},
    "cut off, no length": {"stop_at": SIZE // 2, "chunked": True},
    "endless": {"endless": True},
    "more than announced": {"chunked": True, "body": SMALL.file + b"x"},
}


@pytest.mark.parametrize("lie", LIES)
async def test_wrong_lengths(
    make_node: MakeNode,
    caches: BadCaches,
    start: Callable[[ScriptedServer], object],
    lie: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = lying(SMALL, **LIES[lie])
    url = await start(server)  # type: ignore[misc]
    async with make_node(f"{url}?priority=1", caches.url("good")) as node:
        await realise(node)
        assert not state(node, url).reachable
    assert url in caplog.text
    assert server.targets().count(f"/{SMALL.info.url}") <= 4
