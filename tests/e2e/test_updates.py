"""A second generation of a closure, which differs from the first in its hash parts: hardly anything is fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey, http_cache, publish_cache
from testbed.fusesnap_daemon import Source, prefetch
from testbed.images import Layer, NixLayerManner, nix_layer
from testbed.nix_store import CONFIGURATION, NixStore, store_paths_list
from testbed.processes import run
from testbed.synthetic import SimpleClosure, simple_closure

from .conftest import SHELL, NodeMaker

NixLayers = Callable[..., Layer]


@pytest.fixture(scope="module")
def second(nix_store: NixStore) -> SimpleClosure:
    return simple_closure(nix_store, "-2")


@pytest.fixture
def caches(
    published: CacheFiles,
    second: SimpleClosure,
    nix_store: NixStore,
    key: SigningKey,
    tmp_path: Path,
) -> Iterator[tuple[HttpCache, HttpCache]]:
    """A cache with the first generation, and one with the second."""
    files = publish_cache(nix_store, [second.root], tmp_path / "second", key)
    with (
        http_cache(published, tmp_path / "nginx-1") as one,
        http_cache(files, tmp_path / "nginx-2") as two,
    ):
        yield one, two


def crossed(cache: HttpCache) -> int:
    """Bytes of NARs."""
    return sum(request.size for request in cache.requests() if request.path.endswith(".nar.zst"))


def rebuilt_paths(first: SimpleClosure, second: SimpleClosure) -> list[str]:
    return sorted(set(second.closure.paths) - set(first.closure.paths))


def test_a_second_generation_runs_on_what_the_first_has_read(
    make_node: NodeMaker,
    caches: tuple[HttpCache, HttpCache],
    nix_store: NixStore,
    simple: SimpleClosure,
    second: SimpleClosure,
    base_layer: Layer,
    nix_layers: NixLayers,
) -> None:
    one, two = caches
    node = make_node(one.url, two.url)

    def read(generation: SimpleClosure) -> str:
        files = f"{generation.busybox}/bin/busybox {generation.script}"
        return f"cat {files} {generation.tree}/self | sha256sum; {generation.script}"

    first_image = node.pull([base_layer, nix_layers()])
    node.containerd.run(first_image, "one", *SHELL, read(simple))
    assert not (node.daemon.state / "layer/.fusesnap-store" / Path(simple.busybox).name).exists()

    listed = store_paths_list(nix_store, second.closure)
    manner = NixLayerManner.PLACEHOLDERS
    layer = nix_layer(nix_store, second.closure, manner, list_path=listed, copy_to_root=True)
    before = crossed(one)
    second_image = node.pull([base_layer, layer])
    said = node.containerd.run(second_image, "two", *SHELL, read(second))
    assert said.splitlines()[1] == "hello from a store path"
    assert said.split()[0] == digest_of(nix_store, second)
    changed = rebuilt_paths(simple, second)
    assert len(changed) >= 6
    whole = two.files.compressed_size(changed)
    assert whole > 700_000
    assert crossed(two) + crossed(one) - before < whole / 20
    start = json.loads(node.daemon.start_report("two", "--json"))["start"]
    assert start["bytes_by_cache"]["paths that were here"] > whole / 2


def digest_of(store: NixStore, generation: SimpleClosure) -> str:
    files = (f"{generation.busybox}/bin/busybox", generation.script, f"{generation.tree}/self")
    return hashlib.sha256(b"".join(store.real(name).read_bytes() for name in files)).hexdigest()


def test_a_prefetch_takes_from_the_store_what_is_right_there(
    caches: tuple[HttpCache, HttpCache],
    simple: SimpleClosure,
    second: SimpleClosure,
    key: SigningKey,
    work: Path,
) -> None:
    """One byte of what is there has changed on the disk, and one file is gone."""
    one, two = caches
    state = work / "s"
    source = Source([one.url, two.url], [key.public])
    prefetch(state, [simple.root], source=source)
    store = state / "layer/.fusesnap-store"
    with (store / Path(simple.busybox).name / "bin/busybox").open("r+b") as program:
        program.seek(1_000_000)
        program.write(b"damaged")
    (store / Path(simple.tree).name / "zeros").unlink()
    prefetch(state, [second.root], source=source)
    assert crossed(two) < two.files.compressed_size(rebuilt_paths(simple, second)) / 4
    url = f"local?store=/nix/store&real={store}&state={state}/nix&log={state}/log"
    for path in rebuilt_paths(simple, second):
        run(["nix-store", "--store", url, "--verify-path", path], env=CONFIGURATION)
