"""How text from a stranger is shown in a message."""

from __future__ import annotations

SHOWN = (
    80  # enough for a store path's base name; a message is a line in a log, not a copy of the input
)


def quote(text: str | bytes, limit: int = SHOWN) -> str:
    """Return ``text`` printable, in quotes and cut to about ``limit`` characters."""
    if isinstance(text, bytes):
        return _quote_bytes(text, limit)
    return repr(text[:limit]) + ("..." if len(text) > limit else "")


def _quote_bytes(data: bytes, limit: int) -> str:
    try:
        return quote(data.decode("utf-8"), limit)
    except UnicodeDecodeError:
        shown = repr(data[:limit]).removeprefix("b")
        return shown + ("..." if len(data) > limit else "")
