from __future__ import annotations

import pytest

from fusesnap.errors import InvalidArgument
from fusesnap.registry.reference import RegistryReference, parse_registry_reference


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag"),
    [
        ("redis", "docker.io", "library/redis", "latest"),
        ("user/redis:7", "docker.io", "user/redis", "7"),
        ("docker.io/redis", "docker.io", "library/redis", "latest"),
        ("registry.example.org/a/b/c:v1.0", "registry.example.org", "a/b/c", "v1.0"),
        ("localhost/x", "localhost", "x", "latest"),
        ("127.0.0.1:5000/x:y", "127.0.0.1:5000", "x", "y"),
        ("[::1]:5000/x", "[::1]:5000", "x", "latest"),
        ("host:5000/a__b-c.d", "host:5000", "a__b-c.d", "latest"),
    ],
)
def test_names(text: str, host: str, repository: str, tag: str) -> None:
    assert parse_registry_reference(text) == RegistryReference(host, repository, tag)


@pytest.mark.parametrize(
    "text",
    ["", "/", "a/", "a//b", "Redis", "a:", "a:b:c", "host.example/", "host.example:x/y", "-a", "a/../b", "a b",
     "x/" * 200 + "y", "host_x.example/a", "a:" + "t" * 129],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match="expected "):
        parse_registry_reference(text)


def test_a_digest_is_the_images_own() -> None:
    with pytest.raises(InvalidArgument, match="expected a tag, got a digest"):
        parse_registry_reference(f"a@sha256:{'0' * 64}")


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("localhost:5000/x", True),
        ("127.1.2.3/x", True),
        ("[::1]/x", True),
        ("localhost.example/x", False),
        ("127.0.0.1.example/x", False),
        ("x", False),
    ],
)
def test_what_is_on_this_machine(text: str, local: bool) -> None:
    assert parse_registry_reference(text).is_local is local


def test_dockers_own_registry_has_another_name() -> None:
    assert parse_registry_reference("redis").server == "registry-1.docker.io"
    assert parse_registry_reference("a.b/redis").server == "a.b"
