"""One connection that speaks HTTP/1.1 without encryption, one exchange after another.

h11 reads heads, and bodies whose end only it can tell. A body of known length is read from the socket as it is: h11
would copy every byte of it, and look at each piece. Source: RFC 9112.
"""

from __future__ import annotations

from typing import Final

import h11
import httpcore
import httpx
import trio

# Bytes that are read at once, at most: of a head, with what follows it, and of a body.
_READ_HEAD: Final = 64 * 1024
READ: Final = 256 * 1024
# As httpcore: what is longer is no head.
_MAX_HEAD: Final = 100 * 1024
_WITHOUT_BODY: Final = frozenset({"GET", "HEAD"})
_BODILESS: Final = frozenset({204, 304})

Origin = tuple[str, int]


class PlainConnection:
    """To the server at ``origin``, over ``stream``. Raises the errors of httpcore and h11.

    ``is_reusable``: the last exchange is over, and the server takes another. ``idle_since``: when that began.
    """

    def __init__(self, origin: Origin, stream: httpcore.AsyncNetworkStream) -> None:
        self.origin = origin
        self.is_reusable = False
        self.idle_since = 0.0
        self._stream = stream
        self._machine = h11.Connection(h11.CLIENT)
        self._held = b""  # of a body, as far as it came with its head
        self._left: int | None = None  # of a body of known length
        self._ends = False  # the connection, with this exchange

    @property
    def has_ended(self) -> bool:
        """Whether the server has closed an idle connection, or says what nobody asked for."""
        return bool(self._stream.get_extra_info("is_readable"))

    async def ask(
        self, request: httpx.Request, write: float | None, read: float | None
    ) -> h11.Response:
        """Send ``request`` and return the head of the response. Times in seconds."""
        self.is_reusable = False
        machine = self._machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        try:
            await self._send(request, write)
            refused = False
        except httpcore.WriteError:  # a server may refuse, and close, before it has read all
            refused = True
        while not isinstance(event := await self._event(_READ_HEAD, read), h11.Response):
            pass  # 1xx: the response is still to come
        self._left = _length(request, event)
        self._held = b"" if self._left is None else machine.trailing_data[0]
        self._ends = refused or _ends(event)
        return event

    async def _send(self, request: httpx.Request, write: float | None) -> None:
        """In one piece, but for a body."""
        machine = self._machine
        head = h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        )
        unsent = machine.send(head) or b""
        body = request.stream
        if request.method not in _WITHOUT_BODY and isinstance(body, httpx.AsyncByteStream):
            async for piece in body:
                await self._stream.write(unsent + (machine.send(h11.Data(piece)) or b""), write)
                unsent = b""
        await self._stream.write(unsent + (machine.send(h11.EndOfMessage()) or b""), write)

    async def receive(self, read: float | None) -> bytes:
        """The next piece of the body; empty at its end."""
        if self._left is None:
            return await self._receive_framed(read)
        piece, self._held = self._held[: self._left], self._held[self._left :]
        if not piece and self._left:
            piece = await self._stream.read(min(self._left, READ), read)
            if not piece:
                raise h11.RemoteProtocolError(
                    f"peer closed connection {self._left} bytes before the end of the body"
                )
        self._left -= len(piece)
        # What follows the end was not asked for.
        self.is_reusable = not (self._left or self._held or self._ends)
        return piece

    async def aclose(self) -> None:
        """Close it."""
        with trio.CancelScope(shield=True):  # waits for nothing
            await self._stream.aclose()

    async def _receive_framed(self, read: float | None) -> bytes:
        event = await self._event(READ, read)
        if isinstance(event, h11.Data):
            return bytes(event.data)
        more, _ = self._machine.trailing_data
        self.is_reusable = self._machine.their_state is h11.DONE and not more
        return b""

    async def _event(self, most: int, read: float | None) -> object:
        while True:
            event = self._machine.next_event()
            if event is not h11.NEED_DATA:
                return event
            data = await self._stream.read(most, read)
            if not data and self._machine.their_state is h11.SEND_RESPONSE:
                raise h11.RemoteProtocolError("server disconnected without sending a response")
            self._machine.receive_data(data)


def _length(request: httpx.Request, response: h11.Response) -> int | None:
    """The length of a body that is told before it comes, RFC 9112, 6.3; h11 has checked that it is one number."""
    if request.method == "HEAD" or response.status_code in _BODILESS:
        return None
    headers = dict(response.headers)
    if b"transfer-encoding" in headers or b"content-length" not in headers:
        return None
    return int(headers[b"content-length"])


def _ends(response: h11.Response) -> bool:
    """Whether the server closes the connection afterwards, RFC 9112, 9.3."""
    said = [value.lower() for name, value in response.headers if name == b"connection"]
    return response.http_version < b"1.1" or any(b"close" in value for value in said)
