"""Realising closures before somebody needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.errors import ClosureUnavailable, FusesnapError
from fusesnap.nix.store_path import StorePath

# How often a person's picture of the progress is drawn anew, in seconds.
TICK = 0.1


@dataclass(frozen=True, slots=True)
class Prefetched:
    """``paths`` of the closures, ``nar_bytes`` of all their NARs, ``fetched`` paths that were not there before."""

    paths: int
    nar_bytes: int
    fetched: int


async def prefetch_closures(
    settings: Settings, roots: Sequence[str], show: Callable[[str, int, int], None]
) -> Prefetched:
    """Realise ``roots`` with all that they reference.

    ``show`` is called now and then with what is being done, the bytes of NARs that are there, and of all. Raises
    ``InvalidData`` for what is no store path, ``ClosureUnavailable`` for what cannot be had; the rest is there then.
    """
    with plain_errors():
        async with open_node(settings) as node:
            closure = await closure_of(node, [node.store_dir.parse(root) for root in roots])
            return await realise_all(node, closure, show)
    raise AssertionError("unreachable: a block that raises nothing returned")


async def closure_of(node: Node, roots: Sequence[StorePath]) -> list[StorePath]:
    """The union of the roots' closures, each path once."""
    found: dict[StorePath, None] = {}
    for root in roots:
        found |= dict.fromkeys(await node.realiser.closure(root))
    return list(found)


async def realise_all(
    node: Node, closure: Sequence[StorePath], show: Callable[[str, int, int], None]
) -> Prefetched:
    """Realise every path of ``closure``; one that fails does not keep the others from it."""
    sizes = {
        path: pin.info.nar_size for path in closure if (pin := node.store.pinned(path)) is not None
    }
    missing = [path for path in closure if not node.store.is_committed(path)]
    done = sum(size for path, size in sizes.items()) - sum(sizes[path] for path in missing)
    failures: list[FusesnapError] = []
    # No more than are fetched at once: a path that waits for its turn would seem to make no progress.
    turns = trio.CapacityLimiter(node.settings.fetch.transfers)

    async def realise(path: StorePath) -> None:
        nonlocal done
        try:
            async with turns:
                await node.realiser.realise(path)
            done += sizes[path]
        except FusesnapError as error:
            failures.append(error)

    async with trio.open_nursery() as drawing:
        drawing.start_soon(draw, node, lambda: done, sum(sizes.values()), show)
        async with trio.open_nursery() as nursery:
            for path in sorted(missing, key=sizes.__getitem__):
                nursery.start_soon(realise, path)
        drawing.cancel_scope.cancel()
    if failures:
        raise ClosureUnavailable(failures)
    return Prefetched(len(closure), sum(sizes.values()), len(missing))


async def draw(
    node: Node, done: Callable[[], int], total: int, show: Callable[[str, int, int], None]
) -> None:
    """Show the progress until cancelled."""
    while True:
        flights = [flight for flight in node.realiser.flights() if flight.cache is not None]
        show(flights[0].path.name if flights else "checking", done(), total)
        await trio.sleep(TICK)
