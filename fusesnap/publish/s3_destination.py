"""A bucket of S3, or of what speaks its protocol."""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

import trio

from fusesnap.errors import InvalidConfiguration, PathNotFound, Unavailable, Unsupported
from fusesnap.publish.destination import PIECE, Kind
from fusesnap.substituter.retry import Refusal

T = TypeVar("T")

_SETTINGS: Final = ("endpoint", "region", "scheme", "addressing-style")
_DEFAULT_REGION: Final = "us-east-1"  # as Nix has it
_HOPELESS: Final = ("PermissionDeniedError", "UnauthenticatedError", "InvalidPathError")


@dataclass(frozen=True, slots=True)
class S3Address:
    """A bucket as Nix spells it: ``s3://bucket/prefix?endpoint=host&scheme=https&region=name``.

    ``endpoint`` is None for Amazon's own. ``virtual`` says that the bucket's name is part of the host's.
    """

    bucket: str
    prefix: str
    endpoint: str | None
    region: str
    virtual: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read it; raises InvalidConfiguration."""
        parts = urlsplit(text)
        settings = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(settings.keys() - set(_SETTINGS))
        if unknown:
            raise InvalidConfiguration(
                f"{text}: setting {unknown[0]!r}, expected some of {', '.join(_SETTINGS)}"
            )
        if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc:
            raise InvalidConfiguration(f"{text}: expected s3://bucket, without user name")
        scheme = settings.get("scheme", "https")
        if scheme not in ("http", "https"):
            raise InvalidConfiguration(f"{text}: scheme is {scheme!r}, expected http or https")
        endpoint = settings.get("endpoint") or None
        if endpoint is not None and "://" not in endpoint:
            endpoint = f"{scheme}://{endpoint}"
        style = settings.get("addressing-style", "virtual" if endpoint is None else "path")
        if style not in ("virtual", "path"):
            raise InvalidConfiguration(
                f"{text}: addressing-style is {style!r}, expected virtual or path"
            )
        return cls(
            parts.netloc,
            parts.path.strip("/"),
            endpoint,
            settings.get("region", _DEFAULT_REGION),
            style == "virtual",
        )


class S3Destination:
    """A bucket, through obstore: it signs, retries, and sends what is large in parts.

    Credentials are those of the environment, of a profile's, or of the machine's role, as obstore finds them.
    """

    def __init__(self, url: str, spool: Path) -> None:
        """``spool`` is a local directory. Raises InvalidConfiguration, and Unsupported without obstore."""
        address = S3Address.parse(url)
        self._url = url
        self._spool = spool
        self._obstore = _import_obstore()
        with self._translated(""):
            self._store = self._obstore.store.S3Store(
                address.bucket,
                prefix=address.prefix or None,
                config=_configuration(address),
                client_options={"allow_http": True},
            )

    @property
    def url(self) -> str:
        return self._url.partition("?")[0]

    @property
    def spool(self) -> Path:
        return self._spool

    async def size(self, name: str) -> int | None:
        try:
            found = await self._call(name, self._obstore.head, self._store, name)
        except PathNotFound:
            return None
        return int(found["size"])

    async def read(self, name: str) -> AsyncGenerator[bytes]:
        result = await self._call(name, self._obstore.get, self._store, name)
        pieces = iter(result.stream(min_chunk_size=PIECE))
        while (piece := await self._call(name, next, pieces, None)) is not None:
            yield bytes(piece)

    async def put(self, name: str, file: Path, kind: Kind) -> None:
        await self._put(name, file, kind)

    async def put_bytes(self, name: str, data: bytes, kind: Kind) -> None:
        await self._put(name, data, kind)

    async def names(self, directory: str = "") -> Iterable[str] | None:
        return await trio.to_thread.run_sync(self._names, directory)

    def _names(self, directory: str) -> list[str]:
        with self._translated(directory):
            listed = self._obstore.list_with_delimiter(self._store, directory or None)["objects"]
            return sorted(str(found["path"]) for found in listed)

    async def _put(self, name: str, content: bytes | Path, kind: Kind) -> None:
        attributes = {"Content-Type": kind.media_type, "Cache-Control": kind.cache_control}

        def put() -> None:
            self._obstore.put(self._store, name, content, attributes=attributes)

        await self._call(name, put)

    async def _call(self, name: str, work: Callable[..., T], *arguments: Any) -> T:
        def translated() -> T:
            with self._translated(name):
                return work(*arguments)

        return await trio.to_thread.run_sync(translated)

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn obstore's exceptions into ours: the one place that knows both."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except FileNotFoundError:  # obstore's NotFoundError
            raise PathNotFound(f"{where}: not found") from None
        except self._obstore.exceptions.BaseError as error:
            kind = Refusal if type(error).__name__ in _HOPELESS else Unavailable
            raise kind(f"{where}: {str(error).strip().splitlines()[0]}") from error


def _configuration(address: S3Address) -> dict[str, Any]:
    found: dict[str, Any] = {
        "region": address.region,
        "virtual_hosted_style_request": address.virtual,
    }
    if address.endpoint is not None:
        found["endpoint"] = address.endpoint
    return found


def _import_obstore() -> Any:
    try:
        importlib.import_module("obstore.store")
        return importlib.import_module("obstore")
    except ImportError:
        raise Unsupported(
            "publishing to S3 needs obstore: install fusesnap with its extra, fusesnap[s3]"
        ) from None
