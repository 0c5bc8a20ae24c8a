"""What a registry wants to see before it takes anything: a password, or a token that somebody else gives for it."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from fusesnap.errors import InvalidConfiguration, InvalidData
from fusesnap.nix.quoting import quote
from fusesnap.registry.credentials import Credentials

# A token is a signed list of rights; those of clouds have some KiB.
MAX_TOKEN_ANSWER: Final = 256 * 1024
# RFC 9110, 11.2: parameters are tokens or quoted strings.
_PARAMETER: Final = re.compile(
    r'([0-9A-Za-z_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', re.ASCII
)


@dataclass(frozen=True, slots=True)
class Challenge:
    """A ``WWW-Authenticate``: ``scheme`` in small letters, parameters by name."""

    scheme: str
    parameters: dict[str, str]


class _TokenAnswer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    token: str | None = None
    access_token: str | None = None


def parse_challenges(response: httpx.Response) -> list[Challenge]:
    """Read what a 401 asks for, a challenge a header."""
    found = []
    for header in response.headers.get_list("WWW-Authenticate"):
        scheme, _, rest = header.strip().partition(" ")
        parameters = {
            name.lower(): re.sub(r"\\(.)", r"\1", quoted) if quoted or not plain else plain
            for name, quoted, plain in _PARAMETER.findall(rest)
        }
        found.append(Challenge(scheme.lower(), parameters))
    return found


def basic(credentials: Credentials) -> str:
    """Return the header that carries a name and a password."""
    pair = f"{credentials.username}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def token_request(
    client: httpx.AsyncClient,
    challenge: Challenge,
    scope: str,
    credentials: Credentials | None,
    where: str,
    *,
    plain_http: bool,
) -> httpx.Request:
    """Make the request for a token that ``challenge`` describes.

    Raises InvalidData for a challenge that names nobody to ask, and InvalidConfiguration where a password would go over
    the network in the clear.
    """
    realm = challenge.parameters.get("realm", "")
    try:
        url = httpx.URL(realm)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("https", "http") or not url.host:
        raise InvalidData(f"{where}: expected a URL as realm of its challenge, got {quote(realm)}")
    if url.scheme == "http" and not plain_http:
        raise InvalidConfiguration(
            f"{where}: tokens are given at {realm}, without TLS: --plain-http allows it"
        )
    asked = {"service": challenge.parameters.get("service", ""), "scope": scope}
    if credentials is not None and credentials.identity_token is not None:
        form = {
            "grant_type": "refresh_token",
            "client_id": "fusesnap",
            "refresh_token": credentials.identity_token,
            **asked,
        }
        return client.build_request("POST", url, data=form)
    headers = {"Authorization": basic(credentials)} if credentials is not None else {}
    return client.build_request("GET", url.copy_merge_params(asked), headers=headers)


def read_token(data: bytes, where: str) -> str:
    """Read the answer to a request for a token. Raises InvalidData."""
    try:
        answer = _TokenAnswer.model_validate_json(data)
    except ValidationError as error:
        raise InvalidData(f"{where}: expected a token in JSON") from error
    token = answer.token or answer.access_token
    if not token or not token.isascii() or not token.isprintable():
        raise InvalidData(f"{where}: expected a token, there is none")
    return token
