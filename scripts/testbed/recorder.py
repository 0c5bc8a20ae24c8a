"""What a snapshotter answers to containerd, noted down in between; every call passes through as it is."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from testbed.between import Between, placed

SERVICE = "containerd.services.snapshots.v1.Snapshots"


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of an answer: the method, and the serialised request and response."""

    method: str
    request: bytes
    response: bytes


class Recorder(Between):
    """Notes what the Snapshots service behind ``channel`` answers."""

    def __init__(self, address: Path, channel: grpc.Channel) -> None:
        super().__init__(channel)
        self._answers: list[Answer] = []
        self._lock = threading.Lock()
        self.address = address

    def answers(self) -> list[Answer]:
        """All answers so far, in order."""
        with self._lock:
            return list(self._answers)

    def answered(self, method: str, request: bytes, response: bytes) -> None:
        """See Between."""
        service, _, name = method.lstrip("/").rpartition("/")
        if service == SERVICE:
            with self._lock:
                self._answers.append(Answer(name, request, response))


def recorder(address: Path, target: Path) -> contextlib.AbstractContextManager[Recorder]:
    """Pass the calls that come to the socket ``address`` on to ``target`` for the time of the context."""
    return placed(lambda channel: Recorder(address, channel), address, target)
