"""The relay between kernel and worker; the kernel is a socket here, which reads and writes in whole messages too."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from fusesnap.fuse_mount import MAX_TRANSFER
from fusesnap.relay import BATCH, BATCH_FORGET, FORGET, INTERRUPT, ROOM, Relay

READ = 15
INIT = struct.pack("<IIQ24x", 40, 26, 2)
TURN = 0.01  # seconds that the relay is given at once; it ends sooner only when it is called


def request(unique: int, opcode: int = READ, body: bytes = b"") -> bytes:
    return struct.pack("<IIQ24x", 40 + len(body), opcode, unique) + body


def answer(unique: int, body: bytes = b"", error: int = 0) -> bytes:
    return struct.pack("<IiQ", 16 + len(body), error, unique) + body


class Kernel:
    """The other side of the descriptor that the relay takes for /dev/fuse."""

    def __init__(self) -> None:
        self.ours, self.fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.ours, self.fuse):
            end.setsockopt(socket.SOL_SOCKET, 32, 1 << 22)  # SO_SNDBUFFORCE
            end.setblocking(False)
        self.control, self.call = os.pipe()
        self.relay = Relay(self.fuse.fileno(), INIT, self.control)

    def turn(self) -> None:
        """Let the relay work until there is nothing that it could do."""
        busy = True
        while busy:
            self.relay.forward(TURN)
            worker = [self.relay.worker] if self.relay.worker >= 0 else []
            full = bool(self.relay.unsent)
            sources = [*worker, *([] if full or not worker else [self.fuse.fileno()])]
            readable, writable, _ = select.select(sources, worker if full else [], [], 0)
            busy = bool(readable or writable)

    def close(self) -> None:
        self.relay.close()
        self.ours.close()
        self.fuse.close()
        os.close(self.control)
        os.close(self.call)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


def join(kernel: Kernel) -> socket.socket:
    """A worker takes over, and has had its FUSE_INIT."""
    worker = socket.socket(fileno=os.dup(kernel.relay.offer()))
    worker.setblocking(False)
    kernel.relay.switch()
    assert worker.recv(ROOM) == INIT
    worker.send(answer(2, b"init"))
    return worker


def received(end: socket.socket) -> list[bytes]:
    messages = []
    while select.select([end], [], [], 0)[0]:
        message = end.recv(ROOM)
        if not message:
            break
        messages.append(message)
    return messages


def test_requests_one_way_answers_the_other(kernel: Kernel) -> None:
    with join(kernel) as worker:
        kernel.ours.send(request(4))
        kernel.turn()
        assert received(worker) == [request(4)]
        worker.send(answer(4, b"x" * MAX_TRANSFER))
        kernel.turn()
        # The answer to the FUSE_INIT that the relay has made is nobody's.
        assert received(kernel.ours) == [answer(4, b"x" * MAX_TRANSFER)]
        assert not kernel.relay.pending


def test_what_a_dead_worker_left_goes_to_the_next_in_order(kernel: Kernel) -> None:
    asked = [request(unique) for unique in (4, 6, 8)]
    with join(kernel) as first:
        for each in asked:
            kernel.ours.send(each)
        kernel.turn()
        assert received(first) == asked
        first.send(answer(6))
        kernel.turn()
    kernel.ours.send(request(10))
    kernel.turn()  # nobody is there: the kernel keeps it
    with join(kernel) as second:
        kernel.turn()
        assert received(second) == [request(4), request(8), request(10)]
        assert received(kernel.ours) == [answer(6)]


def test_what_has_no_answer_is_not_kept(kernel: Kernel) -> None:
    with join(kernel) as first:
        kernel.ours.send(request(4))
        for opcode, unique in ((FORGET, 6), (BATCH_FORGET, 8), (INTERRUPT, 5)):
            kernel.ours.send(request(unique, opcode))
        kernel.turn()
        assert len(received(first)) == 4
    kernel.turn()
    with join(kernel) as second:
        kernel.turn()
        assert received(second) == [request(4)]


def test_a_late_answer_is_dropped_and_a_notification_passes(kernel: Kernel) -> None:
    with join(kernel) as worker:
        kernel.ours.send(request(4))
        kernel.turn()
        for said in (answer(4), answer(4), answer(99), answer(0, b"notice", 3)):
            worker.send(said)
        kernel.turn()
        assert received(kernel.ours) == [answer(4), answer(0, b"notice", 3)]


def test_an_answer_to_an_interrupt_does_not_settle_the_request(kernel: Kernel) -> None:
    with join(kernel) as worker:
        kernel.ours.send(request(4))
        kernel.turn()
        worker.send(answer(5, error=-11))
        kernel.turn()
        assert received(kernel.ours) == [answer(5, error=-11)]
        assert list(kernel.relay.pending) == [4]
        worker.send(answer(4))
        kernel.turn()
        worker.send(answer(5, error=-11))
        kernel.turn()
        assert received(kernel.ours) == [answer(4)]


def test_a_worker_that_reads_nothing_does_not_block_and_loses_nothing(kernel: Kernel) -> None:
    body = b"x" * MAX_TRANSFER
    sent = 0
    with join(kernel) as worker:
        while not kernel.relay.unsent:
            kernel.ours.send(request(4 + 2 * sent, body=body))
            sent += 1
            kernel.turn()
        waiting = request(4 + 2 * sent)
        kernel.ours.send(waiting)
        kernel.turn()
        assert len(kernel.relay.unsent) == 1  # the kernel keeps what follows
        seen: list[bytes] = []
        while len(seen) <= sent:
            seen += received(worker)
            kernel.turn()
        assert [struct.unpack_from("<8xQ", each)[0] for each in seen] == [
            4 + 2 * number for number in range(sent + 1)
        ]
        assert seen[-1] == waiting


def test_a_worker_that_dies_while_its_socket_is_full_loses_nothing(kernel: Kernel) -> None:
    sent = 0
    with join(kernel):
        while not kernel.relay.unsent:
            kernel.ours.send(request(4 + 2 * sent, body=b"x" * MAX_TRANSFER))
            sent += 1
            kernel.turn()
    kernel.turn()
    assert kernel.relay.worker == -1
    with join(kernel) as second:
        seen: list[bytes] = []
        while len(seen) < sent:
            seen += received(second)
            kernel.turn()
        assert len(seen) == sent


def test_more_than_a_batch_comes_through(kernel: Kernel) -> None:
    asked = [request(4 + 2 * number) for number in range(3 * BATCH)]
    with join(kernel) as worker:
        for each in asked:
            kernel.ours.send(each)
        kernel.turn()
        assert received(worker) == asked


def test_a_successor_that_was_offered_an_end_does_not_disturb_the_present_worker(
    kernel: Kernel,
) -> None:
    with join(kernel) as first:
        kernel.relay.offer()  # of one that dies before its turn
        successor = socket.socket(fileno=os.dup(kernel.relay.offer()))
        kernel.ours.send(request(4))
        kernel.turn()
        assert received(first) == [request(4)]
        kernel.relay.switch()
        assert received(successor) == [INIT, request(4)]
        successor.close()


def test_another_supervisor_goes_on_where_one_stopped(kernel: Kernel) -> None:
    with join(kernel) as worker:
        kernel.ours.send(request(4))
        kernel.turn()
        next_one = Relay(kernel.fuse.fileno(), INIT, kernel.control)
        next_one.adopt(os.dup(kernel.relay.worker), [request(4)], [request(6)])
        kernel.relay.close()
        kernel.relay = next_one
        worker.send(answer(4))
        kernel.turn()
        assert received(kernel.ours) == [answer(4)]


def test_being_called_ends_it_at_once(kernel: Kernel) -> None:
    os.write(kernel.call, b"x")
    kernel.relay.forward(3600)


def test_a_mount_that_is_gone_is_not_an_error(kernel: Kernel) -> None:
    with join(kernel) as worker:
        kernel.ours.send(request(4))
        kernel.turn()
        kernel.ours.close()
        worker.send(answer(4))
        for _ in range(3):
            kernel.relay.forward(TURN)
