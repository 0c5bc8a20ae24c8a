"""What a child of the supervisor says on its line, and what it waits for.

The line is one end of a socket pair. The child writes ``loaded`` when all its code is imported, and waits for one
byte: its turn, which comes when its predecessor, if there is one, is gone. It writes ``ready`` when it serves; the
worker then writes a dot every second.
"""

from __future__ import annotations

import os

LOADED = b"loaded\n"
READY = b"ready\n"
BEAT = b"."


def wait_for_turn(line: int) -> None:
    """Block until it is our turn, before the loop runs; end the process where the supervisor is gone."""
    try:
        os.write(line, LOADED)
        turn = os.read(line, 1)
    except (BrokenPipeError, ConnectionResetError):
        turn = b""
    if not turn:
        raise SystemExit(0)
