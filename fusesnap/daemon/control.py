"""The control socket: hints to the worker and questions about it, one JSON line each way a connection.

It carries nothing that correctness rests on: the processes share their state through the database and the store.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from fusesnap.errors import (
    DeadlineExceeded,
    FusesnapError,
    InvalidConfiguration,
    InvalidData,
    Unavailable,
)

log = logging.getLogger(__name__)

SOCKET_NAME = "control.sock"
# A hint names at most a closure: 10,000 paths of some 100 bytes. More is not ours.
MAX_LINE = 4 * 1024 * 1024
ANSWER_WITHIN = (
    10.0  # seconds; the other side is a process of this machine that only looks into its memory
)

MAX_SOCKET_PATH = 107  # unix(7)

Answer = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


async def serve(
    path: Path,
    calls: Mapping[str, Answer],
    task_status: trio.TaskStatus[None],
    *,
    patient: Mapping[str, Answer] | None = None,
) -> None:
    """Answer ``calls`` by name on the unix socket ``path``, taking over from whoever listened there.

    ``patient`` ones may take their time, and have deadlines of their own.
    """
    listener = listen(path)
    patient = patient or {}
    task_status.started()

    async def handle(stream: trio.SocketStream) -> None:
        try:
            with trio.fail_after(ANSWER_WITHIN) as limit:
                question = await _receive_line(stream)
                if question.get("call") in patient:
                    limit.deadline = math.inf
                answer = await _answer({**calls, **patient}, question)
                limit.deadline = trio.current_time() + ANSWER_WITHIN
                await stream.send_all(answer)
        except (trio.TooSlowError, trio.BrokenResourceError, FusesnapError) as error:
            log.warning("control socket: %r", error)
        except Exception:  # a question must not end the process that serves the mount
            log.exception("control socket: a question failed in a way that it should not")
        finally:
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(handle, [trio.SocketListener(listener)])


async def ask(
    path: Path, call: str, /, *, within: float = ANSWER_WITHIN, **arguments: Any
) -> dict[str, Any]:
    """The answer of whoever serves ``path`` to ``call``, if it comes ``within`` so many seconds.

    Raises ``Unavailable``, ``DeadlineExceeded``.
    """
    try:
        with trio.fail_after(within):
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(json.dumps({"call": call, **arguments}).encode() + b"\n")
                answer = await _receive_line(stream)
    except trio.TooSlowError as error:
        raise DeadlineExceeded(f"{path}: no answer to {call!r} within {within:g} s") from error
    except (OSError, trio.BrokenResourceError) as error:
        raise Unavailable(
            f"{path}: no worker answers there ({error}): is the daemon running?"
        ) from error
    if "error" in answer:
        raise Unavailable(f"{path}: {answer['error']}")
    return answer


async def _answer(calls: Mapping[str, Answer], question: Mapping[str, Any]) -> bytes:
    call = str(question.get("call"))
    if call not in calls:
        answer = {"error": f"unknown call {call!r}; known are {', '.join(sorted(calls))}"}
    else:
        try:
            answer = await calls[call](question)
        except FusesnapError as error:
            answer = {"error": str(error)}
        except Exception as error:
            log.exception("control socket: %r failed in a way that it should not", call)
            answer = {"error": f"unexpected {type(error).__name__}: {error}"}
    return json.dumps(answer).encode() + b"\n"


async def _receive_line(stream: trio.SocketStream) -> dict[str, Any]:
    received = bytearray()
    while not received.endswith(b"\n"):
        piece = await stream.receive_some(65536)
        if not piece or len(received) > MAX_LINE:
            raise InvalidData(
                f"control socket: a JSON line of at most {MAX_LINE} bytes was expected"
            )
        received += piece
    try:
        parsed = json.loads(received)
    except ValueError as error:
        raise InvalidData(f"control socket: not a JSON line: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidData("control socket: a JSON object was expected")
    return parsed


def listen(path: Path) -> trio.socket.SocketType:
    """Listen on the unix socket ``path``, which only our user may use, taking over from whoever listened there.

    Raises ``InvalidConfiguration`` for a path that is too long, ``OSError`` for one that cannot be had.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Bound under another name and renamed over the live one: there is no moment without a listener.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    if len(os.fsencode(fresh)) > MAX_SOCKET_PATH:
        raise InvalidConfiguration(
            f"{path}: a unix socket's path has at most {MAX_SOCKET_PATH} bytes: use a shorter root"
        )
    fresh.unlink(missing_ok=True)
    old_mask = os.umask(0o077)
    try:
        listener.bind(str(fresh))
    finally:
        os.umask(old_mask)
    listener.listen(64)
    fresh.rename(path)
    return trio.socket.from_stdlib_socket(listener)
