"""Calls of ours to containerd, from trio: who is cancelled cancels his call, and every call has a deadline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar, cast

import grpc
import trio

from fusesnap.services.content import LEASE_HEADER, Metadata, translated

NAMESPACE_HEADER: Final = "containerd-namespace"
# Where Kubernetes' images are (``K8sContainerdNamespace`` in containerd's ``internal/cri/constants``).
KUBERNETES: Final = "k8s.io"
# Seconds. containerd looks into its database, for which a client may have to wait that unpacks.
QUICK: Final = 60.0
# Seconds for a layer: to unpack one of many gigabytes on a slow disk takes that long, and nothing tells how far it is.
LONG: Final = 3600.0
# Seconds to tidy up in after something failed or was cancelled.
TIDYING: Final = 30.0

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Call(Protocol[T_co]):
    """A call that is under way; grpc's type knows less of it."""

    def add_done_callback(self, callback: Callable[[object], None]) -> None: ...
    def cancel(self) -> bool: ...
    def result(self) -> T_co: ...


class ContainerdCalls:
    """Calls on one channel, in one of containerd's namespaces, perhaps under a lease."""

    def __init__(self, channel: grpc.Channel, namespace: str, lease: str = "") -> None:
        self.channel = channel
        self._namespace = namespace
        self._lease = lease

    @property
    def metadata(self) -> Metadata:
        """What a call says beside its request."""
        namespace = (NAMESPACE_HEADER, self._namespace)
        return (namespace, (LEASE_HEADER, self._lease)) if self._lease else (namespace,)

    def under(self, lease: str) -> ContainerdCalls:
        """The same, with everything that is made kept as long as the lease."""
        return ContainerdCalls(self.channel, self._namespace, lease)

    async def ask(
        self,
        method: grpc.UnaryUnaryMultiCallable[Any, T],
        request: object,
        *,
        within: float = QUICK,
    ) -> T:
        """Call ``method`` of a stub on this channel. Raises the tree's error for what containerd says."""
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()

        def ended(_: object) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        call = cast("_Call[T]", method.future(request, metadata=self.metadata, timeout=within))
        call.add_done_callback(ended)
        try:
            await done.wait()
        except trio.Cancelled:
            call.cancel()
            raise
        with translated():
            return call.result()

    async def in_thread(self, work: Callable[[], T], cancel: Callable[[], object]) -> T:
        """Run ``work``, which makes calls, in a thread. Cancelled, this calls ``cancel`` and waits for the work to end.

        So what the work reads may be closed afterwards. Raises as :meth:`ask`, and what the work raises.
        """
        results: list[T] = []
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_when_cancelled, cancel)
            try:
                with translated():
                    results.append(await trio.to_thread.run_sync(work))
            except Exception as error:  # noqa: BLE001  # raised outside of the nursery, which would make a group of it
                failures.append(error)
            nursery.cancel_scope.cancel()
        for failure in failures:
            raise failure
        return results[0]


async def _when_cancelled(cancel: Callable[[], object]) -> None:
    try:
        await trio.sleep_forever()
    finally:
        cancel()
