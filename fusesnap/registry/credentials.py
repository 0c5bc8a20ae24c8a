"""Passwords for registries, as Docker keeps them: in its configuration, or with helpers that it names.

Sources: ``docker login`` in Docker's manual, "Credential stores" and "Credential helpers";
https://github.com/docker/docker-credential-helpers; containers-auth.json(5), which has the same form.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusesnap.errors import InvalidConfiguration
from fusesnap.nix.quoting import quote
from fusesnap.registry.reference import DOCKER_HUB

HELPER_TIMEOUT: Final = 60.0  # seconds; a person may be asked for a password
_MAX_CONFIG: Final = 4 * 1024 * 1024
_HELPER: Final = re.compile(r"[0-9A-Za-z_.-]{1,100}", re.ASCII)
# What Docker calls its own registry in these files.
_HUB_KEYS: Final = (
    "https://index.docker.io/v1/",
    "index.docker.io",
    DOCKER_HUB,
    "registry-1.docker.io",
)
# A helper gives this for a name where the secret is a token to get tokens with.
_TOKEN_USER: Final = "<token>"  # noqa: S105 - no secret
_NOT_FOUND: Final = "credentials not found"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and a password; or ``identity_token``, with which tokens are asked for."""

    username: str
    password: str = ""
    identity_token: str | None = None

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, ...)"  # secrets are in no log


class _Auth(BaseModel):
    model_config = ConfigDict(extra="ignore")

    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identity_token: str | None = Field(alias="identitytoken", default=None)


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore")

    auths: dict[str, _Auth] = Field(default_factory=dict)
    store: str | None = Field(alias="credsStore", default=None)
    helpers: dict[str, str] = Field(alias="credHelpers", default_factory=dict)


class _HelperAnswer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    username: str = Field(alias="Username")
    secret: str = Field(alias="Secret")


async def find_credentials(host: str, files: Sequence[Path]) -> Credentials | None:
    """Look for a registry's credentials in each of ``files``, in this order; None where there are none.

    Raises InvalidConfiguration, naming file or helper, for what cannot be read.
    """
    for file in files:
        config = await trio.to_thread.run_sync(_read, file)
        if config is not None and (found := await _in(config, host, file)) is not None:
            return found
    return None


def _read(file: Path) -> _Config | None:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_CONFIG + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidConfiguration(f"{file}: {error.strerror}") from error
    if len(data) > _MAX_CONFIG:
        raise InvalidConfiguration(f"{file}: expected at most {_MAX_CONFIG} bytes")
    try:
        return _Config.model_validate_json(data)
    except ValidationError as error:
        # What is in it is secret, and so not shown.
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidConfiguration(f"{file}: {where}: {first['msg']}") from None


async def _in(config: _Config, host: str, file: Path) -> Credentials | None:
    keys = _HUB_KEYS if host == DOCKER_HUB else (host, f"https://{host}", f"http://{host}")
    for key, helper in config.helpers.items():
        if _host(key) in map(_host, keys):
            return await _ask(helper, key, file)
    if config.store:
        for key in _HUB_KEYS[:1] if host == DOCKER_HUB else keys[:2]:
            if (found := await _ask(config.store, key, file)) is not None:
                return found
    for key, auth in config.auths.items():
        if _host(key) in map(_host, keys) and (found := _stored(auth, key, file)) is not None:
            return found
    return None


def _host(key: str) -> str:
    """A key without scheme and path, which Docker has written in several forms."""
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _stored(auth: _Auth, key: str, file: Path) -> Credentials | None:
    if auth.identity_token:
        return Credentials(auth.username or "", identity_token=auth.identity_token)
    if auth.auth:
        try:
            text = base64.b64decode(auth.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise InvalidConfiguration(f"{file}: auths.{key}.auth: expected base64") from None
        name, colon, password = text.partition(":")
        if not colon:
            raise InvalidConfiguration(
                f"{file}: auths.{key}.auth: expected a name, ':' and a password"
            )
        return Credentials(name, password.rstrip("\0"))
    if auth.username and auth.password:
        return Credentials(auth.username, auth.password)
    return None


async def _ask(helper: str, key: str, file: Path) -> Credentials | None:
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise InvalidConfiguration(
            f"{file}: {quote(helper)} is not the name of a credential helper"
        )
    try:
        with trio.fail_after(HELPER_TIMEOUT):
            done = await trio.run_process(
                [program, "get"],
                stdin=key.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except trio.TooSlowError as error:
        raise InvalidConfiguration(f"{program}: no answer within {HELPER_TIMEOUT:g} s") from error
    except OSError as error:
        raise InvalidConfiguration(f"{file} names {program}: {error.strerror}") from error
    return _answer(program, key, done)


def _answer(program: str, key: str, done: subprocess.CompletedProcess[bytes]) -> Credentials | None:
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        if _NOT_FOUND in said:
            return None
        raise InvalidConfiguration(f"{program} get {key}: {said or f'status {done.returncode}'}")
    try:
        answer = _HelperAnswer.model_validate(json.loads(done.stdout))
    except (ValidationError, ValueError):
        raise InvalidConfiguration(
            f"{program} get {key}: expected Username and Secret in JSON"
        ) from None
    if answer.username == _TOKEN_USER:
        return Credentials("", identity_token=answer.secret)
    return Credentials(answer.username, answer.secret)
