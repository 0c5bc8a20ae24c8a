"""The services process, or everything of ours, is killed while snapshots are made, committed and removed.

Every caller keeps a model of what it was told. After a kill all callers wait until the next life serves, and what that
has is compared with the models: what was acknowledged is there, a call without an answer is done or not done, with
nothing in between, and no directory is there that no snapshot owns.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fusesnap.services.api import snapshots_pb2 as messages
from fusesnap.services.api.snapshots_pb2_grpc import SnapshotsStub
from testbed.drill_bed import HANG, Materials, kill, next_part, wait_for
from testbed.drill_outcome import Outcome
from testbed.drill_services import CHANNEL, LOST, directories
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.processes import CommandFailed
from testbed.workplace import run_directory

CALLERS = 6
EVERYTHING = 5  # every fifth kill takes all processes together
PAUSE = 0.25  # seconds of calls before a kill, at most
MANY = 12  # snapshots of one caller; with more it rather removes
PATHS = 4  # store paths of a layer
MARK = "mark"  # a file in each snapshot, which holds the key that it was prepared as
SWEPT = 60.0  # seconds in which the start-up pass ends, on the slowest machine
RECOVERY = "until it serves again"
# Nothing is fetched here, and a start is the faster the less starts.
CONFIGURATION = "spare-worker = false\n[fetch]\nunpackers = 1\n"
REMOVED = "which no snapshot owns"


def kill_in_transactions(materials: Materials, kills: int, *, seed: int) -> Outcome:
    """SIGKILL during Prepare, Commit and Remove: what was acknowledged is there, and nothing else."""
    name = "kill -9 of the services, or of everything, in Prepare, Commit and Remove"
    outcome = Outcome(name, seed, removed=0)
    with run_directory("fd-") as work, contextlib.ExitStack() as stack:
        Drill(materials, work, outcome, stack).run(kills)
    return outcome


@dataclass(frozen=True, slots=True)
class Expected:
    """A snapshot as it was acknowledged. ``directory`` holds its own files; None until it is known."""

    parent: str
    kind: int
    mark: str
    directory: Path | None


@dataclass(frozen=True, slots=True)
class Change:
    """What a call does to the snapshots of its caller: keys that go, and snapshots that come."""

    gone: frozenset[str] = frozenset()
    come: Mapping[str, Expected] = field(default_factory=dict)

    def done(self, names: set[str]) -> bool:
        """Whether it is done, to judge by all keys that there are."""
        return self.come.keys() <= names and not self.gone & names

    def undone(self, names: set[str]) -> bool:
        """Whether nothing of it is done."""
        return self.gone <= names and not self.come.keys() & names


class Meeting:
    """Where the callers wait while what they know is compared."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(CALLERS + 1)
        self.called = threading.Event()
        self.ended = threading.Event()

    def wait(self) -> None:
        """All have come when this returns. Raises BrokenBarrierError when one never will."""
        self._barrier.wait(HANG)

    def give_up(self) -> None:
        """Let nobody wait for us."""
        self._barrier.abort()


class Caller:
    """One client. Its keys are its own; ``stub`` speaks to the daemon of the moment."""

    def __init__(self, number: int, seed: int, layers: Sequence[str], stub: Any) -> None:
        self._prefix = f"drill/{number}"
        self._chance = random.Random(seed + number)  # noqa: S311
        self._store_paths = layers
        self._stub = stub
        self._count = 0
        self.snapshots: dict[str, Expected] = {}
        self.pending: Change | None = None
        self.answered = 0

    def run(self, meeting: Meeting) -> None:
        """Call until the meeting is over."""
        try:
            while not meeting.ended.is_set():
                if meeting.called.is_set() or self.pending is not None:
                    meeting.wait()  # all callers wait
                    meeting.wait()  # all was compared
                else:
                    self.step()
        except BaseException:
            meeting.give_up()
            raise

    def step(self) -> None:
        """One call, by chance one that makes, commits or removes."""
        chance = self._chance
        layers = [key for key, one in self._actives() if "extract-" in key and one.directory]
        leaves = sorted(self.snapshots.keys() - {one.parent for one in self.snapshots.values()})
        if leaves and chance.random() < len(self.snapshots) / MANY / 2:
            self._remove(chance.choice(leaves))
        elif layers and chance.random() < 0.6:
            self._commit(chance.choice(layers))
        else:
            self._prepare()

    def _actives(self) -> list[tuple[str, Expected]]:
        return [(key, one) for key, one in self.snapshots.items() if one.kind == messages.ACTIVE]

    def _prepare(self) -> None:
        committed = [name for name, one in self.snapshots.items() if one.kind == messages.COMMITTED]
        parent = self._chance.choice(["", *committed])
        self._count += 1
        # On a parent half of them are containers, whose mounts have the store.
        word = "container" if parent and self._count % 2 else "extract"
        key = f"{self._prefix}/{word}-{self._count}"
        made = Expected(parent, messages.ACTIVE, key, None)
        request = messages.PrepareSnapshotRequest(key=key, parent=parent, labels={"drill": key})
        answer = self._call(self._stub.Prepare, request, Change(come={key: made}))
        if answer is not None:
            self._furnish(key, answer.mounts)

    def _commit(self, key: str) -> None:
        active = self.snapshots[key]
        name = key.replace("extract", "layer")
        made = Expected(active.parent, messages.COMMITTED, key, active.directory)
        request = messages.CommitSnapshotRequest(name=name, key=key, labels={"drill": name})
        self._call(self._stub.Commit, request, Change(frozenset({key}), {name: made}))

    def _remove(self, key: str) -> None:
        request = messages.RemoveSnapshotRequest(key=key)
        self._call(self._stub.Remove, request, Change(frozenset({key})))

    def _call(self, call: Callable[..., Any], request: Any, change: Change) -> Any:
        """The answer; None if it was lost, and then ``pending`` is what may have been done."""
        self.pending = change
        try:
            answer = call(request, timeout=HANG)
        except grpc.RpcError as error:
            if error.code() not in LOST:
                raise
            return None
        self._apply(change)
        self.answered += 1
        return answer

    def _apply(self, change: Change) -> None:
        self.pending = None
        for key in change.gone:
            del self.snapshots[key]
        self.snapshots.update(change.come)

    def _furnish(self, key: str, mounts: Sequence[Any]) -> None:
        """Write into a snapshot what its layer consists of, as containerd's applier does: into its own directory."""
        (mount,) = mounts
        uppers = [word for word in mount.options if word.startswith("upperdir=")]
        directory = Path(uppers[0].removeprefix("upperdir=") if uppers else mount.source)
        one = self.snapshots[key]
        self.snapshots[key] = Expected(one.parent, one.kind, one.mark, directory)
        (directory / MARK).write_text(key)
        if "extract-" in key:
            for path in self._chance.sample(self._store_paths, PATHS):
                (directory / path.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def settle(self, infos: Mapping[str, Any]) -> Iterator[str]:
        """Find out what became of the call without an answer; yields what is not as it should be."""
        names = set(infos)
        if self.pending is not None:
            if self.pending.done(names):
                self._apply(self.pending)
            elif self.pending.undone(names):
                self.pending = None
            else:
                yield f"half done: {self.pending}"
        for key, one in list(self.snapshots.items()):
            if key not in infos:
                yield f"acknowledged, and not there: {key} {one}"
                continue
            info = infos[key]
            if (info.parent, info.kind, dict(info.labels)) != (
                one.parent,
                one.kind,
                {"drill": key},
            ):
                yield f"acknowledged as {one}: {info}"
            if one.kind == messages.ACTIVE:
                yield from self._settle_active(key, one)
            elif one.directory and (one.directory / MARK).read_text() != one.mark:
                yield f"not its own content: {key} {one}"

    def _settle_active(self, key: str, one: Expected) -> Iterator[str]:
        mounts = self._stub.Mounts(messages.MountsRequest(key=key), timeout=HANG).mounts
        if one.directory is None:
            self._furnish(key, mounts)
        elif (one.directory / MARK).read_text() != one.mark:
            yield f"not its own content: {key} {one}"
        for mount in mounts:
            for directory in directories(mount.options):
                if not Path(directory).is_dir():
                    yield f"{key}: its mount names {directory}, which is not there"


class Drill:
    """The node, the callers and the kills."""

    def __init__(
        self, materials: Materials, work: Path, outcome: Outcome, stack: contextlib.ExitStack
    ) -> None:
        self._work = work
        self._outcome = outcome
        self._stack = stack
        self._source = Source([f"file://{materials.files.directory}"], [materials.key.public])
        self._chance = random.Random(outcome.seed)  # noqa: S311
        self._daemon = self._start()
        channel = stack.enter_context(
            grpc.insecure_channel(f"unix:{self._daemon.address}", options=CHANNEL)
        )
        self._stub: Any = SnapshotsStub(channel)
        paths = sorted(materials.small.paths.values())
        self._callers = [
            Caller(number, outcome.seed, paths, self._stub) for number in range(CALLERS)
        ]

    def run(self, kills: int) -> None:
        """Kill so often, and compare after each."""
        meeting = Meeting()
        with ThreadPoolExecutor(CALLERS) as threads:
            calls = [threads.submit(caller.run, meeting) for caller in self._callers]
            try:
                for number in range(1, kills + 1):
                    self._round(meeting, everything=number % EVERYTHING == 0)
            except threading.BrokenBarrierError:
                self._outcome.wrong.append(f"a caller gave up in round {self._outcome.events + 1}")
            finally:
                meeting.ended.set()
                meeting.give_up()
            for call in calls:
                with contextlib.suppress(threading.BrokenBarrierError):
                    call.result()
        self._outcome.accesses = sum(caller.answered for caller in self._callers)

    def _round(self, meeting: Meeting, *, everything: bool) -> None:
        time.sleep(self._chance.uniform(0, PAUSE))
        start = time.monotonic()
        services = next_part(self._daemon.service.pid, "services", None)
        said = 0 if everything else self._said()  # a new daemon has a new log
        if everything:
            self._daemon.service.kill()
        else:
            kill(services)
        meeting.called.set()
        meeting.wait()
        if everything:
            self._start_again()
        else:
            next_part(self._daemon.service.pid, "services", services)
        infos = self._infos()
        self._outcome.add(RECOVERY, [time.monotonic() - start])
        self._outcome.wrong += self._compare(infos)
        self._outcome.removed = (self._outcome.removed or 0) + self._said() - said
        self._outcome.events += 1
        meeting.called.clear()
        meeting.wait()

    def _start(self) -> FusesnapDaemon:
        configuration = self._work / "fusesnap.toml"
        configuration.write_text(CONFIGURATION)
        options = ["--config", str(configuration)]
        return self._stack.enter_context(
            fusesnap_daemon(self._work / "s", source=self._source, options=options)
        )

    def _start_again(self) -> None:
        """Start on what the dead have left. What no row owns must be removed, and each of it told of."""
        orphans = orphans_of(self._daemon.state)
        self._daemon = daemon = self._start()

        def silent() -> list[Path]:
            said = daemon.service.log_text()
            return [each for each in orphans if f"removed {each}, {REMOVED}" not in said]

        with contextlib.suppress(CommandFailed):
            wait_for(lambda: not silent(), "a word on each orphan", timeout=SWEPT)
        self._outcome.wrong += [f"removed in silence: {orphan}" for orphan in silent()]

    def _said(self) -> int:
        """How many things start-up passes have told of."""
        return self._daemon.service.log_text().count(REMOVED)

    def _infos(self) -> dict[str, Any]:
        """Every snapshot's info, as soon as somebody answers."""
        found: dict[str, Any] = {}

        def answered() -> bool:
            try:
                blocks = list(self._stub.List(messages.ListSnapshotsRequest(), timeout=HANG))
            except grpc.RpcError as error:
                if error.code() not in LOST:
                    raise
                return False
            found.update((info.name, info) for block in blocks for info in block.info)
            return True

        wait_for(answered, "an answer to List")
        return found

    def _compare(self, infos: Mapping[str, Any]) -> list[str]:
        wrong: list[str] = []
        for caller in self._callers:
            try:
                wrong += caller.settle(infos)
            except (OSError, grpc.RpcError) as error:
                wrong.append(f"cannot be compared: {error!r}")
        expected = {key for caller in self._callers for key in caller.snapshots}
        wrong += [f"nobody made it: {infos[key]}" for key in infos.keys() - expected]
        state = self._daemon.state
        # What nobody owns goes while calls are served.
        with contextlib.suppress(CommandFailed):
            wait_for(lambda: not leftovers(state), "the end of the start-up pass", timeout=SWEPT)
        wrong += [f"left behind: {entry}" for entry in leftovers(state)]
        there = {entry.name for entry in (state / "snapshots").iterdir()}
        wrong += [f"a row without its directory: {name}" for name in rows(state) - there]
        return [f"after kill {self._outcome.events + 1}: {line}" for line in wrong]


def rows(state: Path) -> set[str]:
    """The ids that the metastore has, read from a copy: to open it would recover it. Raises ValueError if it is bad."""
    with tempfile.TemporaryDirectory(dir=state.parent) as directory:
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(state / f"snapshots.sqlite{suffix}", directory)
        with contextlib.closing(sqlite3.connect(Path(directory) / "snapshots.sqlite")) as copy:
            for check in ("integrity_check", "foreign_key_check"):
                found = copy.execute(f"PRAGMA {check}").fetchall()
                if found not in ([], [("ok",)]):
                    raise ValueError(f"{check} of the metastore: {found}")
            return {str(row[0]) for row in copy.execute("SELECT id FROM snapshots")}


def orphans_of(state: Path) -> list[Path]:
    """The directories of snapshots that no row owns."""
    owned = rows(state)
    return [entry for entry in (state / "snapshots").iterdir() if entry.name not in owned]


def leftovers(state: Path) -> list[Path]:
    """The same, and farms that are not whole."""
    farms = (state / "farms").iterdir()
    return orphans_of(state) + [one for one in farms if one.name.startswith(("new-", "rm-"))]
