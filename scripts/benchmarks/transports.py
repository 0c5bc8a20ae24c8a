"""What carries NARs best: HTTP/2 on one connection, or several connections of HTTP/1.1."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import ssl
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import trio
import trustme
from rich.console import Console
from rich.table import Table
from testbed.link_process import slow_link
from testbed.processes import free_port, listens, running
from testbed.workplace import run_directory

from fusesnap.substituter.client import make_client, tls_context
from fusesnap.substituter.http import HttpSubstituter

DESCRIPTION = """\
Fetches files as large as NARs from an nginx with TLS and HTTP/2, as fusesnap's substituter reads NARs, by httpx over
HTTP/2 on one connection and over HTTP/1.1 on several; over a link of 20 Mbit/s and 80 ms, and over loopback. Everybody
begins without a connection. Then a reader comes: a large file is left, as one that is paused, and a small one is asked
for. The sides take turns. Shows seconds, and seconds of CPU of the process that fetches.
"""
CONFIGURATION: Final = """\
{user}
daemon off;
worker_processes 1;
pid {work}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    server {{
        listen 127.0.0.1:{port} ssl http2;
        ssl_certificate {work}/certificate.pem;
        ssl_certificate_key {work}/key.pem;
        root {work}/files;
    }}
}}
"""
RATE, ROUND_TRIP = 20e6, 0.08  # bits a second, seconds
SECONDS: Final = 300.0  # for anything that should take less


@dataclass(frozen=True, slots=True)
class NarFile:
    """A file that is asked for like a NAR."""

    url: str
    nar_size: int

    @property
    def file_size(self) -> int:
        return self.nar_size


@dataclass(frozen=True, slots=True)
class Transport:
    """``requests`` that are under way at once at most, on so many ``connections``."""

    http2: bool
    connections: int
    requests: int

    @property
    def version(self) -> str:
        """What a response says that came so."""
        return "HTTP/2" if self.http2 else "HTTP/1.1"


@dataclass(frozen=True, slots=True)
class Order:
    """``files`` to be fetched, after the beginning of one that is ``left``; the clock starts at that."""

    files: Sequence[NarFile]
    left: NarFile | None = None


SIDES: Final = {
    "HTTP/2 x 1": Transport(http2=True, connections=1, requests=16),
    "HTTP/1.1 x 4": Transport(http2=False, connections=4, requests=4),
    "HTTP/1.1 x 16": Transport(http2=False, connections=16, requests=16),
}
SMALL: Final = [NarFile(f"small-{number}", 100_000) for number in range(50)]
LARGE: Final = [NarFile(f"large-{number}", 10_000_000) for number in range(3)]
ORDERS: Final = {
    "50 of 100 kB": Order(SMALL),
    "3 of 10 MB": Order(LARGE),
    "1 of 10 MB": Order(LARGE[:1]),
    "100 kB, reader": Order(SMALL[:1], left=LARGE[0]),
}


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one turn, and of the processor."""

    seconds: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Cache:
    """The ways to a server, by name, and the file with who vouches for it."""

    urls: Mapping[str, str]
    ca_file: Path


@contextlib.contextmanager
def cache(work: Path) -> Iterator[Cache]:
    """Serve the files, also over the link."""
    write_files(work / "files")
    write_certificate(work)
    port = free_port()
    configuration = work / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # the directory may be readable by us alone
    configuration.write_text(CONFIGURATION.format(user=user, work=work, port=port))
    command: list[str | Path] = ["nginx", "-p", work, "-c", configuration, "-e", "stderr"]
    with running(command, log=work / "nginx.log") as service:
        service.wait_until(lambda: listens(port))
        with slow_link({"cache": port}, work, rate=RATE, round_trip=ROUND_TRIP) as link:
            ways = {"20 Mbit/s": link.port("cache"), "loopback": port}
            urls = {way: f"https://127.0.0.1:{each}" for way, each in ways.items()}
            yield Cache(urls, work / "authority.pem")


def write_files(directory: Path) -> None:
    """Files that nothing makes smaller."""
    directory.mkdir()
    for file in (*SMALL, *LARGE):
        (directory / file.url).write_bytes(random.Random(file.url).randbytes(file.nar_size))  # noqa: S311


def write_certificate(work: Path) -> None:
    """The server's, and who has issued it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(work / "authority.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(work / "key.pem"))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(work / "certificate.pem"), append=True)


def fetch(url: str, tls: ssl.SSLContext, transport: Transport, order: Order) -> Taken:
    """Fetch what is ordered from ``url``, beginning without a connection."""

    async def fetch_all() -> Taken:
        spoken: set[str] = set()

        async def note(response: httpx.Response) -> None:
            spoken.add(response.http_version)

        files = iter(order.files)
        options = {"http2": transport.http2, "max_connections": transport.connections}
        async with make_client(tls=tls, **options) as client:  # type: ignore[arg-type]
            client.event_hooks = {"response": [note]}
            substituter = HttpSubstituter(url, client)

            async def fetch_some() -> None:
                for file in files:
                    async with substituter.nar(file) as pieces:
                        received = sum([len(piece) async for piece in pieces])
                    assert received == file.nar_size  # noqa: S101

            if order.left is not None:
                async with substituter.nar(order.left) as pieces:
                    await anext(pieces)
            began, cpu = time.monotonic(), time.process_time()
            with trio.fail_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    for _ in range(min(transport.requests, len(order.files))):
                        nursery.start_soon(fetch_some)
            taken = Taken(time.monotonic() - began, time.process_time() - cpu)
        assert spoken == {transport.version}, spoken  # noqa: S101
        return taken

    return trio.run(fetch_all)


Results = dict[tuple[str, str, str], list[Taken]]


def measure(rounds: int) -> Results:
    """What each turn took, by way, files and side."""
    results: Results = {}
    with run_directory("fs-transports-") as work, cache(work) as served:
        for number in range(rounds):
            for way, url in served.urls.items():
                for what, order in ORDERS.items():
                    for side, transport in SIDES.items():
                        # Read before, and for this client alone: it sets in it which versions it offers.
                        taken = fetch(url, tls_context(served.ca_file), transport, order)
                        results.setdefault((way, what, side), []).append(taken)
                        told = f"{taken.seconds:.2f} s, CPU {taken.cpu:.3f}"
                        print(
                            f"{number + 1}/{rounds} {way}; {what}; {side}: {told}",
                            file=sys.stderr,
                            flush=True,
                        )
    return results


def main() -> int:
    """Measure, print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench transports", description=DESCRIPTION)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds")
    given = parser.parse_args()
    results = measure(given.rounds)
    if given.json:
        print(
            json.dumps(
                [[*key, [[t.seconds, t.cpu] for t in taken]] for key, taken in results.items()]
            )
        )
        return 0
    table = Table(title=f"medians of {given.rounds} turns, seconds", title_justify="left")
    for column in ("way", "files", "side", "median", "least", "most", "CPU"):
        text = column in ("way", "files", "side")
        table.add_column(column, justify="left" if text else "right")
    for key, taken in results.items():
        seconds = [each.seconds for each in taken]
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        cpu = statistics.median(each.cpu for each in taken)
        table.add_row(*key, *(f"{each:.2f}" for each in figures), f"{cpu:.3f}")
    Console(highlight=False, soft_wrap=True).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
