"""The unpacking side of the stream: a loop that does one piece of one NAR after another."""

from __future__ import annotations

import logging
import socket
import threading
from io import BufferedReader
from socket import SocketIO

from fusesnap.errors import FusesnapError, InvalidData
from fusesnap.fetch.commit_queue import CommitQueue, commit_group
from fusesnap.fetch.unpack import Unpacker
from fusesnap.fetch.unpack_frames import Frame, FrameKind, encode_error, read_frame
from fusesnap.nix.narinfo import parse_narinfo
from fusesnap.store.local_store import LocalStore, StagedPath

log = logging.getLogger(__name__)

RECEIVE = 1 << 18


class UnpackServer:
    """Serves one stream until its other end is closed; then what was not to be committed yet is thrown away.

    ``linger`` is :class:`CommitQueue`'s.
    """

    def __init__(self, stream: socket.socket, store: LocalStore, linger: float = 0.0) -> None:
        self._stream = stream
        self._sending = threading.Lock()
        self._store = store
        self._queue = CommitQueue(store, self._answer, linger)
        self._jobs: dict[int, tuple[StagedPath, Unpacker]] = {}

    def run(self) -> None:
        """Blocking. Raises ``OSError`` where the stream breaks, ``InvalidData`` for what is no frame."""
        self._send(Frame(0, FrameKind.READY))
        with self._queue, BufferedReader(SocketIO(self._stream, "rb"), RECEIVE) as incoming:
            try:
                while (frame := read_frame(incoming)) is not None:
                    self._take(frame)
            finally:
                for job in list(self._jobs):
                    self._drop(job)

    def _take(self, frame: Frame) -> None:
        try:
            self._do(frame)
        except FusesnapError as error:
            self._fail(frame.job, error)
        except Exception as error:
            log.exception("unpacking failed in a way that it should not")
            self._fail(frame.job, FusesnapError(f"unexpected {type(error).__name__}: {error}"))

    def _do(self, frame: Frame) -> None:
        if frame.kind is FrameKind.BEGIN:
            self._begin(frame)
        elif frame.job not in self._jobs:
            return  # it has failed, and what was under way still comes; or its commit will be answered
        elif frame.kind is FrameKind.DROP:
            self._drop(frame.job)
            self._send(Frame(frame.job, FrameKind.DONE))
        elif frame.kind is FrameKind.DATA:
            self._jobs[frame.job][1].feed(frame.body)
        elif frame.kind is FrameKind.COMMIT:
            (outcome,) = commit_group(self._store, [self._finish(frame.job)])
            self._answer(frame.job, outcome)
        elif frame.kind is FrameKind.QUEUE:
            self._queue.put(frame.job, self._finish(frame.job))

    def _begin(self, frame: Frame) -> None:
        info = parse_narinfo(frame.body, self._store.store_dir)
        pin = self._store.pinned(info.store_path)
        if pin is None or pin.info.nar_hash != info.nar_hash:
            raise InvalidData(f"{info.store_path}: is not pinned as {info.nar_hash}")
        staged = self._store.stage(pin)
        self._jobs[frame.job] = (staged, Unpacker(info, staged))

    def _finish(self, job: int) -> StagedPath:
        """Check the whole NAR; the job is over then, and whoever commits it has the rest."""
        self._jobs[job][1].finish()
        return self._jobs.pop(job)[0]

    def _answer(self, job: int, outcome: FusesnapError | None) -> None:
        """Perhaps in the queue's thread."""
        try:
            if outcome is None:
                self._send(Frame(job, FrameKind.DONE))
            else:
                self._send(Frame(job, FrameKind.FAILED, encode_error(outcome)))
        except (BrokenPipeError, ConnectionResetError):
            log.debug("whoever asked is gone")  # and the stream's end says so too

    def _fail(self, job: int, error: FusesnapError) -> None:
        self._drop(job)
        self._answer(job, error)

    def _drop(self, job: int) -> None:
        dropped = self._jobs.pop(job, None)
        if dropped is not None:
            dropped[0].__exit__(None, None, None)

    def _send(self, frame: Frame) -> None:
        with self._sending:
            self._stream.sendall(frame.encode())
