"""One request after another to one repository of a registry, with whatever it wants to see of us.

Source: OCI distribution specification, ``spec.md``, "Pushing".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

import httpx
import trio
from pydantic import BaseModel, ConfigDict, ValidationError

from fusesnap.errors import InvalidConfiguration, InvalidData, PathNotFound, Unavailable
from fusesnap.images.digest import Digest
from fusesnap.images.documents import Document
from fusesnap.registry.authentication import (
    MAX_TOKEN_ANSWER,
    Challenge,
    basic,
    parse_challenges,
    read_token,
    token_request,
)
from fusesnap.registry.credentials import Credentials
from fusesnap.registry.reference import RegistryReference
from fusesnap.substituter.retry import RetryPolicy, Throttled, may_mend
from fusesnap.substituter.transport import status_error, translated

# Seconds without an answer; a registry may copy a large blob to elsewhere before it says that it has it.
PATIENCE: Final = 300.0
_MAX_SAID: Final = 64 * 1024
_SHOWN: Final = 300  # characters of what a registry says
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_OCTETS: Final = {"Content-Type": "application/octet-stream"}

T = TypeVar("T")


class _Said(BaseModel):
    model_config = ConfigDict(extra="ignore")

    code: str = ""
    message: str | None = None


class _Errors(BaseModel):
    model_config = ConfigDict(extra="ignore")

    errors: list[_Said]


class RegistryClient:
    """Pushes into the repository that ``reference`` names.

    ``client`` is not closed here. ``plain_http``: no TLS is used, or asked of who gives tokens. Everything here raises
    Unavailable (asking again may help), InvalidConfiguration where the registry does not let us, and InvalidData for
    answers that make no sense.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        reference: RegistryReference,
        credentials: Credentials | None,
        retry: RetryPolicy,
        *,
        plain_http: bool,
    ) -> None:
        self._client = client
        self._reference = reference
        self._credentials = credentials
        self._retry = retry
        self._plain_http = plain_http
        scheme = "http" if plain_http else "https"
        self._origin = httpx.URL(f"{scheme}://{reference.server}")
        self._repository = f"/v2/{reference.repository}"
        self._authorization: str | None = None
        self.name = str(self._origin)

    async def begin(self) -> None:
        """See that a registry is there, and get what it wants to see of us."""
        response = await self._retried(lambda: self._send("GET", "/v2/"))
        if response.status_code == _UNAUTHORIZED:
            await self._retried(lambda: self._authorise(response))
        elif response.status_code == _NOT_FOUND:
            raise InvalidData(f"{self.name}: expected a registry (/v2/), there is none")
        else:
            self._check(response, "/v2/")

    async def has_blob(self, digest: Digest, size: int) -> bool:
        """Ask whether a blob of ``size`` bytes is there already."""
        path = f"{self._repository}/blobs/{digest}"
        response = await self._asked("HEAD", path, absent=True)
        if response.status_code == _NOT_FOUND:
            return False
        length = response.headers.get("Content-Length", str(size))
        if length != str(size):
            raise InvalidData(f"{self.name}: blob {digest}: expected {size} bytes, it has {length}")
        return True

    async def begin_upload(self) -> tuple[httpx.URL, int]:
        """Begin a blob; returns where to send it, and the least bytes that a part of it may have."""
        response = await self._asked("POST", f"{self._repository}/blobs/uploads/", content=b"")
        least = response.headers.get("OCI-Chunk-Min-Length", "0")
        return self._location(response), int(least) if least.isascii() and least.isdigit() else 0

    async def send_part(self, place: httpx.URL, start: int, data: bytes) -> httpx.URL:
        """Send the bytes of a blob from ``start`` on; returns where the next go.

        Where it is not sure what arrived the registry is asked, and gets the rest.
        """
        sent, where = 0, place

        async def send() -> httpx.Response:
            headers = {**_OCTETS, "Content-Range": f"{start + sent}-{start + len(data) - 1}"}
            return self._check(
                await self._send("PATCH", where, headers=headers, content=data[sent:]), "upload"
            )

        retries = self._retry.start()
        while sent < len(data):
            try:
                return self._location(await self._authorised(send))
            except Unavailable as error:
                if not may_mend(error):
                    raise
                await retries.wait(error)
                where, received = await self._progress(where)
                sent = received - start
                if not 0 <= sent <= len(data):
                    raise InvalidData(
                        f"{self.name}: upload: expected {start} to {start + len(data)} bytes there, got {received}"
                    ) from error
        return where

    async def end_upload(self, place: httpx.URL, digest: Digest, data: bytes) -> None:
        """Send the last bytes of a blob, and say which digest all of it has."""
        url = place.copy_merge_params({"digest": str(digest)})
        response = await self._asked("PUT", url, headers=_OCTETS, content=data, what="upload")
        self._compare(response, digest)

    async def abandon_upload(self, place: httpx.URL) -> None:
        """Say that nothing more comes."""
        await self._send("DELETE", place)

    async def put_manifest(self, manifest: Document) -> None:
        """Give the image its name, and see that it has it."""
        path = f"{self._repository}/manifests/{self._reference.tag}"
        headers = {"Content-Type": manifest.media_type}
        self._compare(
            await self._asked("PUT", path, headers=headers, content=manifest.data), manifest.digest
        )
        self._compare(
            await self._asked("HEAD", path, headers={"Accept": manifest.media_type}),
            manifest.digest,
        )

    async def _progress(self, place: httpx.URL) -> tuple[httpx.URL, int]:
        """Where an upload goes on, and how many bytes of it are there."""
        response = await self._asked("GET", place, what="upload")
        _, _, last = response.headers.get("Range", "").rpartition("-")
        if not last.isascii() or not last.isdigit():
            raise InvalidData(
                f"{self.name}: upload: expected a Range, got {response.headers.get('Range')!r}"
            )
        location = response.headers.get("Location")
        # "0-0" is nothing at all, and a single byte, which nobody sends.
        return (self._location(response) if location else place), int(
            last
        ) + 1 if last != "0" else 0

    async def _asked(
        self,
        method: str,
        where: str | httpx.URL,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        absent: bool = False,
        what: str | None = None,
    ) -> httpx.Response:
        """Send as often as may help. ``absent``: 404 is an answer too."""

        async def send() -> httpx.Response:
            response = await self._send(method, where, headers=headers, content=content)
            if absent and response.status_code == _NOT_FOUND:
                return response
            return self._check(response, what or str(where))

        return await self._retried(lambda: self._authorised(send))

    async def _retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        retries = self._retry.start()
        while True:
            try:
                return await attempt()
            except Unavailable as error:
                if not may_mend(error):
                    raise
                if isinstance(error, Throttled):
                    await self._retry.sleep(min(error.retry_after, self._retry.total))
                await retries.wait(error)

    async def _authorised(self, send: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
        """Tokens end after some minutes; then another one is asked for, once."""
        try:
            return await send()
        except _Unauthorised as refused:
            await self._authorise(refused.response)
            try:
                return await send()
            except _Unauthorised as again:
                raise self._not_allowed(again.response) from None

    async def _authorise(self, response: httpx.Response) -> None:
        challenges = {challenge.scheme: challenge for challenge in parse_challenges(response)}
        if "bearer" in challenges:
            self._authorization = f"Bearer {await self._token(challenges['bearer'])}"
        elif "basic" in challenges and self._credentials is not None:
            self._authorization = basic(self._credentials)
        else:
            raise self._not_allowed(response)

    async def _token(self, challenge: Challenge) -> str:
        scope = f"repository:{self._reference.repository}:pull,push"
        request = token_request(
            self._client,
            challenge,
            scope,
            self._credentials,
            self.name,
            plain_http=self._plain_http,
        )
        where = f"{request.url.scheme}://{request.url.host}"
        with translated(where, PATIENCE):
            answer = await self._client.send(request, stream=True)
            data = await _body(answer, MAX_TOKEN_ANSWER)
        if answer.status_code in (_UNAUTHORIZED, _FORBIDDEN):
            raise self._not_allowed(answer, data)
        error = status_error(where, answer, forbidden=False)
        if error is not None:
            raise error
        return read_token(data, where)

    async def _send(
        self,
        method: str,
        where: str | httpx.URL,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """Send one request, and read what is said of it into ``response.extensions``."""
        url = self._origin.join(where)
        own = {"Authorization": self._authorization} if self._authorization else {}
        # An upload may go on at another host, which has rights of its own in its URL.
        is_ours = (url.scheme, url.host, url.port) == (
            self._origin.scheme,
            self._origin.host,
            self._origin.port,
        )
        request = self._client.build_request(
            method,
            url,
            headers={**(headers or {}), **(own if is_ours else {})},
            content=content,
            timeout=PATIENCE,
        )
        with translated(self.name, PATIENCE), trio.fail_after(2 * PATIENCE):
            response = await self._client.send(request, stream=True)
            response.extensions["said"] = await _body(response, _MAX_SAID)
        return response

    def _check(self, response: httpx.Response, what: str) -> httpx.Response:
        if response.status_code == _UNAUTHORIZED:
            raise _Unauthorised(response)
        if response.status_code == _FORBIDDEN:
            raise self._not_allowed(response)
        error = status_error(f"{self.name}: {what}", response, forbidden=False)
        if error is None:
            return response
        said = _what_it_says(response.extensions.get("said", b""))
        message = f"{error}{f': {said}' if said else ''}"
        if isinstance(error, PathNotFound):
            raise InvalidData(message)
        error.args = (message,)
        raise error

    def _not_allowed(self, response: httpx.Response, data: bytes = b"") -> InvalidConfiguration:
        said = _what_it_says(data or response.extensions.get("said", b""))
        who = f"as {self._credentials.username!r}" if self._credentials else "without a password"
        return InvalidConfiguration(
            f"{self.name}: not allowed to push {self._reference.repository} {who} ({response.status_code}"
            f"{f', {said}' if said else ''}): `docker login {self._reference.host}` or podman's stores one"
        )

    def _location(self, response: httpx.Response) -> httpx.URL:
        location = response.headers.get("Location")
        if not location:
            raise InvalidData(f"{self.name}: upload: expected a Location, there is none")
        try:
            url = response.url.join(location)
        except httpx.InvalidURL as error:
            raise InvalidData(f"{self.name}: upload: {location!r} is no URL") from error
        if url.scheme != "https" and not self._plain_http:
            raise InvalidData(f"{self.name}: upload: expected an https:// URL to go on, got {url}")
        return url

    def _compare(self, response: httpx.Response, digest: Digest) -> None:
        said = response.headers.get("Docker-Content-Digest", str(digest))
        if said != str(digest):
            raise InvalidData(f"{self.name}: expected it to have {digest}, it says {said}")


class _Unauthorised(Exception):
    def __init__(self, response: httpx.Response) -> None:
        self.response = response


async def _body(response: httpx.Response, limit: int) -> bytes:
    gathered = b""
    try:
        async for piece in response.aiter_bytes():
            gathered += piece
            if len(gathered) > limit:
                break
    finally:
        await response.aclose()
    return gathered[:limit]


def _what_it_says(data: bytes) -> str:
    try:
        errors = _Errors.model_validate_json(data).errors
    except ValidationError:
        return ""
    said = "; ".join(error.message or error.code.lower() for error in errors)
    return "".join(letter if letter.isprintable() else " " for letter in said)[:_SHOWN]
