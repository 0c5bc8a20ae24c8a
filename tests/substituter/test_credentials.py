"""Tokens and passwords: who is told which, and that they are read anew when they change."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from trio.testing import MockClock

from fusesnap.errors import InvalidConfiguration, PathNotFound
from fusesnap.substituter.credentials import LOOK_EVERY, MAX_TOKEN, Secrets
from fusesnap.substituter.http import HttpSubstituter
from fusesnap.substituter.retry import Refusal
from tests.substituter.exchanges import BIG, NAR, NARINFO, read
from tests.substituter.scripted_server import MemoryNetwork, Reply, ScriptedServer

Open = Callable[..., HttpSubstituter]


@pytest.fixture
def open_cache(client: httpx.AsyncClient) -> Open:
    def make(url: str = "http://cache", **secrets: object) -> HttpSubstituter:
        return HttpSubstituter(url, client, secrets=Secrets(**secrets))  # type: ignore[arg-type]

    return make


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def said(server: ScriptedServer) -> list[str | None]:
    return [request.headers.get("authorization") for request in server.requests]


def write(path: Path, text: str) -> Path:
    """Write a file as those do that renew tokens: another file takes its name."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    return fresh.rename(path)


class Guarded(ScriptedServer):
    """Takes one word, and refuses whoever does not say it with ``status``."""

    def __init__(self, word: str, status: int = 401) -> None:
        super().__init__()
        self.word = word
        self._status = status
        self.on(NARINFO, Reply(200, BIG.narinfo))
        self.on(NAR, Reply(200, BIG.file))

    def _reply(self, target: str) -> Reply:
        if self.requests[-1].headers.get("authorization") != self.word:
            return Reply(self._status, b"<html>who are you?</html>")
        return super()._reply(target)


async def test_netrc_is_by_host(network: MemoryNetwork, open_cache: Open, tmp_path: Path) -> None:
    netrc = write(tmp_path / "netrc", "machine cache login me password secret\n")
    for host in ("cache", "other"):
        network.server(host).on(NARINFO, Reply(200, BIG.narinfo))
    for url in ("http://cache", "http://other", "http://you:too@cache"):
        await open_cache(url, netrc_file=netrc).narinfo(BIG.path)
    assert said(network.servers["cache"]) == [basic("me", "secret"), basic("you", "too")]
    assert said(network.servers["other"]) == [None]


async def test_token_is_for_its_cache_and_comes_before_a_password(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path
) -> None:
    token = write(tmp_path / "token", "s3cret-1\n")
    netrc = write(tmp_path / "netrc", "machine cache login me password secret\n")
    elsewhere = network.server("elsewhere")
    elsewhere.on("/it", Reply(200, BIG.file))
    server = network.server("cache")
    server.on(NARINFO, Reply(200, BIG.narinfo))
    server.on(NAR, Reply(302, headers={"Location": "http://elsewhere/it"}))
    cache = open_cache(token_files={"http://cache/": token}, netrc_file=netrc)
    assert await read(cache, await cache.narinfo(BIG.path)) == BIG.file
    assert said(server) == ["Bearer s3cret-1"] * 2
    assert said(elsewhere) == [None]


@pytest.mark.parametrize("status", [401, 403])
async def test_a_token_that_expires_is_read_anew_at_once(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path, status: int
) -> None:
    token = write(tmp_path / "token", "old")
    server = network.servers["cache"] = Guarded("Bearer old", status)
    cache = open_cache(token_files={"http://cache": token})
    await cache.narinfo(BIG.path)
    write(token, "new")
    server.word = "Bearer new"
    assert await read(cache, BIG.info) == BIG.file
    assert said(server) == ["Bearer old", "Bearer old", "Bearer new"]


async def test_a_netrc_that_changes_is_read_anew_at_once(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path
) -> None:
    netrc = write(tmp_path / "netrc", "machine cache login me password old\n")
    server = network.servers["cache"] = Guarded(basic("me", "new"))
    cache = open_cache(netrc_file=netrc)
    write(netrc, "machine cache login me password new\n")
    await cache.narinfo(BIG.path)
    assert said(server)[-1] == basic("me", "new")


async def test_a_file_is_looked_at_before_the_old_word_is_refused(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path, mock_clock: MockClock
) -> None:
    token = write(tmp_path / "token", "old")
    server = network.server("cache")
    server.on(NARINFO, Reply(200, BIG.narinfo))
    cache = open_cache(token_files={"http://cache": token})
    await cache.narinfo(BIG.path)
    write(token, "new")
    mock_clock.jump(LOOK_EVERY)
    await cache.narinfo(BIG.path)
    assert said(server) == ["Bearer old", "Bearer new"]


async def test_what_is_not_accepted_is_sent_once_and_explained(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path
) -> None:
    token = write(tmp_path / "token", "wrong")
    netrc = write(tmp_path / "netrc", "machine cache login me password wrong\n")
    server = network.servers["cache"] = Guarded("Bearer right")
    expected: dict[str, dict[str, object]] = {
        "http://cache: 401 unauthorized: nothing is configured for it": {},
        f"the token in {token} is not accepted": {"token_files": {"http://cache": token}},
        f"the user and password for cache in {netrc} are not accepted": {"netrc_file": netrc},
    }
    for message, secrets in expected.items():
        with pytest.raises(Refusal) as caught:
            await open_cache(**secrets).narinfo(BIG.path)
        assert message in str(caught.value)
        assert "wrong" not in str(caught.value)
    with pytest.raises(Refusal, match="the user and password of its URL are not accepted"):
        await open_cache("http://me:wrong@cache").narinfo(BIG.path)
    assert len(server.requests) == 4


async def test_forbidden_is_not_found_only_for_those_who_were_let_in_before(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path
) -> None:
    """Some servers say 403 of a file that is not there, and all say it of a word that is worth nothing."""
    token = write(tmp_path / "token", "word")
    server = network.server("cache")
    server.on(NARINFO, Reply(403), Reply(200, BIG.narinfo), Reply(403))
    cache = open_cache(token_files={"http://cache": token})
    with pytest.raises(Refusal, match="403 forbidden"):
        await cache.narinfo(BIG.path)
    await cache.narinfo(BIG.path)
    with pytest.raises(PathNotFound):
        await cache.narinfo(BIG.path)


async def test_a_file_that_cannot_be_read_any_more_is_told_once_and_the_old_word_used(
    network: MemoryNetwork,
    open_cache: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = write(tmp_path / "token", "word")
    server = network.servers["cache"] = Guarded("Bearer other")
    cache = open_cache(token_files={"http://cache": token})
    caplog.set_level(logging.WARNING)
    for change in (token.unlink, token.unlink, lambda: write(token, "two words")):
        if change != token.unlink or token.exists():
            change()
        with pytest.raises(Refusal):
            await cache.narinfo(BIG.path)
    assert [record.getMessage() for record in caplog.records] == [
        f"token file {token} cannot be read: No such file or directory",
        f"token file {token} cannot be read: expected one token, of printable ASCII without spaces",
    ]
    assert said(server) == ["Bearer word"] * 3
    write(token, "other")
    await cache.narinfo(BIG.path)


@pytest.mark.parametrize("contents", [None, "", "two words", "caf\xe9", "x" * (MAX_TOKEN + 1)])
def test_token_that_cannot_be_used(tmp_path: Path, contents: str | None) -> None:
    token = tmp_path / "token"
    if contents is not None:
        token.write_text(contents)
    with pytest.raises(
        InvalidConfiguration, match=f"token file {token} cannot be read: "
    ) as caught:
        Secrets(token_files={"http://cache": token})
    assert contents is None or not contents or contents not in str(caught.value)


@pytest.mark.parametrize("contents", [None, b"nonsense cache", b"\xff\xfe"])
def test_netrc_that_cannot_be_read(tmp_path: Path, contents: bytes | None) -> None:
    netrc = tmp_path / "netrc"
    if contents is not None:
        netrc.write_bytes(contents)
    with pytest.raises(InvalidConfiguration, match=f"netrc file {netrc} cannot be read: "):
        Secrets(netrc_file=netrc)


async def test_a_file_behind_a_link_that_is_turned(
    network: MemoryNetwork, open_cache: Open, tmp_path: Path
) -> None:
    """As Kubernetes renews what it mounts of a secret."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "token", name)
    link = tmp_path / "current"
    link.symlink_to("old")
    network.servers["cache"] = Guarded("Bearer new")
    cache = open_cache(token_files={"http://cache": link / "token"})
    (tmp_path / "next").symlink_to("new")
    os.rename(tmp_path / "next", link)  # noqa: PTH104 - a link is renamed over a link
    await cache.narinfo(BIG.path)
