"""The binary caches: whether they answer, for which store directory, with whose signatures, and at what time."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import LOOKUP_CONNECTIONS, authorities, open_client, secrets, timeouts
from fusesnap.daemon.doctor.findings import (
    CONFIGURATION,
    NO_PERMISSION,
    UNAVAILABLE,
    Finding,
    Findings,
    doubtful,
    failing,
    well,
)
from fusesnap.errors import FusesnapError, InvalidData, PathNotFound, UntrustedPath
from fusesnap.exit_codes import exit_code
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trust import check_trust
from fusesnap.substituter.addresses import parse_cache_url
from fusesnap.substituter.answers import MISSING_CACHE_INFO
from fusesnap.substituter.base import Substituter
from fusesnap.substituter.client import open_substituter
from fusesnap.substituter.narinfo_cache import NarInfoCache

# Seconds by which our clock may differ from a cache's; certificates that are fresh fail beyond the second.
SKEWED, WRONG = 60.0, 3600.0
_SHOWN: Final = 3  # key names in a line


@dataclass(slots=True)
class Clock:
    """By how many seconds servers' clocks are ahead of ours."""

    ahead: dict[str, float] = field(default_factory=dict)

    async def look(self, response: httpx.Response) -> None:
        """Learn from a response's ``Date`` and, where a cache in between kept it, ``Age`` (RFC 9110, 9111)."""
        try:
            then = parsedate_to_datetime(response.headers["Date"]).timestamp()
            age = float(response.headers.get("Age", "0"))
        except (KeyError, ValueError, TypeError):
            return
        self.ahead[response.url.host] = then + age - time.time()


def examine_caches(settings: Settings, sample: str | None) -> list[Finding]:
    """The caches of ``settings``; ``sample`` is a store path that they are asked for, else one that each has had."""
    findings = Findings([keys(settings), *tokens(settings)])
    with findings.instead_of_error("caches", "correct the configuration"):
        store_dir = StoreDir(settings.store_dir)
        path = store_dir.parse(sample) if sample is not None else None
        findings.extend(trio.run(_examine, settings, store_dir, path))
    return findings


def keys(settings: Settings) -> Finding:
    """Whose signatures count. Reading the configuration has parsed them."""
    names = [key.partition(":")[0] for key in settings.trusted_public_keys]
    if not names:
        return doubtful(
            "keys",
            "none is trusted: only content-addressed paths can be fetched",
            "trusted-public-keys, or --trusted-public-key",
        )
    return well("keys", f"trusted: {', '.join(names)}")


def tokens(settings: Settings) -> list[Finding]:
    """Tokens that no cache is ever told, because nothing is fetched from where they are for."""
    caches = {parse_cache_url(url).url for url in settings.substituters}
    return [
        doubtful(
            "tokens", f"{url} is not among substituters: nobody is told its token", "token-files"
        )
        for url in settings.token_files
        if parse_cache_url(url).url not in caches
    ]


async def _examine(
    settings: Settings, store_dir: StoreDir, sample: StorePath | None
) -> list[Finding]:
    clock = Clock()
    told = secrets(settings)
    async with open_client(
        settings, authorities(settings), http2=True, connections=LOOKUP_CONNECTIONS
    ) as client:
        client.event_hooks = {"response": [clock.look]}
        substituters = [
            open_substituter(
                url, client, store_dir=store_dir, timeouts=timeouts(settings), secrets=told
            )
            for url in settings.substituters
        ]
        found: dict[str, list[Finding]] = {each.url: [] for each in substituters}

        async def look(substituter: Substituter) -> None:
            found[substituter.url] = await _cache(substituter, settings, store_dir, sample)

        async with trio.open_nursery() as nursery:
            for substituter in substituters:
                nursery.start_soon(look, substituter)
    return [*(finding for each in found.values() for finding in each), *clock_findings(clock)]


async def _cache(
    substituter: Substituter, settings: Settings, store_dir: StoreDir, sample: StorePath | None
) -> list[Finding]:
    began = trio.current_time()
    try:
        info = await substituter.cache_info()
    except FusesnapError as error:
        return [failing(substituter.url, _without(substituter.url, error), _REACH, UNAVAILABLE)]
    took = (trio.current_time() - began) * 1000
    if info.store_dir != store_dir.path:
        said = f"its store directory is {info.store_dir}, ours is {store_dir}"
        mend = "take it out of substituters, or set store-dir"
        return [failing(substituter.url, said, mend, CONFIGURATION)]
    answer = f"answers in {took:.0f} ms, store directory {info.store_dir}"
    if info == MISSING_CACHE_INFO:
        answer += " (taken for granted: it has no nix-cache-info)"
    return [
        well(substituter.url, answer),
        await _signature(substituter, settings, store_dir, sample),
    ]


_REACH: Final = (
    "mend the URL, the network, proxies, passwords (netrc-file, token-files) or ca-file;"
    " or take it out of substituters"
)


async def _signature(
    substituter: Substituter, settings: Settings, store_dir: StoreDir, sample: StorePath | None
) -> Finding:
    """Whether what the cache has is signed by somebody who is trusted, by one path of it."""
    url = substituter.url
    path = sample or await trio.to_thread.run_sync(known_path, settings, url, store_dir)
    if path is None:
        return well(url, "signatures: not looked at, as nothing of it is known yet (--sample PATH)")
    try:
        info = await substituter.narinfo(path)
    except PathNotFound:
        return well(url, f"signatures: not looked at, as it does not have {path}")
    except FusesnapError as error:
        return failing(url, _without(url, error), _REACH, exit_code(error))
    try:
        check_trust(info, TrustedKeys.parse(settings.trusted_public_keys))
    except UntrustedPath as error:
        mend = "if you trust who signed it, add the key to trusted-public-keys, as NAME:BASE64"
        return failing(url, str(error), mend, NO_PERMISSION)
    return well(url, f"signatures: {path} is signed by {_signers(info)}")


def known_path(settings: Settings, url: str, store_dir: StoreDir) -> StorePath | None:
    """A path that the cache is likely to have: by what is remembered of it, or by its files."""
    remembered = settings.root / "narinfo-cache.sqlite"
    if os.access(remembered, os.W_OK):
        with closing(NarInfoCache(remembered, time.time)) as cache:
            path = cache.newest_path(url, store_dir)
            if path is not None:
                return path
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    try:
        first = min(Path(parts.path).glob("*.narinfo"), default=None)
        return None if first is None else parse_narinfo(first.read_bytes(), store_dir).store_path
    except (OSError, InvalidData):  # that it is asked and does not answer well is said elsewhere
        return None


def clock_findings(clock: Clock) -> list[Finding]:
    """Whether our clock is right, by the caches'."""
    if not clock.ahead:
        return []
    # One server's clock may be wrong; the nearest to ours says least against us.
    host, seconds = min(clock.ahead.items(), key=lambda item: abs(item[1]))
    if abs(seconds) <= SKEWED:
        return [well("clock", f"agrees with {host}")]
    direction = "behind" if seconds > 0 else "ahead of"
    said = f"{abs(seconds):.0f} s {direction} {host}"
    mend = "set the clock: timedatectl set-ntp true, or chronyd"
    if abs(seconds) > WRONG:
        return [failing("clock", f"{said}: certificates are refused", mend, UNAVAILABLE)]
    return [doubtful("clock", said, mend)]


def _signers(info: NarInfo) -> str:
    names = list(dict.fromkeys(each.key_name for each in info.signatures))
    return ", ".join(names[:_SHOWN]) or "nobody: it is content-addressed"


def _without(url: str, error: FusesnapError) -> str:
    return str(error).removeprefix(f"{url}: ")
