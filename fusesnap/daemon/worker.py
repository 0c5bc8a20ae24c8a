"""The worker process: serves the mount that the supervisor holds, and fetches.

Started as ``python -m fusesnap.daemon.worker SETTINGS FUSE INIT READY``: the settings as JSON, the descriptor of the
FUSE connection, the kernel's FUSE_INIT request in hexadecimal, and the descriptor on which to say that we serve.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyfuse3
import trio

from fusesnap.config import Settings, check
from fusesnap.daemon import control
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.logs import log_to_stderr
from fusesnap.daemon.signals import stop_on_signal
from fusesnap.daemon.status import worker_status
from fusesnap.filesystem.inode import InodeKind
from fusesnap.filesystem.layer_nodes import LayerNodes
from fusesnap.filesystem.nodes import Nodes
from fusesnap.filesystem.open_files import OpenFiles
from fusesnap.filesystem.operations import Operations
from fusesnap.filesystem.session import joined
from fusesnap.filesystem.store_nodes import StoreNodes
from fusesnap.filesystem.views import Views

# Each blocked reader occupies a task of a few KiB; more than this do not block at once on a node.
MAX_TASKS = 4096


async def serve(settings: Settings, fuse: int, init_request: bytes, ready: int) -> None:
    """Serve until SIGTERM or until the mount is gone."""
    with plain_errors():
        async with open_node(settings) as node:
            node.unpackers.start()  # so that the first reader does not wait for a process too
            open_files = OpenFiles()
            views = Views(settings.root / "views.sqlite")
            store_nodes = StoreNodes(node.store, node.realiser, open_files)
            parts: dict[InodeKind, Nodes] = {
                InodeKind.FIXED: LayerNodes(store_nodes, views),
                InodeKind.STORE: store_nodes,
                InodeKind.CLAIMED: store_nodes,
            }
            with joined(fuse, init_request, partial(Operations, parts, node.store.layer)):
                await answer(node, ready)
            open_files.close()
            views.close()


async def answer(node: Node, ready: int) -> None:
    """Answer the kernel and the control socket."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        await nursery.start(control.serve, node.settings.root / control.SOCKET_NAME, calls(node))
        os.write(ready, b"ready\n")
        os.close(ready)
        await pyfuse3.main(max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()


def calls(node: Node) -> Mapping[str, control.Answer]:
    """What the control socket answers."""

    async def status(question: Mapping[str, Any]) -> dict[str, Any]:
        return worker_status(node)

    async def fetch(question: Mapping[str, Any]) -> dict[str, Any]:
        node.realiser.request([node.store_dir.parse(path) for path in question.get("paths", [])])
        return {}

    return {"status": status, "fetch": fetch}


def main() -> None:
    """Run."""
    given, fuse, init_request, ready = sys.argv[1:]
    log_to_stderr()
    values = json.loads(given)
    values.pop("readahead")
    trio.run(
        serve, check(values, "fusesnap daemon"), int(fuse), bytes.fromhex(init_request), int(ready)
    )


if __name__ == "__main__":
    main()
