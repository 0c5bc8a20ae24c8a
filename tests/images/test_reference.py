from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidArgument
from fusesnap.images.reference import (
    NixReference,
    may_be_spelled,
    parse_reference,
    reference_of,
)
from fusesnap.nix.hash import NIX32_ALPHABET
from fusesnap.nix.store_path import StoreDir, StorePath

HASH = "0123456789abcdfghijklmnpqrsvwxyz"
STORE = StoreDir()
DIGEST = "sha256:" + "a" * 64

# The grammar of distribution/reference, reference.go, as far as it is about what stands behind the domain.
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
DOCKER = re.compile(rf"nix:0(?:/{COMPONENT})+")

hash_parts = st.text(NIX32_ALPHABET, min_size=32, max_size=32)
names = st.from_regex(r"(?!\.\.?(?:-|\Z))[0-9A-Za-z+\-._?=]{1,60}", fullmatch=True)


def parsed(text: str) -> NixReference:
    reference = parse_reference(text, STORE)
    assert reference is not None
    return reference


@pytest.mark.parametrize(
    "text",
    [
        "docker.io/library/redis:7",
        "redis",
        "nix:01/nix/store/x",
        "registry.example/nix:0/nix/store/x",
        "nix",
        "nix:0",
        "",
        DIGEST,
    ],
)
def test_other_references_are_not_ours(text: str) -> None:
    assert parse_reference(text, STORE) is None


@pytest.mark.parametrize(
    ("behind", "spelling", "tag", "digest"),
    [
        ("", None, None, None),
        (":latest", None, "latest", None),
        ("-redis-7.0.15", "redis-7.0.15", None, None),
        ("-redis-7.0.15:latest", "redis-7.0.15", "latest", None),
        (f"-redis@{DIGEST}", "redis", None, DIGEST),
        (f"-redis:v1@{DIGEST}", "redis", "v1", DIGEST),
        ("-gtk+3-3.24", "gtk+3-3.24", None, None),
    ],
)
def test_parts(behind: str, spelling: str | None, tag: str | None, digest: str | None) -> None:
    text = f"nix:0/nix/store/{HASH}{behind}"
    found = parsed(text)
    assert (str(found.hash_part), found.spelling, found.tag) == (HASH, spelling, tag)
    assert str(found.digest or "") == (digest or "")
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nix:0/redis:7", "'/redis' is not in /nix/store"),
        ("nix:0/nix/store", "is not in /nix/store"),
        ("nix:0/nix/store/", "'' is not 32 characters of"),
        ("nix:0/nix/store/redis-7.0.15", "'redis-7.0.15' is not 32 characters of"),
        (f"nix:0/nix/store/{HASH[:-1]}e-redis", "is not 32 characters of"),
        (f"nix:0/nix/store/{HASH.upper()}", "is not 32 characters of"),
        (f"nix:0/nix/store/{HASH}-", "expected nothing or '-' and a name behind the hash, got '-'"),
        (f"nix:0/nix/store/{HASH}x", "expected nothing or '-' and a name behind the hash"),
        (f"nix:0/nix/store/{HASH}-redis/bin/redis", "expected nothing or '-' and a name"),
        (f"nix:0/nix/store/{HASH}-redis:", "'' is not a tag"),
        (f"nix:0/nix/store/{HASH}-redis:a:b", "'a:b' is not a tag"),
        (f"nix:0/nix/store/{HASH}-redis@", "expected sha256:... or sha512:..."),
        (f"nix:0/nix/store/{HASH}-redis@sha256:1", "expected 64 lower-case hexadecimal digits"),
        (f"nix:0/nix/store/{HASH}-{'x' * 1000}", "expected at most"),
        (f"nix:0/gnu/store/{HASH}-redis", "is not in /nix/store"),
    ],
)
def test_ours_and_wrong(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_reference(text, STORE)
    assert reason in str(caught.value)


def test_another_store_directory() -> None:
    found = parse_reference(f"nix:0/gnu/store/{HASH}-redis:latest", StoreDir("/gnu/store"))
    assert found is not None
    assert found.name == f"nix:0/gnu/store/{HASH}-redis"


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("redis-7.0.15", "redis-7.0.15"),
        ("gtk+3-3.24", "gtk-3-3.24"),
        ("gtk+3-3.24", "gtk3-3.24"),
        ("libstdc++", "libstdc"),
        ("libstdc++-13", "libstdc-13"),
        ("libstdc++-13", "libstdc---13"),
        ("R-4.3", "r-4.3"),
        ("R-4.3", "R-4.3"),
        ("source?rev=1", "source-rev_1"),
        ("a..b", "a.b"),
        ("_x", "x"),
        ("_x", "_x"),
        (".hidden", "hidden"),
        ("+x", "x"),
        ("x.", "x"),
        ("a--b", "a--b"),
        ("a__b", "a__b"),
        ("+", "+"),
    ],
)
def test_spellings_of_a_name(name: str, spelling: str) -> None:
    assert may_be_spelled(name, spelling)


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("redis-7.0.15", "redis"),
        ("redis-7.0.15", "redis-7.0.16"),
        ("redis-7.0.15", "redis_7.0.15"),
        ("redis-7.0.15", "redis-7-0-15"),
        ("redis-7.0.15", "redis7.0.15"),
        ("redis-7.0.15", "Redis-7.0.15"),
        ("redis-7.0.15", "redis-7.0.15-"),
        ("redis-7.0.15", "-redis-7.0.15"),
        ("gtk+3", "gtkx3"),
        ("gtk+3", "gtk+4"),
        ("libstdc++", "libstdc-"),
        ("a__b", "a_b"),
        ("a--b", "a-b"),
        ("x", ""),
        ("+", "-"),
    ],
)
def test_other_names(name: str, spelling: str) -> None:
    assert not may_be_spelled(name, spelling)


def test_another_name_is_an_error_that_says_the_right_one() -> None:
    reference = parsed(f"nix:0/nix/store/{HASH}-redis-7.0.16:latest")
    reference.check(StorePath(HASH, "redis-7.0.16"))
    with pytest.raises(InvalidArgument) as caught:
        reference.check(StorePath(HASH, "redis-7.0.15"))
    said = str(caught.value)
    assert f"the store path of that hash is {HASH}-redis-7.0.15" in said
    assert f"not called 'redis-7.0.16'; write nix:0/nix/store/{HASH}-redis-7.0.15" in said


def test_another_hash_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="expected the store path of that hash"):
        parsed(f"nix:0/nix/store/{HASH}").check(StorePath("1" * 32, "redis"))


@given(hash_parts, names)
def test_every_path_has_a_reference_that_clients_read(hash_part: str, name: str) -> None:
    path = StorePath(hash_part, name)
    text = reference_of(path, STORE)
    assert DOCKER.fullmatch(text)
    parsed(text).check(path)
    parsed(f"nix:0{STORE.format(path)}:latest").check(path)
    parsed(f"nix:0/nix/store/{hash_part}").check(path)


def test_a_name_without_words_is_left_out() -> None:
    assert reference_of(StorePath(HASH, "="), STORE) == f"nix:0/nix/store/{HASH}"


@given(st.from_regex(COMPONENT, fullmatch=True), names)
def test_a_name_that_can_be_spelled_has_one_spelling(spelled: str, other: str) -> None:
    assert may_be_spelled(spelled[:200].rstrip("-._"), spelled[:200].rstrip("-._"))
    if other != spelled:
        assert not may_be_spelled(spelled, other)


@given(names, names)
def test_letters_and_digits_always_count(name: str, spelling: str) -> None:
    def kept(text: str) -> str:
        return "".join(c for c in text if c in string.ascii_letters + string.digits).lower()

    if kept(name) != kept(spelling):
        assert not may_be_spelled(name, spelling)


@given(st.text(max_size=80))
def test_nothing_else_escapes(text: str) -> None:
    for candidate in (text, f"nix:0/{text}", f"nix:0/nix/store/{HASH}{text}"):
        try:
            found = parse_reference(candidate, STORE)
        except InvalidArgument:
            continue
        assert found is None or str(found) == candidate
