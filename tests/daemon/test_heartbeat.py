"""The worker's signs of life."""

from __future__ import annotations

import os
import socket

import trio
from trio.testing import MockClock

from fusesnap.daemon.worker import say_alive


async def test_ready_once_and_then_a_dot_every_second(autojump_clock: MockClock) -> None:
    ours, supervisors = socket.socketpair()
    with ours, supervisors:
        with trio.move_on_after(3.5):
            await say_alive(ours.fileno())
        assert supervisors.recv(64) == b"ready\n..."


async def test_a_supervisor_that_does_not_listen_holds_nothing_up(
    autojump_clock: MockClock,
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filled = os.write(writing, bytes(1 << 20))
    with trio.move_on_after(10) as scope:
        await say_alive(writing)
    assert scope.cancelled_caught
    assert len(os.read(reading, 1 << 20)) == filled
    os.close(reading)
    with trio.move_on_after(10) as scope:
        await say_alive(writing)
    assert scope.cancelled_caught
    os.close(writing)
