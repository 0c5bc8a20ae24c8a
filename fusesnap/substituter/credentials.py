"""What caches are told of who asks: bearer tokens and passwords, from files that may change at any time.

Tokens expire, and whoever renews them writes the file anew. A file is looked at now and then, and at once when a server
does not accept what it said; so nothing has to be restarted. A file that cannot be read any more, or not understood,
is told in the log, and what it said before goes on being used.
"""

from __future__ import annotations

import base64
import logging
import netrc
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Generic, NamedTuple, TypeVar

import httpx
import trio

from fusesnap.errors import InvalidConfiguration
from fusesnap.substituter.addresses import CacheAddress, parse_cache_url

logger = logging.getLogger(__name__)

# Seconds from one look at a file to the next, while servers accept what it says.
LOOK_EVERY: Final = 5.0
# A token is sent with every request; servers take some 8 KiB of headers. A netrc file has a line a host.
MAX_TOKEN: Final = 8 * 1024
MAX_NETRC: Final = 1 << 20
# RFC 6750, section 2.1; the characters of other schemes' tokens too, as long as they can stand in a header.
_TOKEN: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)

T = TypeVar("T")


class _Signature(NamedTuple):
    """What changes when a file is written anew, or another takes its name."""

    device: int
    inode: int
    size: int
    modified: int


class SecretFile(Generic[T]):
    """A file that is read anew when it has changed. ``value`` is what it last said.

    ``parse`` reads it, and raises OSError, and ValueError for what it does not understand.
    """

    def __init__(self, path: Path, what: str, limit: int, parse: Callable[[Path], T]) -> None:
        """Read it. Blocking; raises InvalidConfiguration that names the file."""
        self.path = path
        self._what = what
        self._limit = limit
        self._parse = parse
        try:
            self._signature, self.value = self._read()
        except (OSError, ValueError) as error:
            raise InvalidConfiguration(f"{what} {path} cannot be read: {_said(error)}") from error
        self._looked_at = float("-inf")
        self._complained = ""

    async def look(self) -> None:
        """Read it anew if it has changed, and it was not looked at just now."""
        if trio.current_time() - self._looked_at >= LOOK_EVERY:
            await self.renew()

    async def renew(self) -> None:
        """Read it anew if it has changed."""
        self._looked_at = trio.current_time()
        await trio.to_thread.run_sync(self._renew)

    def _renew(self) -> None:
        try:
            if _signature(self.path) != self._signature:
                self._signature, self.value = self._read()
                logger.info("%s %s was read anew", self._what, self.path)
            self._complained = ""
        except (OSError, ValueError) as error:
            said = _said(error)
            if said != self._complained:
                logger.warning("%s %s cannot be read: %s", self._what, self.path, said)
            self._complained = said

    def _read(self) -> tuple[_Signature, T]:
        # What is written between the two is seen at the next look.
        signature = _signature(self.path)
        if signature.size > self._limit:
            raise ValueError(f"has {signature.size} bytes, expected at most {self._limit}")
        return signature, self._parse(self.path)


class Credentials:
    """What one cache is told: its token, else the user of its URL, else what a netrc file says of the host."""

    def __init__(
        self,
        address: CacheAddress,
        token: SecretFile[str] | None = None,
        netrc_file: SecretFile[netrc.netrc] | None = None,
    ) -> None:
        self._origin = _origin(httpx.URL(address.url))
        self._user = (address.username, address.password)
        self._token = token
        self._netrc = netrc_file
        self._accepted: set[str] = set()

    def header(self, url: httpx.URL) -> str | None:
        """The value of ``Authorization`` for a request to ``url``, if there is anything to say.

        A cache's own token and user are for its own server alone, wherever that redirects to.
        """
        if _origin(url) == self._origin:
            if self._token is not None:
                return f"Bearer {self._token.value}"
            if any(self._user):
                return _basic(*self._user)
        entry = None if self._netrc is None else self._netrc.value.authenticators(url.host)
        return None if entry is None else _basic(entry[0], entry[2] or "")

    async def look(self) -> None:
        """Read what has changed, now and then."""
        for file in self._files():
            await file.look()

    async def renewed(self, response: httpx.Response) -> bool:
        """Read what has changed now. Returns whether the request that was answered so would say something else."""
        for file in self._files():
            await file.renew()
        request = response.request
        said: str | None = request.headers.get("Authorization")
        return self.header(request.url) != said

    def note_accepted(self, response: httpx.Response) -> None:
        """The server gave what was asked for."""
        said = response.request.headers.get("Authorization")
        if said is not None and said not in self._accepted:
            self._accepted = {said}

    def are_accepted(self, response: httpx.Response) -> bool:
        """Whether what was said is nothing, or has been accepted before."""
        said = response.request.headers.get("Authorization")
        return said is None or said in self._accepted

    def explanation(self, url: httpx.URL) -> str:
        """For a person whose request to ``url`` was refused: what was said, and where it can be set."""
        if self.header(url) is None:
            return "nothing is configured for it (netrc-file, token-files)"
        if _origin(url) == self._origin and self._token is not None:
            return f"the token in {self._token.path} is not accepted"
        if _origin(url) == self._origin and any(self._user):
            return "the user and password of its URL are not accepted"
        where = self._netrc.path if self._netrc is not None else "netrc-file"
        return f"the user and password for {url.host} in {where} are not accepted"

    def _files(self) -> list[SecretFile[str] | SecretFile[netrc.netrc]]:
        return [file for file in (self._token, self._netrc) if file is not None]


class Secrets:
    """The files of all caches: a token file by a cache's URL, and one netrc file for all."""

    def __init__(
        self, netrc_file: Path | None = None, token_files: Mapping[str, Path] | None = None
    ) -> None:
        """Read them. Blocking; raises InvalidConfiguration that names the file."""
        self._netrc = None
        if netrc_file is not None:
            self._netrc = SecretFile(netrc_file, "netrc file", MAX_NETRC, _read_netrc)
        self._tokens = {
            parse_cache_url(url).url: SecretFile(path, "token file", MAX_TOKEN, _read_token)
            for url, path in (token_files or {}).items()
        }

    def of(self, address: CacheAddress) -> Credentials:
        """What the cache at ``address`` is told."""
        return Credentials(address, self._tokens.get(address.url), self._netrc)


def _read_token(path: Path) -> str:
    with path.open("rb") as file:
        token = file.read(MAX_TOKEN).decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ValueError("expected one token, of printable ASCII without spaces")
    return token


def _read_netrc(path: Path) -> netrc.netrc:
    try:
        return netrc.netrc(str(path))
    except netrc.NetrcParseError as error:
        raise ValueError(str(error)) from error


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return _Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _said(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
