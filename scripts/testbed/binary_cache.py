"""A signed binary cache, written by real ``nix copy`` or by ``fusesnap publish``, and served by a real nginx."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.nix_store import NixStore
from testbed.processes import Service, free_port, listens, run, running

CONFIGURATION = """\
{user}
daemon off;
worker_processes 1;
pid {work}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    log_format requests escape=json
        '{{"method":"$request_method","path":"$request_uri","status":$status,"size":$body_bytes_sent,'
        '"range":"$http_range"}}';
    access_log {work}/requests.log requests;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    default_type application/octet-stream;
    types {{ text/x-nix-narinfo narinfo; text/x-nix-cache-info cache-info; }}
    sendfile on;
    keepalive_requests 100000;
    log_not_found off;
    server {{
        listen 127.0.0.1:{port};
        root {directory};
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key pair in Nix's text form; the secret half stays in its file."""

    public: str
    secret_file: Path


def signing_key(directory: Path, name: str = "testbed-1") -> SigningKey:
    """The key pair ``name`` kept in ``directory``; it is made when there is none."""
    directory.mkdir(parents=True, exist_ok=True)
    secret = directory / f"{name}.secret"
    if not secret.exists():
        # nix-store can do it too, but makes /nix on the host for it.
        text = nix("key", "generate-secret", "--key-name", name)
        secret.touch(mode=0o600)
        secret.write_text(text)
    return SigningKey(nix("key", "convert-secret-to-public", stdin=secret.read_text()), secret)


def write_cache(
    store: NixStore,
    roots: Sequence[str],
    directory: Path,
    *,
    compression: str = "xz",
    key: SigningKey | None = None,
) -> CacheFiles:
    """``nix copy`` the closures of ``roots`` into a binary cache; what is there already stays.

    ``compression`` is none, xz, zstd, bzip2 or gzip. Without ``key`` no path is signed.
    """
    sign = f"&secret-key={key.secret_file}" if key else ""
    target = f"file://{directory}?compression={compression}{sign}"
    with store.locked():
        nix("copy", "--from", store.uri, "--to", target, *roots)
    return CacheFiles(directory)


def publish_cache(
    store: NixStore, roots: Sequence[str], directory: Path, key: SigningKey
) -> CacheFiles:
    """``fusesnap publish`` the closures of ``roots``; what is there already stays."""
    program = Path(sys.executable).with_name("fusesnap")
    options: list[str | Path] = [
        "--from",
        store.directory,
        "--to",
        directory,
        "--secret-key-file",
        key.secret_file,
    ]
    with store.locked():
        run([program, "publish", *options, "--closure", *roots], timeout=900)
    return CacheFiles(directory)


@dataclass(frozen=True, slots=True)
class CacheFiles:
    """The files of a binary cache."""

    directory: Path

    def narinfo_file(self, path: str) -> Path:
        return self.directory / f"{hash_part(path)}.narinfo"

    def narinfo(self, path: str) -> dict[str, str]:
        """The fields of a path's narinfo; of a repeated field the last."""
        lines = self.narinfo_file(path).read_text().splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def nar_file(self, path: str) -> Path:
        return self.directory / self.narinfo(path)["URL"]

    def compressed_size(self, paths: Iterable[str]) -> int:
        """How many bytes the paths' NARs have as the cache stores them."""
        return sum(int(self.narinfo(path)["FileSize"]) for path in paths)


@dataclass(frozen=True, slots=True)
class Request:
    """One request as nginx logged it; ``size`` is the bytes of the answer's body that were sent.

    ``range`` is what the request's header of that name said.
    """

    method: str
    path: str
    status: int
    size: int
    range: str = ""


def parse_requests(log: str) -> list[Request]:
    """The requests of an access log in the form of CONFIGURATION, a JSON object a line."""
    return [Request(**json.loads(line)) for line in log.splitlines()]


class HttpCache:
    """A binary cache behind nginx on a port of 127.0.0.1 that stays the same over stop and start."""

    def __init__(self, files: CacheFiles, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.files = files
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._work = work
        self._marks = itertools.count()
        self._running = contextlib.ExitStack()
        self._service: Service | None = None
        self._log = work / "requests.log"
        self._log.touch()

    def start(self) -> None:
        """Serve; returns once connections are accepted."""
        configuration = self._work / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""  # the work dir may be readable by us alone
        configuration.write_text(
            CONFIGURATION.format(
                user=user, work=self._work, port=self.port, directory=self.files.directory
            )
        )
        self._service = self._running.enter_context(
            running(
                ["nginx", "-p", self._work, "-c", configuration, "-e", "stderr"],
                log=self._work / "nginx.log",
            )
        )
        self._service.wait_until(lambda: listens(self.port))

    def stop(self) -> None:
        """Stop serving, in the middle of whatever is under way: connections are refused from now on."""
        self._service = None
        self._running.close()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Answer nothing for the time of the context: connections are accepted, and nothing comes."""
        master = self._service.pid if self._service else os.getpid()
        workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        for pid in workers:
            os.kill(int(pid), signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in workers:
                os.kill(int(pid), signal.SIGCONT)

    def requests(self) -> list[Request]:
        """All requests that were answered so far, in the order in which they ended.

        nginx logs a request after the client has its last byte; so one more is sent, and when that one is in the log
        all earlier ones are (there is one worker).
        """
        if self._service is not None:
            mark = f"/testbed-mark-{next(self._marks)}"
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", mark)
                connection.getresponse()
            self._service.wait_until(lambda: f'"{mark}"' in self._log.read_text())
        requests = parse_requests(self._log.read_text())
        return [each for each in requests if not each.path.startswith("/testbed-mark-")]

    def requested_nars(self, paths: Iterable[str]) -> set[str]:
        """Those of ``paths`` whose NAR, or a part of it, was sent since the log was last cleared."""
        asked = {request.path.lstrip("/") for request in self.requests() if request.status < 400}
        return {path for path in paths if self.files.narinfo(path)["URL"] in asked}

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        self.requests()  # so that none of them is logged later
        os.truncate(self._log, 0)


@contextlib.contextmanager
def http_cache(files: CacheFiles, work: Path) -> Iterator[HttpCache]:
    """Serve a binary cache for the time of the context. ``work`` is a directory for nginx's own files."""
    cache = HttpCache(files, work)
    try:
        cache.start()
        yield cache
    finally:
        cache.stop()


def nix(*arguments: str, stdin: str | None = None) -> str:
    """Run ``nix`` and return what it prints, without the end of the line."""
    environment = {"NIX_CONFIG": "experimental-features = nix-command"}
    return run(["nix", *arguments], env=environment, stdin=stdin, timeout=900).strip()


def hash_part(path: str) -> str:
    """The hash part of a full store path."""
    return Path(path).name.partition("-")[0]
