"""Realising closures before somebody needs them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.store_path_names import is_in_store, store_path
from fusesnap.daemon.unpackers import LINGER
from fusesnap.daemon.watching import meanwhile, share_of, summary
from fusesnap.errors import ClosureUnavailable, FusesnapError
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.unpack_start import StartedProcess
from fusesnap.images.image_files import is_image
from fusesnap.nix.store_path import StorePath

# How often a person's picture of the progress is drawn anew, in seconds.
TICK = 0.1
# Bytes of NARs that are worth the wait for processes that unpack, a third of a second; fewer are unpacked here.
WORTH_PROCESSES = 8 * 1024 * 1024
# Paths at once, most of which wait for the disk while others are transferred: the more, the fewer barriers it takes.
UNDERWAY = 512
# Of those, how many may wait for their turn on the link, which looks at each whenever something changes.
IN_LINE = 16

Realise = Callable[[StorePath], Awaitable[object]]
# Realises a path, and calls the function as soon as the next may begin.
Have = Callable[[StorePath, Callable[[], None]], Awaitable[object]]
Show = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Prefetched:
    """``paths`` of the closures, ``nar_bytes`` of all their NARs, ``fetched`` paths that were not there before.

    ``received`` compressed bytes came for them in ``seconds``, where somebody wanted to know.
    """

    paths: int
    nar_bytes: int
    fetched: int
    received: int = 0
    seconds: float = 0.0

    def and_then(self, more: Prefetched) -> Prefetched:
        """This and ``more``, which are other paths."""
        return Prefetched(
            self.paths + more.paths, self.nar_bytes + more.nar_bytes, self.fetched + more.fetched
        )


async def prefetch_closures(
    settings: Settings, names: Sequence[str], show: Show, unpackers: Sequence[StartedProcess]
) -> Prefetched:
    """Realise all that ``names`` stand for: see :func:`prefetch`. ``show`` is called now and then.

    ``unpackers`` were started with :data:`LINGER`.
    """
    with plain_errors():
        async with open_node(settings, linger=LINGER, unpackers=unpackers) as node:
            began = trio.current_time()
            done = await prefetch(node, names, show, node.realiser.have)
            received = sum(state.bytes_received for state in node.pool.states())
            return replace(done, received=received, seconds=trio.current_time() - began)
    raise AssertionError("unreachable: a block that raises nothing returned")


def when_over(realise: Realise) -> Have:
    """``realise``, of which nobody knows when it begins: the next may begin when it is over."""

    async def have(path: StorePath, begun: Callable[[], None]) -> None:
        try:
            await realise(path)
        finally:
            begun()

    return have


async def prefetch(node: Node, names: Sequence[str], show: Show, have: Have) -> Prefetched:
    """Have all that ``names`` stand for realised by ``have``; none of it is collected before this process ends.

    A name is a store path or a reference to one, for what that references, and for what its layers stand for if it is
    an image; or an image on disk, or one that containerd has. ``show`` is told what is being done, how many compressed
    bytes came, and how many there are to come. Raises InvalidArgument and InvalidData for what is none of them,
    ClosureUnavailable for what cannot be had; the rest is there then.
    """
    found: dict[StorePath, None] = {}
    roots: list[StorePath] = []
    async with meanwhile(draw_lookups, node, show):
        for name in names:
            if is_in_store(node, name):
                roots.append(await store_path(node, name))
                found |= dict.fromkeys(await node.realiser.closure(roots[-1]))
            else:
                found |= dict.fromkeys(await _paths_of_layers(node, name))
    done = await realise_all(node, list(found), show, have)
    more = [path for root in roots for path in await _paths_of_archive(node, root)]
    more = [path for path in dict.fromkeys(more) if path not in found]
    if not more:
        return done
    await _keep(node, more)
    return done.and_then(await realise_all(node, more, show, have))


# Images are imported where there are any: to do so takes as long as a small closure.


async def _paths_of_layers(node: Node, name: str) -> Sequence[StorePath]:
    from fusesnap.daemon.prefetch_images import paths_of_layers  # noqa: PLC0415

    paths = await paths_of_layers(node, name)
    await _keep(node, paths)
    return paths


async def _paths_of_archive(node: Node, path: StorePath) -> Sequence[StorePath]:
    """What the layers of an image in a store path stand for; nothing for a path that is no image."""
    tree = await node.realiser.realise(path, priority=Priority.TRACE)
    if not await trio.to_thread.run_sync(is_image, tree, node.store.location(path)):
        return ()
    from fusesnap.daemon.prefetch_images import paths_of_archive  # noqa: PLC0415

    return await paths_of_archive(node, path)


async def _keep(node: Node, paths: Sequence[StorePath]) -> None:
    await trio.to_thread.run_sync(node.store.roots.keep, paths)
    await node.realiser.admit(paths)


async def closure_of(node: Node, roots: Sequence[StorePath]) -> list[StorePath]:
    """The union of the roots' closures, each path once."""
    found: dict[StorePath, None] = {}
    for root in roots:
        found |= dict.fromkeys(await node.realiser.closure(root))
    return list(found)


async def realise_all(
    node: Node, closure: Sequence[StorePath], show: Show, have: Have
) -> Prefetched:
    """Have every path of ``closure`` realised by ``have``; one that fails does not keep the others from it."""
    infos = {path: pin.info for path in closure if (pin := node.store.pinned(path)) is not None}
    sizes = {path: info.nar_size for path, info in infos.items()}
    missing = [path for path in closure if not node.store.is_committed(path)]
    # What a person sees is what crosses the link.
    loads = {path: infos[path].file_size or sizes[path] for path in missing}
    done = 0
    failures: list[FusesnapError] = []
    if sum(sizes[path] for path in missing) >= WORTH_PROCESSES:
        await node.unpackers.all_ready()
    room, line = trio.Semaphore(UNDERWAY), trio.Semaphore(IN_LINE)

    async def have_one(path: StorePath) -> None:
        nonlocal done
        try:
            await have(path, line.release)
            done += loads[path]
        except FusesnapError as error:
            failures.append(error)
        finally:
            room.release()

    async with meanwhile(draw, node, lambda: done, loads, show), trio.open_nursery() as nursery:
        # The largest first, so that all processors are busy to the end.
        for path in sorted(missing, key=sizes.__getitem__, reverse=True):
            await room.acquire()
            await line.acquire()
            nursery.start_soon(have_one, path)
    if failures:
        raise ClosureUnavailable(failures)
    return Prefetched(len(closure), sum(sizes.values()), len(missing))


async def draw(
    node: Node, done: Callable[[], int], loads: Mapping[StorePath, int], show: Show
) -> None:
    """Show the progress until cancelled; ``loads`` are what there is to fetch, some of which is partly here."""
    total = sum(loads.values())
    while True:
        flights = node.realiser.flights()
        partly = sum(share_of(flight) * loads.get(flight.path, 0) for flight in flights)
        show(summary(flights), min(total, done() + round(partly)), total)
        await trio.sleep(TICK)


async def draw_lookups(node: Node, show: Show) -> None:
    """Show how many narinfos were asked for, until cancelled."""
    while True:
        asked = sum(state.narinfos_asked for state in node.pool.states())
        show(f"asking for narinfos: {asked} so far", 0, 0)
        await trio.sleep(TICK)
