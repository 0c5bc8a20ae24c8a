"""Unpacks in processes of their own, so that no reader waits for the interpreter lock behind a large NAR."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count

import trio

from fusesnap.errors import FusesnapError
from fusesnap.fetch.unpack_frames import Frame, FrameKind, FrameParser, decode_error
from fusesnap.fetch.unpack_start import GRACE, StartedProcess
from fusesnap.fetch.unpacking import UnpackerDied, Unpackers, Unpacking
from fusesnap.nix.narinfo import NarInfo
from fusesnap.store.local_store import Pin

log = logging.getLogger(__name__)

RECEIVE = 65536
# What a NAR costs however small it is, as bytes that are unpacked in the same time.
FOR_EACH = 256 * 1024
# Seconds for it to take a frame. It does one thing at a time: a commit of a large NAR may have to be on a slow disk
# first. One that takes longer hangs, or is stopped.
STALLED = 60.0


class UnpackProcesses:
    """A few processes that share the NARs between them.

    ``command`` starts one, see :class:`~.unpack_start.StartedProcess`. Used within ``nursery``; one that dies is
    replaced when the next NAR comes. ``meanwhile`` unpacks until the first of them is ready: a reader that waits must
    not wait for a process to start too. ``started`` are some that have been started already.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        nursery: trio.Nursery,
        meanwhile: Unpackers,
        started: Sequence[StartedProcess] = (),
    ) -> None:
        self._command = list(command)
        self._slots: list[_Process | None] = [None] * processes
        self._nursery = nursery
        self._meanwhile = meanwhile
        for slot, each in enumerate(started[:processes]):
            self._slots[slot] = self._heard(each)

    def start(self) -> None:
        """Start them all now, so that the first NAR does not wait for one."""
        for slot in range(len(self._slots)):
            self._process(slot)

    @asynccontextmanager
    async def unpacking(self, pin: Pin, info: NarInfo) -> AsyncIterator[Unpacking]:
        """See ``Unpackers``."""
        process = self._least_busy()
        if not process.ready:
            async with self._meanwhile.unpacking(pin, info) as here:
                yield here
            return
        job = process.begin(info)
        try:
            yield job
        finally:
            await process.end(job)

    async def all_ready(self) -> None:
        """Return when all that run can take NARs, or are gone."""
        for process in [process for process in self._slots if process is not None]:
            await process.settled.wait()

    def pids(self) -> list[int]:
        """Of those that run."""
        return [process.pid for process in self._slots if process is not None and process.alive]

    def _least_busy(self) -> _Process:
        """The one with the least to do, those that are ready first; another is started while all are busy."""
        running = [process for process in self._slots if process is not None and process.alive]
        if all(process.jobs for process in running if process.ready):
            for slot, process in enumerate(self._slots):
                if process is None or not process.alive:
                    running.append(self._process(slot))
                    break
        return min(running, key=lambda process: (not process.ready, process.load))

    def _process(self, slot: int) -> _Process:
        process = self._slots[slot]
        if process is None or not process.alive:
            process = self._slots[slot] = self._heard(StartedProcess(self._command))
        return process

    def _heard(self, started: StartedProcess) -> _Process:
        process = _Process(started)
        self._nursery.start_soon(process.receive, name="unpack process")
        return process


class _Process:
    """One process and its stream."""

    def __init__(self, started: StartedProcess) -> None:
        self._started = started
        started.stream.setblocking(False)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(started.stream))
        self._sending = trio.Lock()
        self._numbers = count(1)
        self._jobs: dict[int, _ProcessUnpacking] = {}
        self.alive = True
        self.settled = trio.Event()

    @property
    def ready(self) -> bool:
        return self.alive and self.settled.is_set()

    @property
    def pid(self) -> int:
        return self._started.process.pid

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    @property
    def load(self) -> int:
        """Bytes of NARs that it has still to unpack, at most; each counts for some more."""
        return sum(job.load for job in self._jobs.values())

    def begin(self, info: NarInfo) -> _ProcessUnpacking:
        job = _ProcessUnpacking(next(self._numbers), self, info)
        self._jobs[job.number] = job
        return job

    async def end(self, job: _ProcessUnpacking) -> None:
        """Have a NAR dropped that was not committed."""
        try:
            with trio.move_on_after(GRACE, shield=True) as patience:
                if job.begun and not job.answered:
                    await self.send(Frame(job.number, FrameKind.DROP))
                    await job.landed()
            if patience.cancelled_caught:
                self._give_up()
        except UnpackerDied:
            pass  # then there is nothing to drop
        finally:
            del self._jobs[job.number]

    async def send(self, *frames: Frame) -> None:
        # A frame that is cut short would garble all that follow: once begun it is sent to its end.
        async with self._sending:
            with trio.move_on_after(STALLED, shield=True) as patience:
                try:
                    await self._stream.send_all(b"".join(frame.encode() for frame in frames))
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self.alive = False  # perhaps before it was heard: the next NAR gets another
                    raise UnpackerDied(f"unpack process {self.pid} is gone") from error
        if patience.cancelled_caught:
            self._give_up()
            raise UnpackerDied(f"unpack process {self.pid} took nothing for {STALLED:g} s: killed")

    def _give_up(self) -> None:
        """It hangs: the next NAR gets another."""
        log.warning("unpack process %d hangs or is stopped: killed", self.pid)
        self.alive = False
        self._started.process.kill()

    async def receive(self) -> None:
        """Hand answers to their jobs until the process is gone."""
        parser = FrameParser()
        try:
            async with self._stream:
                with suppress(trio.BrokenResourceError):
                    while data := await self._stream.receive_some(RECEIVE):
                        parser.receive_data(data)
                        while (frame := parser.next_frame()) is not None:
                            self._answer(frame)
        finally:
            self.alive = False
            self.settled.set()
            for job in self._jobs.values():
                job.land(UnpackerDied(f"unpack process {self.pid} is gone"))
            with trio.CancelScope(shield=True):  # its stream is closed, so it ends
                await trio.to_thread.run_sync(self._bury)

    def _answer(self, frame: Frame) -> None:
        if frame.kind is FrameKind.READY:
            self.settled.set()
            return
        job = self._jobs.get(frame.job)
        if job is not None:
            job.land(decode_error(frame.body) if frame.kind is FrameKind.FAILED else None)

    def _bury(self) -> None:
        code = self._started.end()
        if code != 0:
            log.warning("unpack process %d ended with %d", self.pid, code)


class _ProcessUnpacking:
    """A NAR in a process. Its beginning is held back, so that a small one is there with a single message."""

    def __init__(self, number: int, process: _Process, info: NarInfo) -> None:
        self.number = number
        self.answered = False
        self.load = info.nar_size + FOR_EACH
        self._process = process
        self._held = [Frame(number, FrameKind.BEGIN, info.to_text().encode())]
        self._landed = trio.Event()
        self._error: FusesnapError | UnpackerDied | None = None

    @property
    def begun(self) -> bool:
        """Whether the process has heard of it."""
        return not self._held

    def land(self, error: FusesnapError | UnpackerDied | None) -> None:
        self._error = error
        self.answered = True
        self._landed.set()

    async def landed(self) -> None:
        await self._landed.wait()

    async def feed(self, compressed: bytes) -> None:
        if self._error is not None:
            raise self._error
        piece = Frame(self.number, FrameKind.DATA, compressed)
        if len(self._held) == 1:
            self._held.append(piece)
            await trio.lowlevel.checkpoint()
        else:
            await self._send(piece)

    async def commit(self, *, together: bool = False) -> None:
        if self._error is None:
            await self._send(Frame(self.number, FrameKind.QUEUE if together else FrameKind.COMMIT))
            self.load = 0  # but for the disk, which is the same for all processes
            await self._landed.wait()
        if self._error is not None:
            raise self._error

    async def _send(self, frame: Frame) -> None:
        await self._process.send(*self._held, frame)
        self._held = []  # not before: who is cancelled before its turn has sent nothing
