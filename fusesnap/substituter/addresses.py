"""The URL of a binary cache, as a user writes it.

Source: Nix manual, "Store URL format". Of the settings that may follow as a query, ``priority`` is
known here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from fusesnap.errors import InvalidConfiguration

SCHEMES = ("https", "http", "file")
_PRIORITY = re.compile(r"[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CacheAddress:
    """Where a binary cache is.

    ``url`` has neither user name and password, nor a query, nor a slash at its end. ``path`` is the
    directory of a ``file`` cache. ``priority`` is the user's, and overrules the cache's own.
    """

    url: str
    scheme: str
    path: str
    priority: int | None = None
    username: str = ""
    password: str = field(default="", repr=False)


def parse_http_url(text: str) -> CacheAddress:
    """As :func:`parse_cache_url`, for ``https`` and ``http`` alone."""
    return _of_scheme(text, "https", "http")


def parse_file_url(text: str) -> CacheAddress:
    """As :func:`parse_cache_url`, for ``file`` alone."""
    return _of_scheme(text, "file")


def parse_cache_url(text: str) -> CacheAddress:
    """Read the URL of a cache; raises InvalidConfiguration, whose message shows no password."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidConfiguration(f"substituter {_shown(text)}: not a URL: {error}") from None
    if parts.scheme not in SCHEMES:
        raise InvalidConfiguration(
            f"substituter {_shown(text)}: scheme is {parts.scheme!r}, expected one of"
            f" {', '.join(SCHEMES)}"
        )
    if parts.fragment or not text.isprintable() or " " in text:
        raise InvalidConfiguration(
            f"substituter {_shown(text)}: expected neither '#' nor spaces in the URL of a cache"
        )
    host = "" if parts.hostname is None else parts.hostname
    if parts.scheme == "file":
        _check_directory(text, host, parts.path)
    elif not host:
        raise InvalidConfiguration(f"substituter {_shown(text)}: no host")
    return CacheAddress(
        url=_plain(parts, host, port),
        scheme=parts.scheme,
        path=unquote(parts.path).rstrip("/") or "/",
        priority=_parse_settings(text, parts.query),
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _of_scheme(text: str, *schemes: str) -> CacheAddress:
    address = parse_cache_url(text)
    if address.scheme not in schemes:
        raise InvalidConfiguration(
            f"substituter {_shown(text)}: expected a URL of {' or '.join(schemes)}"
        )
    return address


def _plain(parts: SplitResult, host: str, port: int | None) -> str:
    host = f"[{host}]" if ":" in host else host
    authority = host if port is None else f"{host}:{port}"
    return f"{parts.scheme}://{authority}{parts.path}".rstrip("/")


def _check_directory(text: str, host: str, path: str) -> None:
    if host not in ("", "localhost") or not path.startswith("/"):
        raise InvalidConfiguration(
            f"substituter {_shown(text)}: expected an absolute directory, as in file:///directory"
        )
    if "\0" in unquote(path):
        raise InvalidConfiguration(f"substituter {_shown(text)}: a path cannot have a NUL")


def _parse_settings(text: str, query: str) -> int | None:
    priority = None
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name != "priority" or not _PRIORITY.fullmatch(value):
            raise InvalidConfiguration(
                f"substituter {_shown(text)}: setting {name!r}, expected only priority=<number>"
            )
        priority = int(value)
    return priority


def _shown(text: str) -> str:
    """The URL for a message: without what may be a password, and in one line."""
    return repr(re.sub(r"//[^/@]*@", "//", text)[:200])
