"""Binary caches, in directories and behind a real server whose clock can be set."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fusesnap.config import Settings, load
from fusesnap.daemon.doctor.caches import Clock, clock_findings, examine_caches, keys
from fusesnap.daemon.doctor.findings import Finding, Level
from fusesnap.substituter.narinfo_cache import NarInfoCache
from tests.substituter.samples import CACHE_INFO, KEY, Sample, secret_key
from tests.substituter.samples import sample as make_sample

OTHER = secret_key("other-1")


@pytest.fixture
def sample() -> Sample:
    return make_sample("signed")


@pytest.fixture
def directory(tmp_path: Path, sample: Sample) -> Path:
    """A cache with one path."""
    directory = tmp_path / "cache"
    directory.mkdir()
    (directory / "nix-cache-info").write_bytes(CACHE_INFO)
    (directory / sample.narinfo_name).write_bytes(sample.narinfo)
    return directory


@contextmanager
def served(directory: Path, ahead: float = 0.0) -> Iterator[str]:
    """The files of ``directory`` from a server whose clock is so many seconds ahead; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = directory / self.path.lstrip("/")
            self.send_response(200 if file.is_file() else 404)
            data = file.read_bytes() if file.is_file() else b""
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + ahead, usegmt=True)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def settings(
    tmp_path: Path, *urls: str, keys: tuple[str, ...] = (str(KEY.public_key()),)
) -> Settings:
    given = {"root": str(tmp_path / "state"), "substituters": list(urls)}
    return load(None, given | {"trusted-public-keys": list(keys)})


def found(given: Settings, sample: str | None = None) -> list[Finding]:
    return examine_caches(given, sample)


def test_a_cache_that_is_well(tmp_path: Path, directory: Path, sample: Sample) -> None:
    with served(directory) as url:
        findings = found(settings(tmp_path, url), f"/nix/store/{sample.path}")
    assert [(each.subject, each.level) for each in findings] == [
        ("keys", Level.OK),
        (url, Level.OK),
        (url, Level.OK),
        ("clock", Level.OK),
    ]
    assert "store directory /nix/store" in findings[1].said
    assert findings[2].said == f"signatures: {sample.path} is signed by key-1"
    assert not (tmp_path / "state").exists()


def test_a_path_to_look_at_is_found_among_the_files(
    tmp_path: Path, directory: Path, sample: Sample
) -> None:
    findings = found(settings(tmp_path, f"file://{directory}"))
    assert findings[-1].said == f"signatures: {sample.path} is signed by key-1"


def test_a_path_to_look_at_is_remembered(tmp_path: Path, directory: Path, sample: Sample) -> None:
    with served(directory) as url:
        assert "--sample" in found(settings(tmp_path, url))[2].said
        (tmp_path / "state").mkdir()
        with closing(NarInfoCache(tmp_path / "state" / "narinfo-cache.sqlite", time.time)) as cache:
            cache.remember(url, sample.path, sample.info)
        findings = found(settings(tmp_path, url))
    assert findings[2].said == f"signatures: {sample.path} is signed by key-1"


def test_signatures_of_nobody_who_is_trusted(tmp_path: Path, directory: Path) -> None:
    given = settings(tmp_path, f"file://{directory}", keys=(str(OTHER.public_key()),))
    finding = found(given)[-1]
    assert (finding.level, finding.status) == (Level.FAILURE, 77)
    assert "signed by 'key-1', not trusted" in finding.said
    assert "trusted-public-keys" in finding.mend
    assert keys(given).said == "trusted: other-1"
    none = keys(settings(tmp_path, f"file://{directory}", keys=()))
    assert (none.level, "trusted-public-keys" in none.mend) == (Level.WARNING, True)


def test_a_cache_of_another_store_directory(tmp_path: Path, directory: Path) -> None:
    (directory / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    finding = found(settings(tmp_path, f"file://{directory}"))[-1]
    assert (finding.level, finding.status) == (Level.FAILURE, 78)
    assert "/gnu/store, ours is /nix/store" in finding.said


def test_caches_that_do_not_answer(tmp_path: Path, directory: Path) -> None:
    with served(directory) as url:
        pass
    gone, here = f"file://{tmp_path}/gone", f"file://{directory}"
    levels = {each.subject: each.level for each in found(settings(tmp_path, url, gone, here))}
    assert levels == {"keys": Level.OK, url: Level.FAILURE, gone: Level.FAILURE, here: Level.OK}


def test_a_sample_that_is_no_store_path(tmp_path: Path, directory: Path) -> None:
    finding = found(settings(tmp_path, f"file://{directory}"), "/nix/store/x")[-1]
    assert (finding.subject, finding.level) == ("caches", Level.FAILURE)


def test_a_password_file_that_is_not_there(tmp_path: Path, directory: Path) -> None:
    given = settings(tmp_path, f"file://{directory}").model_copy(
        update={"netrc_file": tmp_path / "netrc"}
    )
    finding = found(given)[-1]
    assert (finding.level, finding.status) == (Level.FAILURE, 78)
    assert str(tmp_path / "netrc") in finding.said


def test_a_token_for_nobody(tmp_path: Path, directory: Path) -> None:
    token = tmp_path / "token"
    token.write_text("word")
    with served(directory) as url:
        given = settings(tmp_path, f"{url}?priority=3").model_copy(
            update={"token_files": {url: token, "https://other.example.org": token}}
        )
        (finding,) = (each for each in found(given) if each.subject == "tokens")
    assert finding.level == Level.WARNING
    assert "https://other.example.org is not among substituters" in finding.said


def test_a_clock_that_is_wrong(tmp_path: Path, directory: Path) -> None:
    with served(directory, ahead=600) as url:
        finding = found(settings(tmp_path, url))[-1]
    assert (finding.subject, finding.level) == ("clock", Level.WARNING)
    assert " s behind 127.0.0.1" in finding.said
    (finding,) = clock_findings(Clock({"far": -90_000.0}))
    assert (finding.level, "ahead of far" in finding.said) == (Level.FAILURE, True)
    assert "set-ntp" in finding.mend


def test_one_cache_whose_clock_is_wrong_says_nothing_of_ours() -> None:
    (finding,) = clock_findings(Clock({"wrong": 5000.0, "right": -1.0}))
    assert (finding.level, finding.said) == (Level.OK, "agrees with right")
    assert clock_findings(Clock()) == []
