"""A gate before a gRPC server on a unix socket: every call passes through as it is, but for those that a test stops."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc

from testbed.between import Between, placed

PATIENCE = 60.0  # seconds that a call is held, should nobody let it go


class Hold:
    """A call that is held: ``reached`` is set when it has come, and it goes on when ``released`` is set."""

    def __init__(self, method: str, *, after: bool) -> None:
        self.method = method
        self.after = after
        self.reached = threading.Event()
        self.released = threading.Event()

    def wait(self) -> None:
        """Say that the call has come, and wait until it may go on."""
        self.reached.set()
        self.released.wait(PATIENCE)


class Gate(Between):
    """Passes calls on to ``channel``. Methods are named as ``Leases/Create``, without their package."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(channel)
        self._holds: list[Hold] = []
        self._refused: list[str] = []

    @contextlib.contextmanager
    def holding(self, method: str, *, after: bool = False) -> Iterator[Hold]:
        """Hold calls of ``method`` for the time of the context; ``after``: only their answers, of what is done then."""
        hold = Hold(method, after=after)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            hold.released.set()

    @contextlib.contextmanager
    def refusing(self, method: str) -> Iterator[None]:
        """Refuse calls of ``method`` for the time of the context."""
        self._refused.append(method)
        try:
            yield
        finally:
            self._refused.remove(method)

    def called(self, method: str, context: grpc.ServicerContext) -> None:
        """See Between."""
        short = _short(method)
        if short in self._refused:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"{short} is refused")
        self._wait(short, after=False)

    def answered(self, method: str, request: bytes, response: bytes) -> None:
        """See Between."""
        self._wait(_short(method), after=True)

    def _wait(self, method: str, *, after: bool) -> None:
        for hold in list(self._holds):
            if (hold.method, hold.after) == (method, after):
                hold.wait()


def gate(address: Path, target: Path) -> contextlib.AbstractContextManager[Gate]:
    """Pass the calls that come to the socket ``address`` on to ``target`` for the time of the context."""
    return placed(Gate, address, target)


def _short(method: str) -> str:
    package, _, name = method.rpartition("/")
    return f"{package.rpartition('.')[2]}/{name}"
