"""Our own service beside containerd's, on the same socket: what the daemon does now.

One method, ``fusesnap.v1.Daemon/Status``. Question and answer are JSON objects: their fields grow from release to
release, and whoever reads them is a script or a person.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from fusesnap.errors import InvalidData, Unavailable
from fusesnap.services.calls import Calls

SERVICE = "fusesnap.v1.Daemon"
METHOD = "Status"
ANSWER_WITHIN = 10.0  # seconds; it only looks into memory

Status = Callable[[], Awaitable[dict[str, Any]]]


def status_service(status: Status) -> Callable[[grpc.Server, Calls], None]:
    """The service that answers with what ``status`` gives."""

    def register(server: grpc.Server, calls: Calls) -> None:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            del request  # it has no arguments yet
            return json.dumps(calls.run(status, context)).encode()

        method = grpc.unary_unary_rpc_method_handler(answer)
        handlers = grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})
        server.add_generic_rpc_handlers((handlers,))

    return register


def ask_status(address: Path) -> dict[str, Any]:
    """What the daemon that serves ``address`` says of itself. Raises ``Unavailable``, ``InvalidData``."""
    with grpc.insecure_channel(f"unix:{address.absolute()}") as channel:
        ask = channel.unary_unary(f"/{SERVICE}/{METHOD}", bytes, bytes)
        try:
            answer = json.loads(ask(b"{}", timeout=ANSWER_WITHIN))
        except grpc.RpcError as error:
            raise Unavailable(
                f"{address}: {error.details()}: is the daemon running, and this its --address?"
            ) from error
        except ValueError as error:
            raise InvalidData(f"{address}: its answer is not JSON: {error}") from error
    if not isinstance(answer, dict):
        raise InvalidData(f"{address}: a JSON object was expected")
    return answer
