"""The unpacking side of the stream: a loop that does one piece of one NAR after another."""

from __future__ import annotations

import logging
import socket

from fusesnap.errors import FusesnapError, InvalidData
from fusesnap.fetch.unpack import Unpacker
from fusesnap.fetch.unpack_frames import Frame, FrameKind, FrameParser, encode_error
from fusesnap.nix.narinfo import parse_narinfo
from fusesnap.store.local_store import LocalStore, StagedPath

log = logging.getLogger(__name__)

RECEIVE = 1 << 20


class UnpackServer:
    """Serves one stream until its other end is closed; then what was not committed is thrown away."""

    def __init__(self, stream: socket.socket, store: LocalStore) -> None:
        self._stream = stream
        self._store = store
        self._jobs: dict[int, tuple[StagedPath, Unpacker]] = {}

    def run(self) -> None:
        """Blocking. Raises ``OSError`` where the stream breaks, ``InvalidData`` for what is no frame."""
        parser = FrameParser()
        self._stream.sendall(Frame(0, FrameKind.READY).encode())
        try:
            while data := self._stream.recv(RECEIVE):
                parser.receive_data(data)
                while (frame := parser.next_frame()) is not None:
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
            return  # it has failed, and what was under way still comes
        elif frame.kind is FrameKind.DROP:
            self._drop(frame.job)
            self._stream.sendall(Frame(frame.job, FrameKind.DONE).encode())
        elif frame.kind is FrameKind.DATA:
            self._jobs[frame.job][1].feed(frame.body)
        elif frame.kind is FrameKind.COMMIT:
            self._commit(frame.job)

    def _begin(self, frame: Frame) -> None:
        info = parse_narinfo(frame.body, self._store.store_dir)
        pin = self._store.pinned(info.store_path)
        if pin is None or pin.info.nar_hash != info.nar_hash:
            raise InvalidData(f"{info.store_path}: is not pinned as {info.nar_hash}")
        staged = self._store.stage(pin)
        self._jobs[frame.job] = (staged, Unpacker(info, staged))

    def _commit(self, job: int) -> None:
        staged, unpacker = self._jobs[job]
        unpacker.finish()
        staged.commit()
        self._drop(job)
        self._stream.sendall(Frame(job, FrameKind.DONE).encode())

    def _fail(self, job: int, error: FusesnapError) -> None:
        self._drop(job)
        self._stream.sendall(Frame(job, FrameKind.FAILED, encode_error(error)).encode())

    def _drop(self, job: int) -> None:
        dropped = self._jobs.pop(job, None)
        if dropped is not None:
            dropped[0].__exit__(None, None, None)
