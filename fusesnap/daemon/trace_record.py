"""``fusesnap trace record``: one start in a mount of its own, of which nothing is hidden from us.

The mount's inodes are fresh, so the kernel has none of their pages; what is committed is served by FUSE too; and nobody
else reads there. So the trace is complete, whatever is in the store already.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.readers import identify, is_dying
from fusesnap.daemon.signals import stop_on_signal
from fusesnap.daemon.standalone import MAX_TASKS, open_source, serving, shown_paths
from fusesnap.daemon.traces import make_recorder
from fusesnap.daemon.watching import Watch, draw
from fusesnap.errors import FusesnapError, Unsupported
from fusesnap.fetch.traces.database import NAME, Origin, TraceDatabase
from fusesnap.fetch.traces.recorder import Bounds, Recorder
from fusesnap.fetch.traces.recording import Conditions, Recording, Start
from fusesnap.filesystem.accesses import Recorded
from fusesnap.filesystem.error_counts import ErrorCounts
from fusesnap.filesystem.waiting import WaitingRequests
from fusesnap.images.rootfs import RootFs
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash
from fusesnap.nix.startup_trace import Ending, StartupTrace
from fusesnap.snapshots.mountinfo import devices

LOOK_EVERY: Final = 0.1  # seconds between two looks whether the start is over
NEEDED: Final = ("unshare", "sh", "mount", "env", "chroot", "mkdir", "chmod")

# In namespaces of its own: an overlay that can be written to, above the mount; what every program expects to find; and
# then the command as the first process of it all. $1 is a scratch directory, $2 the mount, $3 more overlay options; the
# rest is what to do then.
SET_UP: Final = """\
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work$3" "$1/root"
cd "$1/root"
mkdir -p proc dev sys tmp run
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs tmpfs tmp
chmod 1777 tmp
shift 3
exec "$@"
"""


class CommandEnded(FusesnapError):
    """The command that was to be recorded failed: what it read is not what a start reads."""


@dataclass(frozen=True, slots=True)
class Command:
    """What is to be started: words, and an environment."""

    words: Sequence[str]
    environment: Mapping[str, str]


async def record(
    settings: Settings, source: str, command: Command, bounds: Bounds, watch: Watch
) -> StartupTrace:
    """The trace of a start of ``command`` in ``source``, which is kept in place of what was recorded before.

    It ends with the command, or as ``bounds`` say; then the command is killed. Raises ``CommandEnded`` where it fails,
    ``Unsupported`` where this machine cannot run it apart, and as ``standalone.mount_source``.
    """
    check_programs()
    trace: StartupTrace | None = None
    with plain_errors(), scratch_directory() as scratch:
        async with open_node(settings) as node, trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, nursery.cancel_scope)
            rootfs = await open_source(node, source)
            waiting = WaitingRequests(identify, ErrorCounts())
            nursery.start_soon(waiting.release_killed, is_dying)
            recorder = make_recorder(node, bounds)
            mountpoint = scratch / "mount"
            accesses = Recorded(recorder, node.loader.opened)
            with rootfs, serving(node, rootfs, mountpoint, waiting, accesses):
                nursery.start_soon(serve)
                node.unpackers.start()
                recording = begin(
                    node, recorder, rootfs, set_readahead(mountpoint, settings.readahead_kib)
                )
                nursery.start_soon(draw, node, watch)
                async with running(command, scratch) as process:
                    ending = await over(process, recorder, waiting, bounds.seconds)
                trace = await trio.to_thread.run_sync(keep, node, recording, ending)
            nursery.cancel_scope.cancel()
    if trace is None:
        raise KeyboardInterrupt
    return trace


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory with ``mount`` and ``root``, as the kernel's list of mounts will name it."""
    with tempfile.TemporaryDirectory(prefix="fusesnap-") as name:
        directory = Path(name).resolve()
        for inner in ("mount", "root"):
            (directory / inner).mkdir()
        yield directory


def check_programs() -> None:
    """Raise ``Unsupported`` where a program is missing with which the command is started."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        raise Unsupported(
            f"{', '.join(missing)}: not found; to record a start takes util-linux and coreutils"
        )


async def serve() -> None:
    """Answer the mount."""
    await pyfuse3.main(max_tasks=MAX_TASKS)


def set_readahead(mountpoint: Path, kib: int) -> int:
    """Have the kernel read ahead as it does on a node's lazy mount, where we may; says, in bytes, what it reads ahead.

    What it adds is needed there: a program that wants a page waits for all that the kernel asks for. The mount itself
    must not be touched here: we are who answers.
    """
    setting = Path(f"/sys/class/bdi/{devices()[mountpoint]}/read_ahead_kb")
    try:
        with suppress(PermissionError):
            setting.write_text(f"{kib}\n")
        return int(setting.read_text()) * 1024
    except OSError:
        return 128 * 1024  # what the kernel begins with (VM_READAHEAD_PAGES)


def begin(node: Node, recorder: Recorder, rootfs: RootFs, readahead: int) -> Recording:
    """Record everything from now on."""
    paths = shown_paths(rootfs)
    start = Start("record", None, ClosureDigest.of(paths, node.store_dir), paths, paths)
    conditions = Conditions(int(time.time()), version("fusesnap"), readahead, {})
    recording = Recording(start, conditions, trio.current_time)
    recorder.add(recording)
    return recording


@asynccontextmanager
async def running(command: Command, scratch: Path) -> AsyncIterator[trio.Process]:
    """The command in the mount below ``scratch``, in namespaces of its own; killed with all its children at the end."""
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    options = ""
    if os.geteuid() != 0:
        words += ["--user", "--map-root-user"]
        options = ",userxattr"
    words += ["sh", "-c", SET_UP, "sh", str(scratch / "root"), str(scratch / "mount"), options]
    # The command's own PATH is of its root: what sets that up is found by ours.
    variables = [f"{name}={value}" for name, value in command.environment.items()]
    words += ["env", "-i", *variables, shutil.which("chroot") or "chroot", "."]
    process = await trio.lowlevel.open_process([*words, *command.words], start_new_session=False)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        with trio.CancelScope(shield=True):  # it dies at once: SIGKILL goes on to its children
            await process.wait()


async def over(
    process: trio.Process, recorder: Recorder, waiting: WaitingRequests, seconds: float
) -> Ending:
    """Wait until the start is over, at most so many ``seconds``, and say why it is.

    Raises ``CommandEnded`` where the command fails.
    """
    with trio.move_on_after(seconds):
        while process.poll() is None:
            for _, ending in recorder.over(waiting.paths()):
                return ending
            await trio.sleep(LOOK_EVERY)
        if process.returncode:
            raise CommandEnded(
                f"the command ended with status {process.returncode}: nothing is kept of its start"
            )
        return Ending.EXIT
    return Ending.TIME


def keep(node: Node, recording: Recording, ending: Ending) -> StartupTrace:
    """What was recorded, in place of what was recorded before. Blocking."""

    def nar_hash(ordinal: int) -> Hash | None:
        pin = node.store.pin_of(ordinal)
        return None if pin is None else pin.info.nar_hash

    trace = recording.draft(ending).trace(nar_hash, node.store.tree)
    with opened(node.settings.root / NAME) as database:
        database.put(trace, Origin.RECORDED, int(time.time()))
    return trace


@contextmanager
def opened(path: Path) -> Iterator[TraceDatabase]:
    """The traces of a node. Raises ``StorageFailure``."""
    database = TraceDatabase(path)
    try:
        yield database
    finally:
        database.close()
