"""Starts to record: a closure of two paths, their trees, and a clock that is set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusesnap.fetch.traces.recorder import Bounds, Recorder
from fusesnap.fetch.traces.recording import Conditions, Recording, Start
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.nar import DirectoryEnd, DirectoryStart, NarEnd, RegularFile, Symlink
from fusesnap.nix.startup_trace import Ending, StartupTrace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Tree, TreeBuilder

HELLO = StorePath("0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx", "hello")
GLIBC = StorePath("1" * 32, "glibc")
OTHER = StorePath("2" * 32, "other")
ORDINALS = {1: HELLO, 2: GLIBC, 3: OTHER}
PROGRAM = 2  # the entry of hello's program, and of glibc's library
LINK = 3
SIZE = 100_000


def tree() -> Tree:
    """``bin/run``, a file, and ``bin/sh``, a link."""
    builder = TreeBuilder()
    for event in (
        DirectoryStart(b""),
        DirectoryStart(b"bin"),
        RegularFile(name=b"run", size=SIZE, executable=True, offset=0),
        Symlink(b"sh", b"run"),
        DirectoryEnd(),
        DirectoryEnd(),
        NarEnd(),
    ):
        builder.receive(event)
    return builder.tree()


TREE = tree()


def nar_hash(ordinal: int) -> Hash:
    return Hash(HashAlgorithm.SHA256, bytes([ordinal]) * 32)


def start(key: str, *paths: StorePath, upper: str | None = "") -> Start:
    members = frozenset(paths or (HELLO, GLIBC))
    return Start(
        key,
        f"/upper/{key}" if upper == "" else upper,
        ClosureDigest.of(members, StoreDir()),
        members,
        members,
    )


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A recorder, and recordings made with its clock."""

    clock: Clock = field(default_factory=Clock)
    path_of: Callable[[int], StorePath | None] = ORDINALS.get

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.path_of, self.clock, Bounds())

    def record(
        self,
        started: Start,
        conditions: Conditions | None = None,
        earlier: StartupTrace | None = None,
    ) -> Recording:
        said = conditions or Conditions(5, "0.1", 16384, {})
        recording = Recording(started, said, self.clock, earlier)
        self.recorder.add(recording)
        return recording

    def open(self, ordinal: int, pid: int | None, *, entry: int = PROGRAM) -> None:
        """What the kernel does before a file is read."""
        self.recorder.accessed(ordinal, pid)
        self.recorder.opened(ordinal, TREE, entry, pid)


def traced(recording: Recording, ended: Ending = Ending.IDLE) -> StartupTrace:
    return recording.draft(ended).trace(nar_hash, lambda path: TREE)


def reads(recording: Recording) -> list[tuple[str, int]]:
    """What was read: names of paths and numbers of bytes."""
    trace = traced(recording)
    return [
        (trace.paths[trace.files[each.file].path].path.name, each.length) for each in trace.extents
    ]
