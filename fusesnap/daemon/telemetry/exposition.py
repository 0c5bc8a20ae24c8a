"""Answers Prometheus over HTTP, on a unix socket or on an address."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

import h11
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from fusesnap.config import MetricsAddress
from fusesnap.daemon.control import listen
from fusesnap.errors import FusesnapError, InvalidConfiguration

log = logging.getLogger(__name__)

PATH: Final = "/metrics"
# Seconds for a scrape from its first byte to the last; Prometheus itself gives up after ten.
WITHIN: Final = 10.0
# Scrapes that are answered at a time. Each asks the worker.
AT_ONCE: Final = 4
RECEIVE: Final = 65536
RETRY_EVERY: Final = 10.0

Gather = Callable[[], Awaitable[CollectorRegistry]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: HTTPStatus
    kind: str
    body: bytes


async def serve_metrics(address: MetricsAddress, gather: Gather) -> None:
    """Answer scrapes until cancelled.

    An address that cannot be had now, because somebody else has it, is tried again: containers need us, metrics or not.
    """
    told = False
    while True:
        try:
            await serve(address, gather)
        except InvalidConfiguration as error:
            if not told:
                log.error("%s; trying again every %g s", error, RETRY_EVERY)  # noqa: TRY400 - for people
            told = True
        await trio.sleep(RETRY_EVERY)


async def serve(
    address: MetricsAddress,
    gather: Gather,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer scrapes on ``address`` until cancelled. Raises ``InvalidConfiguration`` where it cannot be had."""
    listeners = await _listeners(address)
    turns = trio.CapacityLimiter(AT_ONCE)
    await trio.serve_listeners(partial(_handle, gather, turns), listeners, task_status=task_status)


async def _listeners(address: MetricsAddress) -> list[trio.SocketListener]:
    try:
        if address.path is not None:
            return [trio.SocketListener(listen(Path(address.path)))]
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        reason = "somebody else listens there" if error.errno == errno.EADDRINUSE else error
        raise InvalidConfiguration(f"metrics = {str(address)!r}: {reason}") from error


async def _handle(gather: Gather, turns: trio.CapacityLimiter, stream: trio.SocketStream) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        with trio.move_on_after(WITHIN):
            async with turns:
                await _converse(connection, gather, stream)
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        log.debug("metrics: %r", error)
    finally:
        await trio.aclose_forcefully(stream)


async def _converse(connection: h11.Connection, gather: Gather, stream: trio.SocketStream) -> None:
    """One request, and its answer."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.receive_some(RECEIVE))
    if not isinstance(event, h11.Request):
        return
    answer = await _answer(event, gather)
    headers = [
        ("Content-Type", answer.kind),
        ("Content-Length", str(len(answer.body))),
        ("Connection", "close"),
    ]
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    body = b"" if event.method == b"HEAD" else answer.body
    for part in (
        h11.Response(status_code=answer.status, headers=headers, reason=answer.status.phrase),
        h11.Data(data=body),
        h11.EndOfMessage(),
    ):
        await stream.send_all(connection.send(part) or b"")


async def _answer(request: h11.Request, gather: Gather) -> Answer:
    target = request.target.decode("ascii").partition("?")[0]
    if request.method not in (b"GET", b"HEAD"):
        return _said(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")
    if target == "/":
        return _said(HTTPStatus.OK, f"fusesnap: metrics are at {PATH}")
    if target != PATH:
        return _said(HTTPStatus.NOT_FOUND, f"metrics are at {PATH}")
    try:
        metrics = await gather()
    except FusesnapError as error:
        log.warning("metrics: %s", error)
        return _said(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
    except Exception as error:  # a scrape must not end the process that serves containerd
        log.exception("metrics: a scrape failed in a way that it should not")
        return _said(HTTPStatus.INTERNAL_SERVER_ERROR, f"unexpected {type(error).__name__}")
    accepted = dict(request.headers).get(b"accept", b"").decode("ascii", "replace")
    encode, kind = choose_encoder(accepted)
    return Answer(HTTPStatus.OK, kind, encode(metrics))


def _said(status: HTTPStatus, words: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", f"{words}\n".encode())
