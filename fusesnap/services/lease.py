"""Leases of containerd: what is made under one is not collected while it lasts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final

import trio

from fusesnap.errors import AlreadyExists, FusesnapError, NotFound
from fusesnap.services.api import leases_pb2, leases_pb2_grpc
from fusesnap.services.containerd_calls import TIDYING, ContainerdCalls
from fusesnap.services.content import EXPIRE_LABEL

log = logging.getLogger(__name__)

# As those of containerd's own clients. One that kill -9 left ends then, or when its name is wanted again.
LIFETIME: Final = timedelta(hours=24)


@asynccontextmanager
async def leased(
    containerd: ContainerdCalls, name: str, now: float
) -> AsyncIterator[ContainerdCalls]:
    """Calls under a lease that ends with the block; ``now`` is in seconds since the epoch.

    If the block fails, or is cancelled, all that was made under the lease, and that nothing else refers to, is gone
    when this raises. A lease of that name is a leftover, and ended first.
    """
    leases = leases_pb2_grpc.LeasesStub(containerd.channel)
    expiry = datetime.fromtimestamp(int(now), UTC) + LIFETIME
    request = leases_pb2.CreateRequest(id=name, labels={EXPIRE_LABEL: expiry.isoformat()})
    failed = True
    try:
        # A call that is cancelled may be carried out all the same, and after the one that ends the lease.
        with trio.CancelScope(shield=True):
            try:
                await containerd.ask(leases.Create, request)
            except AlreadyExists:
                await _end(containerd, name, sync=True)
                await containerd.ask(leases.Create, request)
        yield containerd.under(name)
        failed = False
    finally:
        with trio.move_on_after(TIDYING, shield=True) as scope:
            try:
                await _end(containerd, name, sync=failed)
            except FusesnapError as error:  # what ended the block is told, not this
                log.warning("lease %s is left until it expires: %s", name, error)
        if scope.cancelled_caught:
            log.warning("lease %s is left until it expires: containerd does not answer", name)


async def _end(containerd: ContainerdCalls, name: str, *, sync: bool) -> None:
    leases = leases_pb2_grpc.LeasesStub(containerd.channel)
    with suppress(NotFound):
        await containerd.ask(leases.Delete, leases_pb2.DeleteRequest(id=name, sync=sync))
