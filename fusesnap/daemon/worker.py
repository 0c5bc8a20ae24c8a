"""The worker process: serves the mount that the supervisor holds, and fetches.

Started as ``python -m fusesnap.daemon.worker SETTINGS FUSE INIT READY``: the settings as JSON, the descriptor of the
FUSE connection (or "relay:" and that of the supervisor's relay), the kernel's FUSE_INIT request in hexadecimal, and the
line to the supervisor (see ``turn``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyfuse3
import trio

from fusesnap.config import Settings, handed_down
from fusesnap.daemon import control
from fusesnap.daemon.build import Authorities, Node, open_node, plain_errors
from fusesnap.daemon.bundles import calls as bundle_calls
from fusesnap.daemon.entry_program import EntryProgram
from fusesnap.daemon.hints import HeardHints
from fusesnap.daemon.logs import explained, log_to_stderr
from fusesnap.daemon.niceness import before_others
from fusesnap.daemon.readers import identify, is_dying, is_thread_of
from fusesnap.daemon.readiness import Readiness
from fusesnap.daemon.signals import stop_on_signal
from fusesnap.daemon.status import status_of_wait, worker_status
from fusesnap.daemon.traces import bundled, make_recorder, make_traces
from fusesnap.daemon.turn import BEAT, READY, wait_for_turn
from fusesnap.errors import FusesnapError
from fusesnap.fetch.contents import Contents
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.traces.recorder import Bounds
from fusesnap.fetch.traces.traces import Traces
from fusesnap.fetch.unpack_frames import encode_error
from fusesnap.filesystem.accesses import Recorded
from fusesnap.filesystem.error_counts import ErrorCounts
from fusesnap.filesystem.inode import InodeKind
from fusesnap.filesystem.layer_nodes import LayerNodes
from fusesnap.filesystem.nodes import Nodes
from fusesnap.filesystem.open_files import OpenFiles
from fusesnap.filesystem.operations import Operations
from fusesnap.filesystem.session import answer_requests, joined, session
from fusesnap.filesystem.store_nodes import StoreNodes
from fusesnap.filesystem.views import Views
from fusesnap.filesystem.waiting import Request, WaitingRequests

# Seconds between two signs of life for the supervisor's watchdog.
BEAT_EVERY = 1.0
# Seconds that requests have to be answered in, when we are told to stop.
DRAIN = 5.0
# Seconds that what was collected may go on taking room on the disk.
CLOSE_REMOVED_EVERY = 10.0
# Each blocked reader occupies a task of a few KiB; more than this do not block at once on a node.
MAX_TASKS = 4096


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker serves with."""

    node: Node
    operations: Operations
    waiting: WaitingRequests
    send_again: Callable[[], object]
    open_files: OpenFiles
    traces: Traces


async def serve(
    settings: Settings, authorities: Authorities, fuse: str, init_request: bytes, ready: int
) -> None:
    """Serve until SIGTERM or until the mount is gone."""
    with plain_errors():
        async with open_node(settings, authorities, "worker") as node:
            open_files = OpenFiles()
            views = Views(settings.root / "views.sqlite")
            waiting = WaitingRequests(identify, ErrorCounts(), node.telemetry.wait)
            recorder = make_recorder(node, Bounds(idle=settings.traces.idle))
            accesses = Recorded(recorder, node.loader.opened)
            store_nodes = StoreNodes(node.store, node.contents, open_files, waiting, accesses)
            parts: dict[InodeKind, Nodes] = {
                InodeKind.FIXED: LayerNodes(store_nodes, views),
                InodeKind.STORE: store_nodes,
                InodeKind.CLAIMED: store_nodes,
            }
            operations = Operations(parts, node.store.layer)
            node.telemetry.watch(lambda: totals_of(operations, waiting))
            node.telemetry.counters.add("fusesnap_worker_starts")
            traces = make_traces(node, recorder, waiting)
            with connected(fuse, init_request, operations) as send_again:
                worker = Worker(node, operations, waiting, send_again, open_files, traces)
                await answer(worker, ready)
            open_files.close()
            views.close()


def totals_of(
    operations: Operations, waiting: WaitingRequests
) -> Iterator[tuple[str, dict[str, str], float]]:
    """What a worker counts of its requests: those that found what they wanted in the store, and those that waited."""
    for operation, taken in operations.requests.items():
        waited = waiting.waited[operation]
        for source, count in (("store", taken - waited), ("fetched", waited)):
            yield "fusesnap_requests", {"operation": operation, "source": source}, count
    yield "fusesnap_read_bytes", {}, operations.bytes_read


def connected(
    fuse: str, init_request: bytes, operations: Operations
) -> AbstractContextManager[Callable[[], object]]:
    """The session over what the supervisor gave us: the FUSE connection, or its relay."""
    kind, _, descriptor = fuse.rpartition(":")
    if kind == "relay":
        return session(int(descriptor), operations)
    return joined(int(descriptor), init_request, operations)


async def answer(worker: Worker, ready: int) -> None:
    """Answer the kernel and the control socket."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_gently, worker, nursery.cancel_scope)
        nursery.start_soon(worker.waiting.release_killed, is_dying)
        nursery.start_soon(close_unused, worker.open_files, worker.node.contents)
        address = worker.node.settings.root / control.SOCKET_NAME
        answers = {**calls(worker), **heard_hints(worker, nursery).calls}
        patient = {
            "realise": realising(worker.node),
            **bundle_calls(worker.node.bundles, worker.node.store_dir),
        }
        serve_control = partial(control.serve, patient=patient)
        await nursery.start(serve_control, address, answers)
        nursery.start_soon(say_alive, ready)
        # Not before the mount is joined: those who wait for an answer wait longer than those who wait for a path.
        worker.node.unpackers.start()
        nursery.start_soon(worker.traces.run)
        await answer_requests(MAX_TASKS, worker.send_again)
        nursery.cancel_scope.cancel()


def heard_hints(worker: Worker, nursery: trio.Nursery) -> HeardHints:
    """What is done about starts that the services process tells of, in ``nursery``."""
    node = worker.node
    readiness = Readiness(node.store, node.pool)
    return HeardHints(
        node.store_dir,
        worker.traces,
        readiness.get_ready,
        partial(bundled, node.bundles),
        node.contents.learn,
        EntryProgram(node.store, node.contents, node.loader).follow,
        readiness.open,
        nursery,
    )


async def say_alive(line: int) -> None:
    """Tell the supervisor that we serve, and go on telling it that this loop runs."""
    os.set_blocking(line, False)  # a supervisor that is stopped must not stop us
    word = READY
    while True:
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            os.write(line, word)
        word = BEAT
        await trio.sleep(BEAT_EVERY)


async def close_unused(open_files: OpenFiles, contents: Contents) -> None:
    """Let go of files that were collected as garbage, or that nobody reads, now and then, until cancelled."""
    while True:
        await trio.sleep(CLOSE_REMOVED_EVERY)
        open_files.close_removed()
        contents.close_unused()


async def stop_gently(worker: Worker, scope: trio.CancelScope) -> None:
    """At SIGTERM take no more requests, answer those that can be answered at once, and end.

    Those that wait for a transfer are left to the next worker: it is sent them again.
    """
    async with trio.open_nursery() as nursery:
        await stop_on_signal(nursery.cancel_scope)
    pyfuse3.terminate()
    with trio.move_on_after(DRAIN):
        while worker.operations.under_way > len(worker.waiting):  # noqa: ASYNC110 - an event for
            await trio.sleep(0.01)  # this would cost every request, for the sake of the last ones
    scope.cancel()


def realising(node: Node) -> control.Answer:
    """What answers when ``path`` is committed, for somebody who waits for it in another process, or cannot be had.

    It is as urgent as ``priority`` says, the name of a ``Priority``.
    """

    async def realise(question: Mapping[str, Any]) -> dict[str, Any]:
        priority = Priority[question["priority"]]
        try:
            path = node.store_dir.parse(str(question["path"]))
            await node.realiser.realise(path, priority=priority)
        except FusesnapError as error:
            return {"failed": encode_error(error).decode()}
        return {}

    return realise


def calls(worker: Worker) -> Mapping[str, control.Answer]:
    """What the control socket answers."""
    node, waiting = worker.node, worker.waiting

    async def status(question: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **worker_status(node),
            "waiting": [status_of_wait(node, state) for state in waiting.states()],
            "errors": [asdict(count) for count in waiting.errors.all()],
        }

    async def fetch(question: Mapping[str, Any]) -> dict[str, Any]:
        """Fetch ``paths``, as urgently as ``priority`` says, the name of a ``Priority``."""
        paths = [node.store_dir.parse(path) for path in question.get("paths", [])]
        node.contents.request(paths, Priority[question.get("priority", Priority.PREFETCH.name)])
        return {}

    async def release(question: Mapping[str, Any]) -> dict[str, Any]:
        """End the waits for ``path``, or of the processes ``pids``; ``why`` is for the log."""
        path = node.store_dir.parse(question["path"]) if "path" in question else None
        pids = [int(pid) for pid in question.get("pids", [])]

        def matches(request: Request) -> bool:
            return request.question.path == path or any(
                is_thread_of(reader.pid, pid) for reader in request.readers for pid in pids
            )

        return {"released": waiting.release(matches, str(question["why"]))}

    async def flush(question: Mapping[str, Any]) -> dict[str, Any]:
        """Write what was recorded to the journal, for somebody who is about to read it; ``session`` names us in it."""
        await node.telemetry.flush()
        return {"session": node.telemetry.session}

    return {"status": status, "fetch": fetch, "release": release, "flush": flush}


def main() -> None:
    """Run."""
    given, fuse, init_request, ready = sys.argv[1:]
    log_to_stderr()
    before_others()
    with explained("worker"):
        settings = handed_down(given)
        authorities = Authorities.load(settings)  # readers wait for what comes after the turn
        wait_for_turn(int(ready))
        trio.run(serve, settings, authorities, fuse, bytes.fromhex(init_request), int(ready))


if __name__ == "__main__":
    main()
