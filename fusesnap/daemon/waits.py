"""Requests that wait in the worker, seen from the process that knows the snapshots."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

from fusesnap.daemon import control
from fusesnap.daemon.build import Node
from fusesnap.daemon.collector import Collector
from fusesnap.daemon.readers import is_thread_of, snapshots_of
from fusesnap.daemon.status import NOTHING_KNOWN, node_status
from fusesnap.errors import FusesnapError, InvalidArgument, NotFound
from fusesnap.nix.store_path import StoreDir
from fusesnap.snapshots.mountinfo import overlay_mounts
from fusesnap.snapshots.snapshotter import Snapshotter

log = logging.getLogger(__name__)

# Seconds. A worker that serves answers within milliseconds; for one that does not, a person need not wait.
WORKER_ANSWERS_WITHIN: Final = 3.0
# Seconds that Remove spends on readers of what it removes.
REMOVAL_WAITS: Final = 1.0


class WorkersWaits:
    """Asks the worker on its control socket; ``uppers`` map upper directories to keys of snapshots."""

    def __init__(self, worker: Path) -> None:
        self._worker = worker

    async def status(self) -> dict[str, Any]:
        """The worker's status. Raises ``Unavailable``."""
        return await control.ask(self._worker, "status", within=WORKER_ANSWERS_WITHIN)

    async def flush(self) -> str | None:
        """Have the worker write what it recorded, and say what names it in records; ``None`` where none answers."""
        try:
            answer = await control.ask(self._worker, "flush", within=WORKER_ANSWERS_WITHIN)
        except FusesnapError as error:
            log.debug("the journal may lack the newest: %s", error)
            return None
        return str(answer["session"])

    async def release(self, why: str, **which: Any) -> int:
        """End waits, see the worker's ``release``; says how many. Raises ``Unavailable``."""
        answer = await control.ask(
            self._worker, "release", within=WORKER_ANSWERS_WITHIN, why=why, **which
        )
        return int(answer["released"])

    async def release_snapshot(self, uppers: Mapping[str, str], why: str) -> int:
        """End the waits of the processes whose root one of these snapshots is. Raises ``Unavailable``."""
        pids = readers(await self.status())
        found = await trio.to_thread.run_sync(snapshots_of, pids, uppers)
        return await self.release(why, pids=sorted(found)) if found else 0

    async def release_for_removal(self, upper: str) -> None:
        """End what keeps processes in a snapshot that is going to be removed. A dead worker keeps none."""
        try:
            with trio.move_on_after(REMOVAL_WAITS):
                count = await self.release_snapshot({upper: upper}, "its snapshot was removed")
                if count:
                    log.info("%s: removed while %d requests waited: ended them", upper, count)
        except FusesnapError as error:
            log.debug("%s: %s", upper, error)


def readers(status: Mapping[str, Any]) -> set[int]:
    """The processes that wait."""
    return {reader["pid"] for wait in status["waiting"] for reader in wait["probable_readers"]}


async def status(
    node: Node,
    snapshotter: Snapshotter,
    waits: WorkersWaits,
    collector: Collector,
    question: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``fusesnap status`` shows."""
    return {
        **await moment(node, snapshotter, waits),
        "store": await trio.to_thread.run_sync(collector.status),
    }


async def moment(node: Node, snapshotter: Snapshotter, waits: WorkersWaits) -> dict[str, Any]:
    """What is so now, also while the worker is away: then without what only it knows. The store is not measured."""
    try:
        answer = await waits.status()
    except FusesnapError as error:
        answer = {
            **await trio.to_thread.run_sync(node_status, node),
            **NOTHING_KNOWN,
            "worker": {"pid": None, "error": str(error)},
        }
    uppers = await snapshotter.uppers()
    owners = await trio.to_thread.run_sync(snapshots_of, readers(answer), uppers)
    for wait in answer["waiting"]:
        keys = {owners.get(reader["pid"]) for reader in wait["probable_readers"]}
        wait["snapshots"] = sorted(key for key in keys if key is not None)
    dependents = await trio.to_thread.run_sync(fuse_dependents, node, uppers)
    return {
        **answer,
        "depend_on_fuse": dependents,
        "services": {"pid": os.getpid()},
        "supervisor": {"pid": os.getppid()},
    }


def fuse_dependents(node: Node, uppers: Mapping[str, str]) -> list[str]:
    """The keys of snapshots that are mounted with our FUSE mount among their layers."""
    lazy = node.settings.root.resolve() / "lazy"
    mounts = overlay_mounts()
    uses = {mount.upper for mount in mounts if mount.upper and mount.has_layer_below(lazy)}
    return sorted(uppers[upper] for upper in uses if upper in uppers)


async def cancel(
    node: Node, snapshotter: Snapshotter, waits: WorkersWaits, question: Mapping[str, Any]
) -> dict[str, Any]:
    """End the waits that ``target`` names: a store path or a file in it, a process, or a snapshot."""
    target, why = str(question.get("target", "")), "somebody cancelled it"
    if target.startswith("/"):
        path = store_path_of(target, node.store_dir)
        return {"released": await waits.release(why, path=path)}
    if target.isdecimal():
        waiting = readers(await waits.status())
        pids = [pid for pid in waiting if is_thread_of(pid, int(target))]
        return {"released": await waits.release(why, pids=pids) if pids else 0}
    upper = upper_of(target, await snapshotter.uppers())
    return {"released": await waits.release_snapshot({upper: target}, why)}


def store_path_of(target: str, store_dir: StoreDir) -> str:
    """The store path that ``target`` is or lies in. Raises ``InvalidArgument``."""
    inner = target.removeprefix(store_dir.path + "/").split("/")[0]
    path = f"{store_dir.path}/{inner}"
    try:
        store_dir.parse(path)
    except FusesnapError as error:
        raise InvalidArgument(f"{target!r}: expected a path in {store_dir.path}") from error
    return path


def upper_of(target: str, uppers: Mapping[str, str]) -> str:
    """The upper directory of the snapshot whose key is, or ends with, ``target``.

    containerd's keys are ``<namespace>/<number>/<name>``, of which a person knows the name. Raises ``NotFound``, and
    ``InvalidArgument`` where it could be several.
    """
    exact = [upper for upper, key in uppers.items() if key == target]
    found = exact or [upper for upper, key in uppers.items() if key.endswith(f"/{target}")]
    if not found:
        raise NotFound(
            f"{target!r}: expected a store path, a process id or the key of an active snapshot; "
            "no active snapshot has such a key"
        )
    if len(found) > 1:
        keys = ", ".join(sorted(uppers[upper] for upper in found))
        raise InvalidArgument(f"{target!r} could be any of the snapshots {keys}: say which")
    return found[0]
