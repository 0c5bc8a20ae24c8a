"""The bytes that a push parser was fed and has not consumed yet."""

from __future__ import annotations

from collections import deque
from typing import Final


class ReceiveBuffer:
    """Pieces of a stream, looked at through one window.

    ``data`` is the window and ``position`` where in it the unconsumed bytes begin; the reader
    advances ``position``. A piece becomes the window as it is, without a copy. Only where something
    small lies across two pieces is the end of the one joined with the beginning of the next, so the
    work is linear however the stream was cut.
    """

    # More than any one thing that a reader wants whole (the target of a link, 4 KiB), so that one
    # join is enough; small, so that the bulk of a piece is not copied.
    JOINED: Final = 8192

    __slots__ = ("_base", "_pending", "_pending_start", "data", "position")

    def __init__(self) -> None:
        self.data = b""
        self.position = 0
        self._base = 0  # of the window's first byte, in the stream
        self._pending: deque[bytes] = deque()
        self._pending_start = 0  # what of the first pending piece has been joined to the window

    @property
    def offset(self) -> int:
        """Where in the stream the unconsumed bytes begin."""
        return self._base + self.position

    @property
    def end(self) -> int:
        """How long the part of the stream is that the window has reached."""
        return self._base + len(self.data)

    def append(self, piece: bytes) -> None:
        """Take the next piece of the stream."""
        if piece:
            self._pending.append(piece)

    def refill(self) -> bool:
        """Let the window reach further; false where everything fed is in it already."""
        if not self._pending:
            return False
        start = self._pending_start
        offset = self.offset
        rest = self.data[self.position :]
        if rest:
            end = start + self.JOINED
            piece = self._pending[0]
            self.data, self.position = rest + piece[start:end], 0
            self._consume_pending(end if end < len(piece) else None)
        else:
            self.data, self.position = self._pending[0], start
            self._consume_pending(None)
        self._base = offset - self.position
        return True

    def _consume_pending(self, end: int | None) -> None:
        if end is None:
            self._pending.popleft()
        self._pending_start = end or 0
