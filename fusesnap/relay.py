"""The supervisor between the kernel and the worker: for Linux before 6.9, which cannot send a request twice.

Each request is kept until it is answered, and what a dead worker has left goes to the next one. The worker speaks FUSE
on its end of a SOCK_SEQPACKET pair, one message a request or answer, as it would on /dev/fuse.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable

# include/uapi/linux/fuse.h
OPCODE_AND_UNIQUE = struct.Struct("<4xIQ")
UNIQUE = struct.Struct("<8xQ")  # of an answer
FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42
WITHOUT_ANSWER = frozenset((FORGET, INTERRUPT, BATCH_FORGET))
INTERRUPT_BIT = (
    1  # set in the unique of an INTERRUPT, which is otherwise that of the request it is about
)

# The largest message: 128 KiB of a read or write and its headers. The socket takes several.
ROOM = 1 << 18
SOCKET_BUFFER = 1 << 22
# So many requests are taken before the worker's answers have their turn.
BATCH = 16


class Relay:
    """Requests one way, answers the other. ``control``: a descriptor that ends :meth:`forward` when it is readable."""

    def __init__(self, fuse: int, init_request: bytes, control: int) -> None:
        self.pending: dict[int, bytes] = {}  # in the order in which the kernel sent them
        self.unsent: deque[bytes] = deque()  # taken, but the worker's socket was full
        self._fuse = fuse
        self._init_request = init_request
        self._control = control
        self._worker: socket.socket | None = None
        self._offered: tuple[socket.socket, socket.socket] | None = None
        self._buffer = memoryview(bytearray(ROOM))
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        os.set_blocking(fuse, False)

    # ---------------------------------------------------------------- workers

    def offer(self) -> int:
        """A new pair. Returns the end for a worker that is about to be started; the present one goes on."""
        for end in self._offered or ():
            end.close()
        self._offered = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in self._offered:
            _enlarge(end)
        return self._offered[1].fileno()

    def switch(self) -> None:
        """The worker with the offered end takes over, with everything that is not answered."""
        if self._offered is None:
            return
        self._lose()
        self._worker, theirs = self._offered
        self._offered = None
        theirs.close()
        self._poll.register(self._worker, select.POLLIN)
        self.unsent.clear()
        self._send(self._init_request)  # its answer has a unique that nobody waits for
        for request in self.pending.values():
            self._send(request)
        self._listen()

    def adopt(self, worker: int, pending: Iterable[bytes], unsent: Iterable[bytes]) -> None:
        """Go on where another supervisor has stopped: ``worker`` is its end of the pair, -1 for none."""
        self.pending = {OPCODE_AND_UNIQUE.unpack_from(request)[1]: request for request in pending}
        self.unsent.extend(unsent)
        if worker >= 0:
            self._worker = socket.socket(fileno=worker)
            self._poll.register(self._worker, select.POLLIN)
            self._listen()

    @property
    def worker(self) -> int:
        """The descriptor of our end of the pair with the present worker; -1 without one."""
        return self._worker.fileno() if self._worker is not None else -1

    def close(self) -> None:
        """Leave the worker."""
        self._lose()
        for end in self._offered or ():
            end.close()
        self._offered = None

    # ------------------------------------------------------------- forwarding

    def forward(self, seconds: float) -> None:
        """Pass on what comes, until the control descriptor is readable or the time is over."""
        end = time.monotonic() + seconds
        called = False
        while not called and (left := end - time.monotonic()) > 0:
            for ready, _ in self._poll.poll(left * 1000):
                if ready == self._control:
                    called = True
                elif ready == self._fuse:
                    self._take()
                elif self._worker is not None and ready == self._worker.fileno():
                    self._hand_back()
                    self._flush()

    def _take(self) -> None:
        """Requests from the kernel to the worker."""
        for _ in range(BATCH):
            if self._worker is None or self.unsent:
                return
            try:
                size = os.readv(self._fuse, [self._buffer])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):  # its reader took it back
                    continue
                size = 0  # ENODEV: the mount is gone, as our caller will find
            if not size:
                self._poll.unregister(self._fuse)
                return
            request = bytes(self._buffer[:size])
            opcode, unique = OPCODE_AND_UNIQUE.unpack_from(request)
            if opcode not in WITHOUT_ANSWER:
                self.pending[unique] = request
            self._send(request)

    def _hand_back(self) -> None:
        """Answers from the worker to the kernel."""
        for _ in range(BATCH):
            if self._worker is None:
                return
            try:
                size = self._worker.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                size = 0
            if size < UNIQUE.size:
                self._lose()
                return
            self._answer(self._buffer[:size])

    def _answer(self, answer: memoryview) -> None:
        """One answer or notification to the kernel; not one that a former worker has given before."""
        unique: int = UNIQUE.unpack_from(answer)[0]
        about_interrupt = unique & INTERRUPT_BIT
        if about_interrupt and unique & ~INTERRUPT_BIT not in self.pending:
            return
        if unique and not about_interrupt and self.pending.pop(unique, None) is None:
            return
        # ENOENT: the reader was interrupted. ENODEV, EPERM: the mount is gone. EINVAL: the kernel refuses the form,
        # as it would have from the worker. Nothing of it can be mended here.
        with contextlib.suppress(OSError):
            os.write(self._fuse, answer)

    def _send(self, request: bytes) -> None:
        """Give it to the worker; keep it, and take no more from the kernel, while the worker has no room."""
        if self.unsent or not self._sent(request):
            self.unsent.append(request)
            self._listen()

    def _flush(self) -> None:
        """Room again: what was kept first."""
        if not self.unsent:
            return
        while self.unsent and self._sent(self.unsent[0]):
            self.unsent.popleft()
        self._listen()

    def _sent(self, request: bytes) -> bool:
        """Whether the worker's socket took it. A dead worker takes everything: it is pending anyhow."""
        if self._worker is not None:
            try:
                self._worker.send(request, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:  # EPIPE, ECONNRESET
                self._lose()
        return True

    def _listen(self) -> None:
        """Wait for what can go on: requests while they can be passed on, room while they cannot."""
        if self._worker is None:
            return
        if self.unsent:
            self._poll.modify(self._worker, select.POLLIN | select.POLLOUT)
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._fuse)
        else:
            self._poll.modify(self._worker, select.POLLIN)
            self._poll.register(self._fuse, select.POLLIN)

    def _lose(self) -> None:
        """Without a worker the kernel keeps new requests, and we those that it had."""
        if self._worker is None:
            return
        self._poll.unregister(self._worker)
        with contextlib.suppress(KeyError):
            self._poll.unregister(self._fuse)
        self._worker.close()
        self._worker = None


def _enlarge(end: socket.socket) -> None:
    """Room for several messages, past the system's limit where we may (CAP_NET_ADMIN)."""
    try:
        end.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), SOCKET_BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
