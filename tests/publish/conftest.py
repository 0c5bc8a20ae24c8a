"""A store to publish from, and destinations of every sort."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from testbed.processes import free_port, listens, running

from fusesnap.nix.store_path import StoreDir
from fusesnap.publish.destination import Destination, DirectoryDestination
from fusesnap.publish.http_destination import HttpDestination
from fusesnap.publish.packing import Compressor, Packer
from fusesnap.publish.publisher import Publisher
from fusesnap.publish.s3_destination import S3Destination
from fusesnap.publish.source import StoreSource
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.retry import RetryPolicy

from ..store.conftest import Tree, commit_path, make_path, path_named
from ..substituter.samples import KEY
from .s3_server import ACCESS_KEY, SECRET_KEY, Bucket, s3_server

CHUNK = 4096
LARGE = random.Random(1).randbytes(5 * CHUNK + 77)  # noqa: S311 - not for secrets
LEAF, LIBRARY, TOP = (path_named(name) for name in ("leaf", "library", "top"))


def trees() -> dict[str, tuple[Tree, tuple[str, ...]]]:
    """A closure of three paths; the last one refers to the others and to itself."""
    return {
        "leaf": (b"only a file", ()),
        "library": (
            {"lib": {"a.so": LARGE, "b.so": "a.so"}, "empty": {}, "note": f"{LEAF}\n".encode()},
            ("leaf",),
        ),
        "top": (
            {
                "bin": {"run": (f"#!/nix/store/{LIBRARY}/x\n/nix/store/{TOP}\n".encode(),)},
                "share": {f"{i:03}": f"{LEAF} {i} ".encode() * i for i in range(40)},
            },
            ("leaf", "library", "top"),
        ),
    }


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory in whose store the closure is valid."""
    directory = tmp_path_factory.mktemp("state")
    with LocalStore.open(directory, StoreDir(), clock=lambda: 1.0) as store:
        for name, (tree, references) in trees().items():
            commit_path(store, make_path(name, tree, references))
    return directory


@pytest.fixture
def source(state: Path) -> Iterator[StoreSource]:
    opened = StoreSource.at(state, StoreDir())
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def packer() -> Iterator[Packer]:
    with ThreadPoolExecutor(2) as executor:
        yield Packer(executor, Compressor(3), CHUNK)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def destination(directory: Path) -> DirectoryDestination:
    return DirectoryDestination(directory)


@pytest.fixture
def make_publisher(source: StoreSource, packer: Packer) -> Callable[[Destination], Publisher]:
    return lambda destination: Publisher(source, destination, packer, KEY, StoreDir(), priority=40)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient() as opened:
        yield opened


NGINX = """\
{user} daemon off; worker_processes 1; pid {work}/nginx.pid; error_log stderr warn;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {work}/body; proxy_temp_path {work}/p;
    fastcgi_temp_path {work}/f; uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;
    server {{
        listen 127.0.0.1:{port}; root {work}/root; client_max_body_size 0;
        location / {{ dav_methods PUT; create_full_put_path on; dav_access user:rw group:r all:r; }}
        location /forbidden/ {{ return 403; }}
        location /locked/ {{ auth_basic x; auth_basic_user_file {work}/passwords; dav_methods PUT;
                            create_full_put_path on; }}
    }}
}}
"""


async def no_wait(seconds: float) -> None:
    """Try again at once."""


RETRY = RetryPolicy(sleep=no_wait)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nginx's URL."""
    work = tmp_path_factory.mktemp("nginx")
    (work / "root").mkdir()
    (work / "passwords").write_text("me:{PLAIN}secret\n")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (work / "nginx.conf").write_text(NGINX.format(work=work, port=port, user=user))
    command: list[str | Path] = ["nginx", "-p", work, "-c", work / "nginx.conf", "-e", "stderr"]
    with running(command, log=work / "log") as service:
        service.wait_until(lambda: listens(port))
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with s3_server() as served:
        yield served


@pytest.fixture(params=["directory", "http", "s3"])
def each(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    client: httpx.AsyncClient,
    server: str,
    bucket: Bucket,
) -> Destination:
    spool = tmp_path / "spool"
    spool.mkdir()
    made: dict[str, Callable[[], Destination]] = {
        "directory": lambda: DirectoryDestination(tmp_path / "cache"),
        "http": lambda: HttpDestination(f"{server}/{tmp_path.name}", client, spool, retry=RETRY),
        "s3": lambda: S3Destination(bucket.url, spool),
    }
    return made[request.param]()
