"""A real program of a real closure: redis, from Debian packages, one store path a package."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey, http_cache, write_cache
from testbed.closure import debian_closure
from testbed.containerd import Container
from testbed.demo import PACKAGES, PING, SERVER, VERSION
from testbed.images import Layer, NixLayerManner, nix_layer
from testbed.nix_store import Closure, NixStore

from .conftest import Node, NodeMaker


@pytest.fixture(scope="session")
def redis(nix_store: NixStore) -> Closure:
    return debian_closure(nix_store, "redis", PACKAGES)


@pytest.fixture(scope="session")
def redis_files(
    nix_store: NixStore, redis: Closure, key: SigningKey, tmp_path_factory: pytest.TempPathFactory
) -> CacheFiles:
    directory = tmp_path_factory.mktemp("redis-cache")
    return write_cache(nix_store, [redis.root], directory, compression="zstd", key=key)


def test_a_cold_redis_fetches_what_it_links_to_and_nothing_else(
    make_node: NodeMaker,
    nix_store: NixStore,
    redis: Closure,
    redis_files: CacheFiles,
    base_layer: Layer,
    tmp_path: Path,
) -> None:
    layer = nix_layer(nix_store, redis, NixLayerManner.PLACEHOLDERS, copy_to_root=True)
    with http_cache(redis_files, tmp_path / "nginx") as cache:
        node = make_node(cache.url)
        reference = node.pull([base_layer, layer])
        assert cache.requested_nars(redis.paths) == set()
        said = node.containerd.run(reference, "version", *VERSION)
        assert said.startswith("Redis server v=")
        assert cache.requested_nars(redis.paths) == needed(nix_store, redis)
        answers_ping(node, cache, reference, redis)


def needed(nix_store: NixStore, redis: Closure) -> set[str]:
    """The path whose bin/ leads to the program, and all that its package links to: RUNPATHs name nothing else."""
    server = next(path for path in redis.paths if path.endswith("-redis-server"))
    return {redis.root, *nix_store.closure(server).paths}


def answers(server: Container) -> bool:
    return server.execute_unchecked(*PING).returncode == 0


def answers_ping(node: Node, cache: HttpCache, reference: str, redis: Closure) -> None:
    """A long-lived server, asked by its own client; the second start asks the cache nothing."""
    for name in ("first", "second"):
        cache.clear_requests()
        with node.containerd.started(reference, name, *SERVER) as server:
            node.daemon.service.wait_until(partial(answers, server))
            assert server.execute(*PING) == "PONG\n"
    assert cache.requested_nars(redis.paths) == set()
