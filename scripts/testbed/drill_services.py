"""The services process is killed during Prepares, as containerd would send them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from fusesnap.services.api import snapshots_pb2 as messages
from fusesnap.services.api.snapshots_pb2_grpc import SnapshotsStub
from testbed.drill_bed import HANG, DrillBed, Line, Materials, drill_bed, kill, next_part
from testbed.drill_outcome import Outcome
from testbed.drills import observed, wait_for_recovery
from testbed.workplace import run_directory

CALLERS = 8
RETRY = 0.02  # seconds between two tries of a call
CALLS = "Prepare, retries included"
# A client that waits no longer than the service needs to come back.
CHANNEL = (("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50),
           ("grpc.min_reconnect_backoff_ms", 20))  # fmt: skip
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class Snapshots:
    """containerd's side of the Snapshots service, which tries again when an answer is lost."""

    def __init__(self, address: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{address}", options=CHANNEL)
        self._stub: Any = SnapshotsStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def prepare(self, key: str, parent: str) -> None:
        """Prepare; AlreadyExists after a lost answer counts when Stat shows what was asked for."""
        request = messages.PrepareSnapshotRequest(key=key, parent=parent)
        if self._retried(self._stub.Prepare, request, grpc.StatusCode.ALREADY_EXISTS) is None:
            info = self.stat(key)
            if (info.parent, info.kind) != (parent, messages.ACTIVE):
                raise ValueError(f"{key} is there, but as {info}")

    def remove(self, key: str) -> None:
        """Remove; NotFound after a lost answer counts."""
        request = messages.RemoveSnapshotRequest(key=key)
        self._retried(self._stub.Remove, request, grpc.StatusCode.NOT_FOUND)

    def stat(self, key: str) -> Any:
        return self._retried(self._stub.Stat, messages.StatSnapshotRequest(key=key)).info

    def mounts(self, key: str) -> list[Any]:
        answer = self._retried(self._stub.Mounts, messages.MountsRequest(key=key))
        return list(answer.mounts)

    def all(self) -> list[Any]:
        """Every snapshot's info."""

        def listed(request: Any, timeout: float) -> list[Any]:
            return [
                info for block in self._stub.List(request, timeout=timeout) for info in block.info
            ]

        infos: list[Any] = self._retried(listed, messages.ListSnapshotsRequest())
        return infos

    def _retried(
        self, call: Callable[..., Any], request: Any, done: grpc.StatusCode | None = None
    ) -> Any:
        """The answer; None for status ``done`` when an earlier answer was lost. Raises ``grpc.RpcError``."""
        deadline, lost = time.monotonic() + HANG, False
        while True:
            try:
                return call(request, timeout=HANG)
            except grpc.RpcError as error:
                status = error.code()
                if lost and status is done:
                    return None
                if status not in LOST or time.monotonic() > deadline:
                    raise
                lost = True
            time.sleep(RETRY)


def kill_services(
    materials: Materials, kills: int, *, seed: int, line: Line, prepares: int = 100
) -> Outcome:
    """SIGKILL to the services during Prepares: none is half done, a retry succeeds, readers notice nothing."""
    outcome = Outcome("kill -9 of the services in Prepares", seed)
    chance = random.Random(seed)  # noqa: S311
    with (
        run_directory("fd-") as work,
        drill_bed(materials, work, line=line) as bed,
        observed(outcome, bed, materials.many, bed.image(materials.many), "one", seed) as (
            group,
            events,
        ),
    ):
        snapshots = Snapshots(bed.daemon.address)
        try:
            parent = image_chain(snapshots)
            before = {info.name for info in snapshots.all()}
            enough = threading.Event()
            with ThreadPoolExecutor(CALLERS) as threads:
                calls = Calls(snapshots, parent, prepares, enough, outcome)
                futures = [threads.submit(calls.run, number) for number in range(CALLERS)]
                try:
                    kill_all_through(bed, kills, chance, events.now)
                finally:
                    enough.set()
                for future in futures:
                    outcome.wrong += future.result()
            outcome.wrong += half_done(bed, snapshots, parent, before | calls.kept)
        finally:
            snapshots.close()
        wait_for_recovery(group)
    return outcome


def kill_all_through(
    bed: DrillBed, kills: int, chance: random.Random, event: Callable[[], None]
) -> None:
    """Kill the services, each time a while after they serve again."""
    pid: int | None = None
    for _ in range(kills):
        pid = next_part(bed.daemon.service.pid, "services", pid)
        bed.daemon.service.wait_until(lambda: served(bed), timeout=HANG)
        time.sleep(chance.uniform(0, 0.3))
        event()
        kill(pid)
    next_part(bed.daemon.service.pid, "services", pid)


def served(bed: DrillBed) -> bool:
    """Whether somebody accepts calls."""
    with grpc.insecure_channel(f"unix:{bed.daemon.address}", options=CHANNEL) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.2)
        except grpc.FutureTimeoutError:
            return False
    return True


def image_chain(snapshots: Snapshots) -> str:
    """The name of the image's topmost layer."""
    infos = snapshots.all()
    parents = {info.parent for info in infos if info.kind == messages.COMMITTED}
    (top,) = (
        info.name for info in infos if info.kind == messages.COMMITTED and info.name not in parents
    )
    return str(top)


class Calls:
    """Callers that prepare snapshots, at least so many and until told that it is enough; each removes every other."""

    def __init__(
        self,
        snapshots: Snapshots,
        parent: str,
        prepares: int,
        enough: threading.Event,
        outcome: Outcome,
    ) -> None:
        self._snapshots = snapshots
        self._parent = parent
        self._each = prepares // CALLERS + 1
        self._enough = enough
        self._outcome = outcome
        self.kept: set[str] = set()

    def run(self, caller: int) -> list[str]:
        """One caller; returns what went wrong."""
        wrong: list[str] = []
        number = 0
        while number < self._each or not self._enough.is_set():
            try:
                self._cycle(f"default/{caller}/drill-{number}", keep=number % 2 == 0)
            except (grpc.RpcError, ValueError) as error:
                wrong.append(f"caller {caller}, call {number}: {error!r}")
            time.sleep(RETRY)
            number += 1
        return wrong

    def _cycle(self, key: str, *, keep: bool) -> None:
        start = time.monotonic()
        self._snapshots.prepare(key, self._parent)
        self._outcome.add(CALLS, [time.monotonic() - start])
        if keep:
            self.kept.add(key)
        else:
            self._snapshots.remove(key)


def half_done(bed: DrillBed, snapshots: Snapshots, parent: str, expected: set[str]) -> list[str]:
    """What is not as the answered calls have left it."""
    infos = {info.name: info for info in snapshots.all()}
    wrong = [f"missing: {key}" for key in expected - set(infos)]
    wrong += [f"nobody asked for: {key}" for key in set(infos) - expected]
    for key in expected & set(infos):
        if not key.partition("drill-")[1]:
            continue
        if (infos[key].parent, infos[key].kind) != (parent, messages.ACTIVE):
            wrong.append(f"{key} is {infos[key]}")
        wrong += [
            f"{key}: its mount names {directory}, which is not there"
            for mount in snapshots.mounts(key)
            for directory in directories(mount.options)
            if not Path(directory).is_dir()
        ]
    kept = list((bed.daemon.state / "snapshots").iterdir())
    if len(kept) != len(infos):
        wrong.append(f"{len(infos)} snapshots have {len(kept)} directories")
    return wrong


def directories(options: list[str]) -> list[str]:
    """The directories that an overlay's options name."""
    return [
        directory
        for option in options
        if option.startswith(("lowerdir=", "upperdir=", "workdir="))
        for directory in option.partition("=")[2].split(":")
    ]
