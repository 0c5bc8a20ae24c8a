"""Certificate authorities that are read only when somebody is to be vouched for.

To read all of them takes some 30 ms of CPU a client, as long as a hundred small paths take; a client of caches that
speak HTTP needs none, unless one of them redirects it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable


class LateContext(ssl.SSLContext):
    """For one client: what ``make`` gives, made at the first connection that is encrypted, which waits for it."""

    _make: Callable[[], ssl.SSLContext]
    _made: ssl.SSLContext | None
    _protocols: list[str]

    def __new__(cls, make: Callable[[], ssl.SSLContext]) -> LateContext:
        """Nothing is made yet; ``make`` raises what cannot be used."""
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context._make, context._made, context._protocols = make, None, []
        return context

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """See :class:`ssl.SSLContext`."""
        self._protocols = list(alpn_protocols)

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """See :class:`ssl.SSLContext`. What trio encrypts with."""
        if self._made is None:
            self._made = self._make()
        self._made.set_alpn_protocols(self._protocols)
        return self._made.wrap_bio(incoming, outgoing, server_side, server_hostname, session)
