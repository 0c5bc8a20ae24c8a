"""Clients and substituters made from what a user configured."""

from __future__ import annotations

import ssl
from http.client import HTTPResponse
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Final
from urllib.request import Request, getproxies

import httpx

from fusesnap.errors import InvalidConfiguration
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.addresses import parse_cache_url
from fusesnap.substituter.base import DEFAULT_STORE_DIR, Meter, Substituter, unmetered
from fusesnap.substituter.credentials import Secrets
from fusesnap.substituter.file import FileSubstituter
from fusesnap.substituter.http import DEFAULT_TIMEOUTS, HttpSubstituter, Timeouts
from fusesnap.substituter.plain_http import PlainTransport
from fusesnap.substituter.retry import DEFAULT_RETRIES, RetryPolicy

# The environment's proxies for encrypted requests are httpx's business; these would carry the others.
_OF_ALL_OR_HTTP: Final = frozenset({"all", "http"})


class NoCookies(CookieJar):
    """Takes none: a cache has no use for them, and a jar has no limit. Nor is a response looked through for any."""

    def extract_cookies(self, response: HTTPResponse, request: Request) -> None:
        """Leave them where they are."""


def make_client(
    *,
    http2: bool = True,
    max_connections: int = 16,
    idle: float = 60.0,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    trust_env: bool = False,
    ca_file: Path | None = None,
    tls: ssl.SSLContext | None = None,
    proxy: str | None = None,
    user_agent: str = "fusesnap",
) -> httpx.AsyncClient:
    """Make the client that requests to caches go through; whoever asks for it closes it.

    ``http2`` is offered to ``https`` servers. ``max_connections`` is for all servers together: few
    are cheaper than many (2,400 narinfos from a server nearby took 2.4 s of CPU over 16
    connections, 6.6 s over 64). An ``idle`` connection is kept for that many seconds.
    ``trust_env`` takes proxies and ``SSL_CERT_FILE`` from the environment, ``proxy`` is one for
    everything.
    ``ca_file`` holds certificate authorities beside those that the system and certifi know. ``tls``
    is a :func:`tls_context` made before, for this client alone: a connection sets in it which
    versions of HTTP it offers. Raises InvalidConfiguration that names the file.
    """
    direct = proxy is None and not (trust_env and getproxies().keys() & _OF_ALL_OR_HTTP)
    plain = PlainTransport(max_connections, idle)
    return httpx.AsyncClient(
        mounts={"http://": plain} if direct else None,
        http2=http2,
        verify=tls or tls_context(ca_file, trust_env=trust_env),
        limits=httpx.Limits(
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=idle,
        ),
        timeout=httpx.Timeout(timeouts.stall, connect=timeouts.connect, pool=timeouts.lookup),
        headers={"User-Agent": user_agent, "Accept": "*/*"},
        cookies=NoCookies(),
        proxy=_checked_proxy(proxy),
        trust_env=trust_env,
    )


def open_substituter(
    url: str,
    client: httpx.AsyncClient,
    *,
    transfers: httpx.AsyncClient | None = None,
    store_dir: StoreDir = DEFAULT_STORE_DIR,
    retry: RetryPolicy = DEFAULT_RETRIES,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    secrets: Secrets | None = None,
    meter: Meter = unmetered,
) -> Substituter:
    """Make the substituter for a URL of any scheme that is known; raises InvalidConfiguration."""
    if parse_cache_url(url).scheme == "file":
        return FileSubstituter(url, store_dir=store_dir, meter=meter)
    return HttpSubstituter(
        url,
        client,
        transfers=transfers,
        store_dir=store_dir,
        retry=retry,
        timeouts=timeouts,
        secrets=secrets,
        meter=meter,
    )


def tls_context(ca_file: Path | None = None, *, trust_env: bool = False) -> ssl.SSLContext:
    """What decides whose certificates are accepted, see :func:`make_client`.

    To read all certificate authorities takes some 30 ms of CPU.
    """
    # certifi's, and what the operator added to the system's.
    context = httpx.create_ssl_context(trust_env=trust_env)
    context.load_default_certs()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=str(ca_file))
        except (OSError, ssl.SSLError) as error:
            raise InvalidConfiguration(
                f"certificate authorities in {ca_file} cannot be read: {error}"
            ) from error
    return context


def _checked_proxy(proxy: str | None) -> httpx.Proxy | None:
    try:
        return None if proxy is None else httpx.Proxy(proxy)
    except (ValueError, httpx.InvalidURL) as error:
        raise InvalidConfiguration(f"proxy cannot be used: {error}") from error
