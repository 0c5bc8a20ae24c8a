"""Nodes without a mount, as the daemon builds them, in front of caches that misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from testbed.bad_caches import BadCaches, bad_caches

from fusesnap.config import check
from fusesnap.daemon.build import Node, open_node

from ..substituter.samples import CACHE_INFO, KEY, Sample, sample

MakeNode = Callable[..., AbstractAsyncContextManager[Node]]

# Neither compresses: what nginx sends are as many bytes as the NAR has.
LARGE = sample("large", size=3_000_000, compression="none")
SMALL = sample("small", size=20_000, compression="none")
MANY = [sample(f"one-of-many-{number}", size=2_000, compression="none") for number in range(120)]


def publish(directory: Path, *samples: Sample) -> Path:
    """Write a binary cache."""
    (directory / "nar").mkdir(parents=True)
    (directory / "nix-cache-info").write_bytes(CACHE_INFO)
    for each in samples:
        (directory / each.narinfo_name).write_bytes(each.narinfo)
        (directory / each.info.url).write_bytes(each.file)
    return directory


@pytest.fixture(scope="session")
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("cache") / "files", LARGE, SMALL, *MANY)


@pytest.fixture(scope="session")
def all_caches(
    cache_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BadCaches]:
    with bad_caches(tmp_path_factory.mktemp("nginx"), cache_directory) as caches:
        yield caches


@pytest.fixture
def caches(all_caches: BadCaches) -> BadCaches:
    all_caches.clear()
    return all_caches


@pytest.fixture
def make_node(tmp_path: Path) -> MakeNode:
    """A node with the given caches; ``fetch`` and ``settings`` are keys of the configuration."""

    @asynccontextmanager
    async def make(
        *urls: str, root: Path | None = None, fetch: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[Node]:
        values = {
            "root": str(root or tmp_path / "state"),
            "substituters": list(urls),
            "trusted-public-keys": [str(KEY.public_key())],
            "fetch": {"stall-timeout": 20.0, **(fetch or {})},
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        async with open_node(check(values, "test")) as node:
            yield node

    return make
