"""Requests that the kernel has handed to us and that wait for a store path.

Not even SIGKILL frees a reader from a request that we have taken (fs/fuse/dev.c, request_wait_answer): only an answer
does. So every request that waits is in a table, to be seen, and to be ended from outside. One that need not wait never
gets here, and costs nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final, TypeVar

import trio

from fusesnap.errors import FusesnapError, ReaderReleased
from fusesnap.fetch.flight import Flight, FlightState, Reader
from fusesnap.filesystem.error_counts import ErrorCounts
from fusesnap.filesystem.wait_events import Answered, Blocked, ObserveWait, Question, unobserved
from fusesnap.nix.store_path import StorePath

__all__ = ["Openers", "Question", "Request", "WaitingRequests", "WaitingState"]

T = TypeVar("T")

LOOK_EVERY: Final = 0.5  # seconds between two looks for readers that are being killed
# Seconds: /proc is read for no request that is answered sooner.
PATIENCE: Final = 1.0


@dataclass(slots=True, eq=False)
class Request:
    """One request that waits. ``readers``: who asks, or else who last opened the file."""

    question: Question
    readers: tuple[Reader, ...]
    began: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    flight: Flight | None = None
    released: ReaderReleased | None = None

    @property
    def cache(self) -> str | None:
        """The cache that is read for it."""
        return self.flight.cache if self.flight is not None else None

    def wait_for(self, flight: Flight) -> None:
        """This is what it waits for."""
        self.flight = flight


@dataclass(frozen=True, slots=True)
class WaitingState:
    """What a person sees of a request that waits; ``seconds`` since it began.

    ``asked``: the readers are who asks, not only who may. ``flight`` is the transfer; without one it is the local disk
    that is waited for.
    """

    question: Question
    readers: tuple[Reader, ...]
    asked: bool
    seconds: float
    flight: FlightState | None


class Openers:
    """Who opened what last: pyfuse3 does not say who reads. Bounded, and by thread, so only probable."""

    INODES = 4096
    EACH = 4

    def __init__(self) -> None:
        self._by_inode: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def remember(self, inode: int, pid: int) -> None:
        """``pid`` opens ``inode``."""
        before = self._by_inode.pop(inode, ())
        others = tuple(each for each in before if each != pid)
        self._by_inode[inode] = (*others, pid)[-self.EACH :]
        if len(self._by_inode) > self.INODES:
            self._by_inode.popitem(last=False)

    def of(self, inode: int) -> tuple[int, ...]:
        """The last openers, the newest last."""
        return self._by_inode.get(inode, ())


class WaitingRequests:
    """The table. ``identify`` names a thread for people; ``errors`` counts what readers get; ``observe`` hears of
    each wait.
    """

    def __init__(
        self,
        identify: Callable[[int], Reader],
        errors: ErrorCounts,
        observe: ObserveWait = unobserved,
    ) -> None:
        self._identify = identify
        self._observe = observe
        self._numbers = count(1)
        self.waited: Counter[str] = Counter()  # requests that ever waited, by their operation
        self.errors = errors
        self._requests: dict[Request, None] = {}  # in the order of their beginning
        self._openers = Openers()

    def __len__(self) -> int:
        return len(self._requests)

    def paths(self) -> set[StorePath]:
        """The paths that somebody waits for."""
        return {request.question.path for request in self._requests}

    def opened(self, inode: int, pid: int | None) -> None:
        """``pid`` opens ``inode``, and will probably read it."""
        if pid:
            self._openers.remember(inode, pid)

    async def wait(
        self, question: Question, fetch: Callable[[Callable[[Flight], None]], Awaitable[T]]
    ) -> T:
        """What ``fetch`` returns; it is given a function to say which transfer it waits for.

        Raises what it raises, or ``ReaderReleased`` when :meth:`release` ends the wait.
        """
        request = Request(question, self._readers(question), trio.current_time())
        self._requests[request] = None
        number = next(self._numbers)
        self.waited[question.operation] += 1
        ended = Answered(number, cancelled=True)
        self._observe(Blocked(number, question, request.readers))
        try:
            with request.scope:
                found = await fetch(request.wait_for)
                ended = Answered(number)
                return found
            assert request.released is not None  # noqa: S101 - nobody else cancels the scope
            raise request.released
        except FusesnapError as error:
            self.errors.count(error, request.cache)
            ended = Answered(number, error)
            raise
        finally:
            del self._requests[request]
            self._observe(ended)

    def release(self, matches: Callable[[Request], bool], why: str, *, killed: bool = False) -> int:
        """End every wait that ``matches``; says how many. ``why`` is what the log says."""
        released = 0
        for request in self._requests:
            if request.released is None and matches(request):
                question = request.question
                request.released = ReaderReleased(
                    f"{question.path}: waited {trio.current_time() - request.began:.1f} s for "
                    f"{request.cache or 'an answer'} when {why}",
                    killed=killed,
                )
                request.scope.cancel()
                released += 1
        return released

    async def release_killed(self, is_dying: Callable[[int], bool]) -> None:
        """Answer requests whose threads are being killed, until cancelled.

        pyfuse3 keeps FUSE_INTERRUPT to itself, so we look whether SIGKILL is pending.
        """
        while True:
            await trio.sleep(LOOK_EVERY)
            long_ago = trio.current_time() - PATIENCE

            def gone(request: Request, long_ago: float = long_ago) -> bool:
                waited = request.began <= long_ago and request.readers
                return bool(waited) and all(is_dying(reader.pid) for reader in request.readers)

            self.release(gone, "its reader was killed", killed=True)

    def states(self) -> list[WaitingState]:
        """Every request that waits now, the longest wait first."""
        now = trio.current_time()
        return [
            WaitingState(
                question=request.question,
                readers=request.readers,
                asked=bool(request.question.pid),
                seconds=now - request.began,
                flight=request.flight.state() if request.flight is not None else None,
            )
            for request in self._requests
        ]

    def _readers(self, question: Question) -> tuple[Reader, ...]:
        pids = (question.pid,) if question.pid else self._openers.of(question.inode)
        return tuple(self._identify(pid) for pid in pids)
