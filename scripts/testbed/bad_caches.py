"""A real nginx that serves one binary cache in many bad manners, each below a name of its own.

What nginx cannot be made to do is in ``tests/substituter/scripted_server.py``.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.processes import Service, free_port, listens, running

CONFIGURATION: Final = """\
{user}
daemon off;
worker_processes 1;
pid {work}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
    log_format requests escape=json
        '{{"asked":"$request_uri","status":"$status","size":"$body_bytes_sent","range":"$http_range","via":"$http_via"}}';
    access_log {work}/requests.log requests;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    default_type application/octet-stream;
    log_not_found off;
    keepalive_timeout {keepalive};
    server {{
        listen 127.0.0.1:{port};
        {tls}
        {locations}
    }}
    server {{
        listen 127.0.0.1:{proxy};
        location / {{ proxy_pass http://$http_host$request_uri; proxy_set_header Via "proxy"; }}
    }}
}}
"""

LOCATION: Final = """
        location /{name}/ {{ {everywhere} rewrite ^/{name}/(.*)$ /$1 break; root {root}; }}
        location /{name}/nar/ {{ {everywhere} {nars} rewrite ^/{name}/(.*)$ /$1 break; root {root}; }}
"""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a cache behaves: nginx's directives for everything and for NARs, and which copy of the files it has."""

    everywhere: str = ""
    nars: str = ""
    copy: str = "good"


MANNERS: Final[Mapping[str, Manner]] = {
    "good": Manner(),
    "gone": Manner(nars="return 404;"),
    "forbidden": Manner(nars="return 403;"),
    "broken": Manner(nars="return 500;"),
    "overloaded": Manner(nars="return 503;"),
    "throttled": Manner(nars='add_header Retry-After "1" always; return 429;'),
    "closed": Manner("return 401;"),
    "down": Manner("return 502;"),
    "hanging-up": Manner(nars="return 444;"),
    # The response's head counts too.
    "slow": Manner(nars="limit_rate_after 600; limit_rate 1;"),
    "mute": Manner(nars="limit_rate 1;"),
    "truncated": Manner(copy="truncated"),
    "corrupt": Manner(copy="corrupt"),
    "portal": Manner('add_header Content-Type text/html; return 200 "<html>log in</html>";'),
    # Both answer 200, with the whole file, to a request for a part.
    "without-ranges": Manner(nars="max_ranges 0;"),
    "claiming-ranges": Manner(nars="max_ranges 0; add_header Accept-Ranges bytes;"),
    # As soon as the file is there: then a proxy is in front of it that knows no parts.
    "losing-ranges": Manner(
        nars="if (-f {work}/whole) {{ rewrite ^/losing-ranges/(.*)$ /without-ranges/$1 last; }}"
    ),
    "redirecting": Manner("rewrite ^/redirecting/(.*)$ http://127.0.0.1:{port}/good/$1 redirect;"),
    "relative": Manner("absolute_redirect off; rewrite ^/relative/(.*)$ /good/$1 redirect;"),
    "circling": Manner(nars="rewrite ^(.*)$ http://127.0.0.1:{port}$1 redirect;"),
    "token": Manner(
        'set $token ""; if ($http_authorization ~ "^Bearer ([a-z0-9]+)$") {{ set $token $1; }}'
        " if (!-f {work}/tokens/$token) {{ return 401; }}"
    ),
    "password": Manner("auth_basic cache; auth_basic_user_file {work}/passwords;"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as nginx logged it. ``size``: bytes of the body that were sent; ``range``: which were asked for.

    ``proxied``: it came through the proxy.
    """

    manner: str
    name: str
    status: int
    size: int
    range: str
    proxied: bool


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of a server that speaks TLS: its chain and its key, as PEM files."""

    chain: Path
    key: Path


class BadCaches:
    """The caches while nginx runs."""

    def __init__(self, work: Path, scheme: str, port: int, proxy: int, service: Service) -> None:
        self.port = port
        self.proxy = f"http://127.0.0.1:{proxy}"
        self.tokens = work / "tokens"
        self.passwords = work / "passwords"
        self.whole = work / "whole"
        self._scheme = scheme
        self._log = work / "requests.log"
        self._service = service
        self._marks = itertools.count()

    def url(self, manner: str, port: int | None = None) -> str:
        """The cache that behaves so; ``port`` is that of a link to it."""
        return f"{self._scheme}://127.0.0.1:{port or self.port}/{manner}"

    def requests(self, manner: str | None = None) -> list[Request]:
        """The requests since the log was last cleared, in the order in which they ended."""
        mark = f"/mark-{next(self._marks)}"
        connection = http.client.HTTPConnection("127.0.0.1", self._mark_port(), timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", mark)
            connection.getresponse()
        self._service.wait_until(lambda: mark in self._log.read_text())
        found = [_request(json.loads(line)) for line in self._log.read_text().splitlines()]
        return [each for each in found if each.name and manner in (None, each.manner)]

    def nars(self, manner: str) -> list[Request]:
        """Those for NARs."""
        return [each for each in self.requests(manner) if each.name.startswith("nar/")]

    def clear(self) -> None:
        """Forget the requests so far."""
        self.requests()
        os.truncate(self._log, 0)

    def _mark_port(self) -> int:
        return self.port if self._scheme == "http" else int(self.proxy.rpartition(":")[2])


def write_copies(work: Path, good: Path) -> None:
    """Beside a cache's files those of one that has lost the end of each NAR, and of one that has changed a byte."""
    for name in ("truncated", "corrupt"):
        copy = work / name
        shutil.copytree(good, copy)
        for nar in (copy / "nar").iterdir():
            data = bytearray(nar.read_bytes())
            data[len(data) // 2] ^= 1
            nar.write_bytes(data if name == "corrupt" else data[: len(data) // 2])
    (work / "good").symlink_to(good)


@contextlib.contextmanager
def bad_caches(
    work: Path, good: Path, *, certificate: Certificate | None = None, keepalive: int = 60
) -> Iterator[BadCaches]:
    """Serve the cache in the directory ``good`` in all MANNERS for the time of the context.

    ``work`` is a directory for what is made beside it. With ``keepalive`` 0 each request has a connection of its own.
    """
    write_copies(work, good)
    (work / "tokens").mkdir()
    (work / "passwords").touch()
    port, proxy = free_port(), free_port()
    locations = "".join(_location(name, work, port) for name in MANNERS)
    configuration = work / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",
            work=work,
            keepalive=keepalive,
            port=f"{port} ssl" if certificate else port,
            proxy=proxy,
            tls=_tls(certificate),
            locations=locations,
        )
    )
    command: list[str | Path] = ["nginx", "-p", work, "-c", configuration, "-e", "stderr"]
    with running(command, log=work / "log") as service:
        service.wait_until(lambda: listens(port) and listens(proxy))
        yield BadCaches(work, "https" if certificate else "http", port, proxy, service)


def _location(name: str, work: Path, port: int) -> str:
    manner = MANNERS[name]
    values = {"work": work, "port": port}
    return LOCATION.format(
        name=name,
        everywhere=manner.everywhere.format(**values),
        nars=manner.nars.format(**values),
        root=work / manner.copy,
    )


def _tls(certificate: Certificate | None) -> str:
    if certificate is None:
        return ""
    return f"ssl_certificate {certificate.chain}; ssl_certificate_key {certificate.key};"


def _request(entry: Mapping[str, str]) -> Request:
    manner, _, name = entry["asked"].removeprefix("/").partition("/")
    status, size = int(entry["status"]), int(entry["size"])
    return Request(manner, name, status, size, entry["range"], proxied=entry["via"] == "proxy")
