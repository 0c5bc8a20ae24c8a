"""Our own service beside containerd's, on the same socket: what the daemon does now, and what of it is to end.

Methods of ``fusesnap.v1.Daemon``. Questions and answers are JSON objects: their fields grow from release to release,
and whoever reads them is a script or a person.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from fusesnap.errors import InvalidArgument, InvalidData, NotFound, Unavailable

if TYPE_CHECKING:  # commands that only ask need no trio, for which they would wait
    from fusesnap.services.calls import Calls

SERVICE = "fusesnap.v1.Daemon"
ANSWER_WITHIN = 15.0  # seconds; it looks into memory, and asks the worker, which has less time
MAX_ANSWER = (
    16 << 20
)  # bytes; the report of a start has some 300 for each path and wait, of which there are limits
HINT = "is the daemon running"

Call = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


def daemon_service(answers: Mapping[str, Call]) -> Callable[[grpc.Server, Calls], None]:
    """The service that answers each method by its name."""

    def register(server: grpc.Server, calls: Calls) -> None:
        def method(call: Call) -> grpc.RpcMethodHandler[bytes, bytes]:
            def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
                return json.dumps(calls.run(lambda: call(_object(request)), context)).encode()

            return grpc.unary_unary_rpc_method_handler(answer)

        methods = {name: method(call) for name, call in answers.items()}
        handlers = grpc.method_handlers_generic_handler(SERVICE, methods)
        server.add_generic_rpc_handlers((handlers,))

    return register


def ask_status(address: Path) -> dict[str, Any]:
    """What the daemon that serves ``address`` says of itself. Raises ``Unavailable``, ``InvalidData``."""
    return _ask(address, "Status", {})


def ask_starts(address: Path) -> list[dict[str, Any]]:
    """The starts of containers that are known, the newest first. Raises ``Unavailable``, ``InvalidData``."""
    return list(_ask(address, "Starts", {})["starts"])


def ask_start_report(address: Path, target: str, number: int) -> dict[str, Any]:
    """How the ``number``-th start of what ``target`` names went.

    Raises ``NotFound`` and ``InvalidArgument`` for the target, ``Unavailable``, ``InvalidData``.
    """
    return _ask(address, "StartReport", {"target": target, "number": number})


def ask_cancel(address: Path, target: str) -> int:
    """End the waits that ``target`` names; says how many.

    Raises ``NotFound`` and ``InvalidArgument`` for the target, ``Unavailable``, ``InvalidData``.
    """
    return int(_ask(address, "Cancel", {"target": target})["released"])


def _ask(address: Path, method: str, question: Mapping[str, Any]) -> dict[str, Any]:
    options = [("grpc.max_receive_message_length", MAX_ANSWER)]
    with grpc.insecure_channel(f"unix:{address.absolute()}", options=options) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/{method}", bytes, bytes)
        try:
            return _object(ask(json.dumps(question).encode(), timeout=ANSWER_WITHIN))
        except grpc.RpcError as error:
            kind = _KINDS.get(error.code())
            if kind is not None:
                raise kind(error.details()) from error
            said = f"{address}: {error.details()}"
            hint = "" if HINT in said else f": {HINT}, and this its --address?"
            raise Unavailable(said + hint) from error


# Only what a question of ours can be answered with; the rest means that there is no answer.
_KINDS: Final = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
}


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidData(f"{SERVICE}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidData(f"{SERVICE}: a JSON object was expected")
    return value
