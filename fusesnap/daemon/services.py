"""The services process: containerd's side, with its own interpreter lock and its own death.

Started as ``python -m fusesnap.daemon.services SETTINGS READY``: the settings as JSON, and the descriptor on which to
say that we serve.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from functools import partial

import trio

from fusesnap.config import MetricsAddress, Settings, handed_down
from fusesnap.daemon import control
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.collector import Collector
from fusesnap.daemon.completion import Completion
from fusesnap.daemon.containerd_block import NAME
from fusesnap.daemon.hints import HintedStarts
from fusesnap.daemon.lazy_layer import WorkerMount
from fusesnap.daemon.logs import explained, log_to_stderr
from fusesnap.daemon.path_source import HintingPathSource
from fusesnap.daemon.prefetch import when_over
from fusesnap.daemon.preload import Preload
from fusesnap.daemon.readiness import Readiness
from fusesnap.daemon.signals import stop_on_signal
from fusesnap.daemon.telemetry.prompt_snapshots import ObservedPrompt
from fusesnap.daemon.telemetry.reports import StartReports
from fusesnap.daemon.telemetry.snapshots import ObservedSnapshots
from fusesnap.daemon.turn import wait_for_turn
from fusesnap.daemon.waits import WorkersWaits, cancel, moment, status
from fusesnap.filesystem.views import Views
from fusesnap.images.platform import Platform
from fusesnap.images.store_images import StoreImages
from fusesnap.nix.store_path import StorePath
from fusesnap.services.containerd_calls import KUBERNETES, ContainerdCalls
from fusesnap.services.containerd_client import find_snapshotter, open_channel
from fusesnap.services.daemon_service import Call, daemon_service
from fusesnap.services.diff_service import Differ, diff_service
from fusesnap.services.image_service import PullBegins, image_service
from fusesnap.services.nix_images import PulledImages
from fusesnap.services.server import serve
from fusesnap.services.unpacked_images import UnpackedImages
from fusesnap.snapshots.announced import FindImage
from fusesnap.snapshots.comparison import Comparer
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.making_room import SnapshotsWithRoom
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.overlay import OverlayOptions
from fusesnap.snapshots.snapshotter import Snapshotter
from fusesnap.snapshots.unfinished import Unfinished
from fusesnap.store.local_store import Collected

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


async def run(settings: Settings, ready: int) -> None:
    """Serve until SIGTERM."""
    with plain_errors(), open_channel(settings.containerd_address) as containerd:
        async with open_node(settings, process="services") as node, trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, nursery.cancel_scope)
            waits = WorkersWaits(settings.root / control.SOCKET_NAME)
            known = UnpackedImages(containerd)
            starts = build_starts(node, nursery, known)
            snapshotter = build_snapshotter(node, nursery, waits, starts, known.announced)
            await snapshotter.recover()
            collector = Collector(
                node.store, settings.store, snapshotter.cleanup, partial(count_evicted, node)
            )
            reports = StartReports(node.telemetry, waits.flush, time.time)
            calls: dict[str, Call] = {
                "Starts": reports.starts,
                "StartReport": reports.report,
                "Status": partial(status, node, snapshotter, waits, collector),
                "Cancel": partial(cancel, node, snapshotter, waits),
            }
            images = build_images(node, ContainerdCalls(containerd, KUBERNETES), nursery)
            also = [
                daemon_service(calls),
                diff_service(build_differ(settings)),
                image_service(images, containerd, getting_ready(node, starts, nursery)),
            ]
            observed = observe(node, snapshotter, nursery)
            prompt = ObservedPrompt(snapshotter.prompt, observed, time.time, time.monotonic)
            serving = partial(serve, observed, settings.socket.absolute(), also=also, prompt=prompt)
            await nursery.start(serving)
            os.write(ready, b"ready\n")
            os.close(ready)
            await snapshotter.remove_leftovers()
            nursery.start_soon(collector.run)
            if settings.preload.paths:
                have = when_over(build_source(node, nursery).realise)
                nursery.start_soon(Preload(node, settings.preload.paths, have).run)
            if settings.fetch.complete:
                nursery.start_soon(build_completion(node, nursery).run)
            if settings.metrics is not None:
                address = MetricsAddress.parse(settings.metrics)
                give_metrics(address, node, snapshotter, waits, nursery)


def give_metrics(
    address: MetricsAddress,
    node: Node,
    snapshotter: Snapshotter,
    waits: WorkersWaits,
    nursery: trio.Nursery,
) -> None:
    """Answer scrapes at ``address``, in a task of ``nursery``."""
    # prometheus_client takes 15 ms and 1.4 MiB, for those who have metrics.
    from fusesnap.daemon.telemetry.exposition import serve_metrics  # noqa: PLC0415
    from fusesnap.daemon.telemetry.picture import gather  # noqa: PLC0415

    picture = partial(gather, node.store, node.telemetry, partial(moment, node, snapshotter, waits))
    nursery.start_soon(serve_metrics, address, picture)


def count_evicted(node: Node, collected: Collected) -> None:
    """Garbage was removed to stay within the limits."""
    node.telemetry.counters.add("fusesnap_evicted_paths", len(collected.paths))
    node.telemetry.counters.add("fusesnap_evicted_bytes", collected.size)


def build_starts(node: Node, nursery: trio.Nursery, images: UnpackedImages) -> HintedStarts:
    """What tells the worker of starts; its hints live in ``nursery``."""
    worker = node.settings.root.resolve() / control.SOCKET_NAME
    programs = images.programs if node.settings.fetch.starts_early else None
    return HintedStarts(node.store_dir, worker, nursery, programs)


def getting_ready(node: Node, starts: HintedStarts, nursery: trio.Nursery) -> PullBegins:
    """What opens the way to the caches, for the worker and for us, when an image begins to be pulled."""
    readiness = Readiness(node.store, node.pool)

    async def pull_begins() -> None:
        starts.pull_begins()
        nursery.start_soon(readiness.open)

    return pull_begins


def build_snapshotter(
    node: Node,
    nursery: trio.Nursery,
    waits: WorkersWaits,
    starts: HintedStarts,
    find_image: FindImage,
) -> Snapshotter:
    """The snapshotter of a node; what it does beside calls lives in ``nursery``."""
    root = node.settings.root.resolve()
    return Snapshotter(
        root,
        Metastore(root / "snapshots.sqlite"),
        node.store,
        build_source(node, nursery),
        Farms(root / "farms"),
        WorkerMount(root, Views(root / "views.sqlite")),
        store_dir=node.store_dir,
        options=OverlayOptions.of_kernel(),
        recognise_by_content=node.settings.recognise_by_content,
        clock=time.time,
        release_readers=waits.release_for_removal,
        starts=starts,
        find_image=find_image,
        nursery=nursery,
    )


def build_source(node: Node, nursery: trio.Nursery) -> HintingPathSource:
    """What the worker fetches for us; hints live in ``nursery``."""
    worker = node.settings.root.resolve() / control.SOCKET_NAME
    return HintingPathSource(node.realiser, node.store_dir, worker, nursery)


def build_completion(node: Node, nursery: trio.Nursery) -> Completion:
    """What completes the closures of running containers."""
    metastore = Metastore(node.settings.root.resolve() / "snapshots.sqlite")
    return Completion(
        Unfinished(metastore, node.store).missing, build_source(node, nursery).complete
    )


def observe(node: Node, snapshotter: Snapshotter, nursery: trio.Nursery) -> ObservedSnapshots:
    """The snapshotter with its calls and starts told to the node's telemetry."""
    root = node.settings.root.resolve()
    metastore = Metastore(root / "snapshots.sqlite")

    def paths_of(name: str) -> frozenset[StorePath]:
        with metastore.reading() as transaction:
            return frozenset(transaction.chain(name).paths)

    snapshots = SnapshotsWithRoom(snapshotter, node.store.room)
    return ObservedSnapshots(snapshots, node.telemetry, time.time, paths_of, str(root), nursery)


def build_images(node: Node, containerd: ContainerdCalls, nursery: trio.Nursery) -> PulledImages:
    """The images of a node that are in no registry; pulls live in ``nursery``."""
    settings = node.settings
    platform = Platform.of_machine(os.uname().machine)
    where = settings.containerd_address, settings.socket.absolute(), NAME
    return PulledImages(
        StoreImages(
            node.store, node.realiser, platform, settings.root, build_source(node, nursery)
        ),
        node.store_dir,
        containerd,
        partial(trio.to_thread.run_sync, find_snapshotter, *where, abandon_on_cancel=True),
        time.time,
        nursery,
    )


def build_differ(settings: Settings) -> Differ:
    """The differ for the snapshots of a state directory."""
    root = settings.root.resolve()
    comparer = Comparer(root, Metastore(root / "snapshots.sqlite"))
    return Differ(comparer, settings.containerd_address, time.time)


def die_with_parent() -> None:
    """Have the kernel end us when the supervisor dies: the next daemon's services take the socket over."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run."""
    given, ready = sys.argv[1:]
    die_with_parent()
    log_to_stderr()
    wait_for_turn(int(ready))
    settings = handed_down(given)
    with explained("services"):
        trio.run(run, settings, int(ready))


if __name__ == "__main__":
    main()
