"""What a pull takes of an image with thousands of small store paths, of which it has to know that all can be had."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import trio
from rich.console import Console
from rich.table import Table
from testbed.binary_cache import CacheFiles, SigningKey, http_cache, signing_key
from testbed.containerd import containerd
from testbed.fusesnap_daemon import PROGRAM, Source, fusesnap_daemon
from testbed.images import write_image
from testbed.link_process import slow_link
from testbed.processes import run
from testbed.registry import registry
from testbed.workplace import default_work, run_directory

from benchmarks.coldstart_sides import drop_caches
from benchmarks.large_cache import write_large_cache
from benchmarks.many_paths import Shape, SmallPath, nix_image, ordinary_image, small_paths
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.client import make_client

DESCRIPTION = """\
Pulls an image of many small store paths through containerd on a node that has nothing, over a link of 1 Gbit/s and
1 ms, from a stock cache and from a published one; in turns with the GETs of all narinfos alone, over loopback and 16
connections, by httpx as it comes and by the client that fusesnap makes of it; and with the pull of an ordinary image
that carries the same files.

What is asked of it is said to be met or not: a published cache, which has a closure bundle, takes at most 1.0 s plus
the time of the bundle's bytes; a stock cache at most 1.2 times what httpx takes for the GETs alone, plus 0.3 s.
"""
STOCK, PUBLISHED, CLIENT = "pull, stock cache", "pull, published cache", "the GETs alone, httpx"
OURS = "the GETs alone, our client"
ORDINARY = "pull of an ordinary image"
RATE, ROUND_TRIP = 1e9, 0.001  # bits a second, seconds
CONNECTIONS = 16
SECONDS = 600.0  # for anything that should take less


@dataclass(frozen=True, slots=True)
class Scene:
    """What all sides share; ``references`` are of the images over the link."""

    key: SigningKey
    caches: dict[str, str]
    direct: str  # the stock cache, not over the link
    names: Sequence[str]
    references: dict[str, str]


def closure(count: int) -> list[SmallPath]:
    """Small paths, and one that references all others."""
    paths = small_paths(count - 1)
    references = tuple(sorted(path.store_path for path in paths))
    return [*paths, replace(SmallPath(count, Shape.DIRECTORY), references=references)]


def publish(stock: CacheFiles, root: str, directory: Path, key: SigningKey) -> CacheFiles:
    """The same paths as ``fusesnap publish`` writes them, with a closure bundle."""
    target: list[str | Path] = ["--from", f"file://{stock.directory}", "--to", directory]
    trusted = ["--trusted-public-key", key.public]
    options: list[str | Path] = [*target, "--secret-key-file", key.secret_file, *trusted]
    run([PROGRAM, "publish", *options, "--closure", root], timeout=SECONDS)
    return CacheFiles(directory)


@contextlib.contextmanager
def scene(directory: Path, count: int, key: SigningKey) -> Iterator[Scene]:
    """Two caches and a registry behind a link."""
    store_dir, paths = StoreDir(), closure(count)
    stock = write_large_cache(paths, directory / "stock", key, store_dir, compression="zstd")
    root = store_dir.format(paths[-1].store_path)
    published = publish(stock, root, directory / "published", key)
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(registry(directory))
        servers = {
            name: stack.enter_context(http_cache(files, directory / f"nginx-{name}"))
            for name, files in (("stock", stock), ("published", published))
        }
        ports = {**{name: cache.port for name, cache in servers.items()}, "registry": images.port}
        link = stack.enter_context(slow_link(ports, directory, rate=RATE, round_trip=ROUND_TRIP))
        references = {}
        for kind, layers in (
            ("nix", nix_image(paths, store_dir)),
            ("ordinary", ordinary_image(paths, store_dir)),
        ):
            archive = write_image(directory / f"{kind}.tar", layers, name=f"{kind}:1")
            images.push(archive, f"{kind}:1")
            references[kind] = images.reference(f"{kind}:1", port=link.port("registry"))
        yield Scene(
            key,
            {name: link.url(name) for name in servers},
            servers["stock"].url,
            [f"{path.store_path.hash_part}.narinfo" for path in paths],
            references,
        )


def pull(scene: Scene, directory: Path, cache: str) -> float:
    """Seconds of a pull whose paths are in ``cache``."""
    source = Source([scene.caches[cache]], [scene.key.public])
    with (
        fusesnap_daemon(directory / "s", source=source) as daemon,
        containerd(directory / "c", proxy=daemon.address) as client,
    ):
        drop_caches()
        began = time.monotonic()
        client.pull(scene.references["nix"], timeout=SECONDS)
        return time.monotonic() - began


def ordinary(scene: Scene, directory: Path) -> float:
    """Seconds of the pull of the image that carries its files."""
    with containerd(directory / "c") as client:
        drop_caches()
        began = time.monotonic()
        client.pull(scene.references["ordinary"], timeout=SECONDS)
        return time.monotonic() - began


def plain_client() -> httpx.AsyncClient:
    """httpx as it comes, with as many connections."""
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    return httpx.AsyncClient(limits=limits)


def gets_alone(scene: Scene, make: Callable[[], httpx.AsyncClient]) -> float:
    """Seconds of the GETs of all narinfos."""

    async def get_all() -> float:
        names = iter(scene.names)
        async with make() as client:

            async def get() -> None:
                for name in names:
                    answer = await client.get(f"{scene.direct}/{name}")
                    answer.raise_for_status()

            began = time.monotonic()
            async with trio.open_nursery() as nursery:
                for _ in range(CONNECTIONS):
                    nursery.start_soon(get)
            return time.monotonic() - began

    return trio.run(get_all)


SIDES: dict[str, Callable[[Scene, Path], float]] = {
    STOCK: lambda scene, directory: pull(scene, directory, "stock"),
    PUBLISHED: lambda scene, directory: pull(scene, directory, "published"),
    CLIENT: lambda scene, _: gets_alone(scene, plain_client),
    OURS: lambda scene, _: gets_alone(scene, partial(make_client, max_connections=CONNECTIONS)),
    ORDINARY: ordinary,
}


def goals(medians: dict[str, float], bundle: int) -> list[str]:
    """What was asked, in seconds; ``bundle`` are the bytes of the closure's bundle."""
    most = {
        PUBLISHED: 1.0 + bundle * 8 / RATE,
        STOCK: 1.2 * medians[CLIENT] + 0.3,
    }
    return [
        f"{side}: {medians[side]:.2f} s, at most {limit:.2f}: "
        f"{'met' if medians[side] <= limit else 'not met'}"
        for side, limit in most.items()
    ]


def measure(given: argparse.Namespace, directory: Path) -> tuple[dict[str, list[float]], int]:
    """Seconds by side, in turns; and the size of the bundle."""
    taken: dict[str, list[float]] = {}
    with scene(directory, given.paths, signing_key(given.work / "keys")) as on:
        bundle = max(file.stat().st_size for file in (directory / "published/bundle").iterdir())
        for number in range(given.rounds):
            for side, once in SIDES.items():
                with run_directory("fs-pull-") as place:
                    taken.setdefault(side, []).append(once(on, place))
                print(
                    f"{number + 1}/{given.rounds} {side}: {taken[side][-1]:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return taken, bundle


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    with run_directory("fs-pull-") as directory:
        taken, bundle = measure(given, directory)
    medians = {side: statistics.median(seconds) for side, seconds in taken.items()}
    if given.json:
        print(json.dumps({"paths": given.paths, "bundle": bundle, "seconds": taken}))
        return 0
    table = Table(title=f"{given.paths} store paths, 1 Gbit/s, 1 ms", title_justify="left")
    for column in ("side", "median s", "least", "most"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side, seconds in taken.items():
        table.add_row(
            side, *(f"{each:.2f}" for each in (medians[side], min(seconds), max(seconds)))
        )
    say = Console(highlight=False, soft_wrap=True)
    say.print(table)
    say.print(f"the bundle has {bundle} bytes")
    for goal in goals(medians, bundle):
        say.print(goal)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench pull", description=DESCRIPTION)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="pulls of each side (5)")
    add("--paths", type=int, default=2400, help="store paths of the image (2400)")
    add("--json", action="store_true", help="print JSON, in seconds and bytes")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
