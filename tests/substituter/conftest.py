"""Networks, servers and clients for the tests of binary caches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trio
import trustme
from testbed.processes import free_port, listens, running

from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.base import Meter, unmetered
from fusesnap.substituter.breaker import BreakerPolicy
from fusesnap.substituter.client import make_client
from fusesnap.substituter.http import HttpSubstituter, Timeouts
from fusesnap.substituter.memory import MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy
from tests.substituter.caches import MakePool, WallClock
from tests.substituter.samples import TRUSTED
from tests.substituter.scripted_server import MemoryNetwork, ScriptedServer

NGINX = """\
{user}
daemon off;
worker_processes 1;
pid {work}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    log_not_found off;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    default_type application/octet-stream;
    sendfile on;
    keepalive_requests 300;  # so that connections end in the middle of a test
    gzip on;
    gzip_types *;
    gzip_min_length 1;
    server {{
        listen 127.0.0.1:{http};
        root {root};
    }}
    server {{
        listen 127.0.0.1:{https} ssl http2;
        ssl_certificate {work}/certificate.pem;
        ssl_certificate_key {work}/key.pem;
        root {root};
    }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A real nginx that serves ``root`` over HTTP/1.1 and, with TLS, over HTTP/2."""

    root: Path
    http: str
    https: str
    ca_file: Path


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    work = tmp_path_factory.mktemp("nginx")
    root = work / "root"
    root.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(work / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(work / "key.pem"))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(str(work / "certificate.pem"), append=True)
    http, https = free_port(), free_port()
    user = "user root;" if Path("/proc/self").stat().st_uid == 0 else ""
    configuration = work / "nginx.conf"
    configuration.write_text(NGINX.format(user=user, work=work, http=http, https=https, root=root))
    command: list[str | Path] = ["nginx", "-p", work, "-c", configuration, "-e", "stderr"]
    with running(command, log=work / "log") as service:
        service.wait_until(lambda: listens(http) and listens(https))
        yield Nginx(root, f"http://127.0.0.1:{http}", f"https://127.0.0.1:{https}", work / "ca.pem")


@pytest.fixture
def network(nursery: trio.Nursery) -> MemoryNetwork:
    return MemoryNetwork(nursery)


@pytest.fixture
def server(network: MemoryNetwork) -> ScriptedServer:
    """The server of ``http://cache``."""
    return network.server("cache")


@pytest.fixture
async def client(network: MemoryNetwork) -> AsyncIterator[httpx.AsyncClient]:
    """A client on the network in memory."""
    async with network.attach(make_client()) as client:
        yield client


@pytest.fixture
def cache(client: httpx.AsyncClient) -> Callable[..., HttpSubstituter]:
    """Makes the substituter ``http://cache``, with times that are easily told apart."""

    def make(
        url: str = "http://cache", *, attempts: int = 3, meter: Meter = unmetered
    ) -> HttpSubstituter:
        return HttpSubstituter(
            url,
            client,
            retry=RetryPolicy(attempts=attempts, random=lambda: 1.0),
            timeouts=Timeouts(connect=2, stall=5, lookup=8),
            meter=meter,
        )

    return make


@pytest.fixture
def wall_clock() -> WallClock:
    return WallClock()


@pytest.fixture
def disk(wall_clock: WallClock) -> Iterator[NarInfoCache]:
    cache = NarInfoCache(":memory:", wall_clock)
    yield cache
    cache.close()


@pytest.fixture
def make_pool(disk: NarInfoCache) -> MakePool:
    def make(
        *caches: MemorySubstituter,
        attempts: int = 1,
        deadline: float = 30,
        keys: TrustedKeys = TRUSTED,
    ) -> SubstituterPool:
        return SubstituterPool(
            caches,
            store_dir=StoreDir(),
            trusted_keys=keys,
            narinfo_cache=disk,
            retry=RetryPolicy(attempts=attempts, random=lambda: 1.0),
            deadline=deadline,
            breaker=BreakerPolicy(random=lambda: 1.0),
        )

    return make
