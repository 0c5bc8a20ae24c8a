"""A store to publish from, and destinations of every sort."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fusesnap.nix.store_path import StoreDir
from fusesnap.publish.destination import Destination, DirectoryDestination
from fusesnap.publish.packing import Compressor, Packer
from fusesnap.publish.publisher import Publisher
from fusesnap.publish.source import StoreSource
from fusesnap.store.local_store import LocalStore

from ..store.conftest import Tree, commit_path, make_path, path_named
from ..substituter.samples import KEY

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
