"""The services process: containerd's side, with its own interpreter lock and its own death.

Started as ``python -m fusesnap.daemon.services SETTINGS READY``: the settings as JSON, and the descriptor on which to
say that we serve.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fusesnap.config import Settings, check
from fusesnap.daemon import control
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.lazy_layer import WorkerMount
from fusesnap.daemon.logs import log_to_stderr
from fusesnap.daemon.path_source import HintingPathSource
from fusesnap.daemon.signals import stop_on_signal
from fusesnap.filesystem.views import Views
from fusesnap.services.daemon_service import status_service
from fusesnap.services.server import serve
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.overlay import OverlayOptions
from fusesnap.snapshots.snapshotter import Snapshotter

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


async def run(settings: Settings, ready: int) -> None:
    """Serve until SIGTERM."""
    with plain_errors():
        async with open_node(settings) as node, trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, nursery.cancel_scope)
            snapshotter = build_snapshotter(node, nursery)
            await snapshotter.recover()
            status = status_service(partial(ask_worker, settings.root))
            await nursery.start(
                partial(serve, snapshotter, settings.socket.absolute(), also=[status])
            )
            os.write(ready, b"ready\n")
            os.close(ready)


async def ask_worker(root: Path) -> dict[str, Any]:
    """The worker's status, with what only we know."""
    answer = await control.ask(root / control.SOCKET_NAME, "status")
    return {**answer, "services": {"pid": os.getpid()}, "supervisor": {"pid": os.getppid()}}


def build_snapshotter(node: Node, nursery: trio.Nursery) -> Snapshotter:
    """The snapshotter of a node; its hints to the worker live in ``nursery``."""
    root = node.settings.root.resolve()
    source = HintingPathSource(node.realiser, node.store_dir, root / control.SOCKET_NAME, nursery)
    return Snapshotter(
        root,
        Metastore(root / "snapshots.sqlite"),
        node.store,
        source,
        Farms(root / "farms"),
        WorkerMount(root, Views(root / "views.sqlite")),
        store_dir=node.store_dir,
        options=OverlayOptions.of_kernel(),
        recognise_by_content=node.settings.recognise_by_content,
        clock=time.time,
    )


def die_with_parent() -> None:
    """Have the kernel end us when the supervisor dies: the next daemon's services take the socket over."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run."""
    given, ready = sys.argv[1:]
    die_with_parent()
    log_to_stderr()
    values = json.loads(given)
    values.pop("readahead")
    trio.run(run, check(values, "fusesnap daemon"), int(ready))


if __name__ == "__main__":
    main()
