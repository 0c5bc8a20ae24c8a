from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import InvalidConfiguration
from fusesnap.registry import credentials
from fusesnap.registry.credentials import Credentials, find_credentials

HELPER = """#!/bin/sh
read key
echo "$0 $1 $key" >>{log}
{body}
"""


def auth(text: str = "me:secret") -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


async def found(config: Path, content: Any, host: str = "r.example:5000") -> Credentials | None:
    config.write_text(json.dumps(content))  # noqa: ASYNC240
    return await find_credentials(host, [config])


async def refused(config: Path, content: Any) -> str:
    with pytest.raises(InvalidConfiguration) as caught:
        await found(config, content)
    assert "secret" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a helper that runs a shell script; returns the log of what was asked."""

    def make(body: str, name: str = "test") -> Path:
        log = tmp_path / "asked"
        program = tmp_path / "bin" / f"docker-credential-{name}"
        program.parent.mkdir(exist_ok=True)
        program.write_text(HELPER.format(log=log, body=body))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        return log

    return make


@pytest.mark.parametrize(
    "key", ["r.example:5000", "https://r.example:5000", "http://r.example:5000/v2/"]
)
async def test_stored_passwords(config: Path, key: str) -> None:
    content = {"auths": {"other.example": auth("x:y"), key: auth("me:secret:with:colons")}}
    assert await found(config, content) == Credentials("me", "secret:with:colons")


async def test_dockers_own_registry(config: Path) -> None:
    content = {"auths": {"https://index.docker.io/v1/": auth()}}
    assert await found(config, content, "docker.io") == Credentials("me", "secret")


async def test_other_forms(config: Path) -> None:
    stored = {"username": "me", "password": "secret"}
    assert await found(config, {"auths": {"r.example:5000": stored}}) == Credentials("me", "secret")
    token = {"identitytoken": "token", "auth": ""}
    expected = Credentials("", identity_token="token")
    assert await found(config, {"auths": {"r.example:5000": token}}) == expected


@pytest.mark.parametrize(
    "content", [{}, {"auths": {}}, {"auths": {"r.example:5000": {}}}, {"x": 1}]
)
async def test_none(config: Path, content: Any) -> None:
    assert await found(config, content) is None


async def test_files_in_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("absent", "one", "two")]
    files[1].write_text(json.dumps({"auths": {"a.example": auth("one:1")}}))
    files[2].write_text(
        json.dumps({"auths": {"a.example": auth("two:2"), "b.example": auth("b:b")}})
    )
    assert await find_credentials("a.example", files) == Credentials("one", "1")
    assert await find_credentials("b.example", files) == Credentials("b", "b")


async def test_a_helper_of_one_registry(config: Path, helper: Any) -> None:
    log = helper("""echo '{"ServerURL":"x","Username":"me","Secret":"secret"}'""")
    content = {"credHelpers": {"r.example:5000": "test"}, "auths": {"r.example:5000": auth("x:y")}}
    assert await found(config, content) == Credentials("me", "secret")
    assert log.read_text().endswith("docker-credential-test get r.example:5000\n")


async def test_a_helper_of_all_registries(config: Path, helper: Any) -> None:
    helper("""echo '{"Username":"<token>","Secret":"secret"}'""")
    expected = Credentials("", identity_token="secret")
    assert await found(config, {"credsStore": "test"}) == expected


async def test_a_helper_that_knows_nothing(config: Path, helper: Any) -> None:
    log = helper("echo 'credentials not found in native keychain'; exit 1")
    content = {"credsStore": "test", "auths": {"r.example:5000": auth()}}
    assert await found(config, content) == Credentials("me", "secret")
    assert log.read_text().count("get") == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo locked >&2; exit 1", "docker-credential-test get r.example:5000: locked"),
        ("exit 3", "status 3"),
        ("echo secret", "expected Username and Secret in JSON"),
        ("""echo '{"Username":"secret"}'""", "expected Username and Secret in JSON"),
    ],
)
async def test_a_helper_that_fails(config: Path, helper: Any, body: str, reason: str) -> None:
    helper(body)
    assert reason in await refused(config, {"credHelpers": {"r.example:5000": "test"}})


async def test_a_helper_that_hangs(
    config: Path, helper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper("exec sleep 1000")
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT", 0.1)
    said = await refused(config, {"credHelpers": {"r.example:5000": "test"}})
    assert "no answer within 0.1 s" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"auths": {"r.example:5000": {"auth": "%secret"}}}, "auth: expected base64"),
        ({"auths": {"r.example:5000": auth("secret")}}, "expected a name, ':' and a password"),
        ({"auths": {"r.example:5000": {"auth": ["secret"]}}}, "valid string"),
        ({"credHelpers": {"r.example:5000": "../../bin/x"}}, "not the name of a credential helper"),
        ({"credHelpers": {"r.example:5000": "absent"}}, "docker-credential-absent: No such file"),
        (["secret"], "should be an object"),
    ],
)
async def test_what_cannot_be_read(config: Path, content: Any, reason: str) -> None:
    said = await refused(config, content)
    assert str(config) in said
    assert reason in said


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(Credentials("me", "secret", "secret"))
