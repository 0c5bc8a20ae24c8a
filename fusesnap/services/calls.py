"""Carries calls from grpcio's threads into trio, and the client's cancellation and deadline with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import NoReturn, Protocol, TypeVar

import grpc
import trio

from fusesnap.errors import DeadlineExceeded, Unavailable
from fusesnap.services.status import status_of

T = TypeVar("T")


class CallContext(Protocol):
    """The part of :class:`grpc.ServicerContext` that a call needs."""

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; ``None`` without one."""
        ...

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have ``callback`` called when the call ends in any way; false if it has ended."""
        ...

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status. Raises."""
        ...


class Calls:
    """Runs calls as tasks of ``nursery``. To be made in trio; :meth:`run` is for other threads."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()

    def run(self, function: Callable[[], Awaitable[T]], context: CallContext) -> T:
        """Run ``function`` in trio and wait; an error of it ends the call with its status.

        It is cancelled when the client goes away or its deadline passes.
        """
        answer: Future[T] = Future()
        scope = trio.CancelScope()
        try:
            self._token.run_sync_soon(self._start, function, context, scope, answer)
            if not context.add_callback(lambda: self._cancel(scope)):
                self._cancel(scope)
            return answer.result()
        except trio.RunFinishedError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon has ended")
        except Exception as error:  # noqa: BLE001  # every error becomes a status, in one place
            context.abort(*status_of(error))

    def _start(
        self,
        function: Callable[[], Awaitable[T]],
        context: CallContext,
        scope: trio.CancelScope,
        answer: Future[T],
    ) -> None:
        try:
            self._nursery.start_soon(self._perform, function, context, scope, answer)
        except RuntimeError:  # the nursery is closed: trio is about to end
            answer.set_exception(Unavailable("the daemon is stopping"))

    async def _perform(
        self,
        function: Callable[[], Awaitable[T]],
        context: CallContext,
        scope: trio.CancelScope,
        answer: Future[T],
    ) -> None:
        remaining = context.time_remaining()
        if remaining is not None:
            scope.deadline = min(scope.deadline, trio.current_time() + remaining)
        try:
            with scope:
                answer.set_result(await function())
            if not answer.done():
                answer.set_exception(
                    DeadlineExceeded("the client has gone away, or its deadline has passed")
                )
        except Exception as error:  # noqa: BLE001  # told to the client by run()
            answer.set_exception(error)
        finally:
            if not answer.done():  # cancelled from outside of the scope
                answer.set_exception(Unavailable("the daemon is stopping"))

    def _cancel(self, scope: trio.CancelScope) -> None:
        try:
            self._token.run_sync_soon(scope.cancel)
        except trio.RunFinishedError:
            return  # so has everything in it
