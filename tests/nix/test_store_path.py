from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.hash import NIX32_ALPHABET
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath

HASH = "00000000000000000000000000000000"
hash_parts = st.text(alphabet=NIX32_ALPHABET, min_size=32, max_size=32)
names = st.from_regex(r"[0-9A-Za-z+_?=][0-9A-Za-z+\-._?=]{0,210}", fullmatch=True)
paths = st.builds(StorePath, hash_parts, names)


@given(paths)
def test_round_trip(path: StorePath) -> None:
    assert StorePath.parse_base_name(path.base_name) == path
    store_dir = StoreDir()
    assert store_dir.parse(store_dir.format(path)) == path
    assert str(path) == path.base_name


@given(paths, paths)
def test_order_is_that_of_base_names(left: StorePath, right: StorePath) -> None:
    assert (left < right) == (left.base_name < right.base_name)


@pytest.mark.parametrize("name", [".hidden", "...", "..a", ".a-b", "a" * 211, "?=+-._", "-"])
def test_unusual_names_are_taken(name: str) -> None:
    assert StorePath.parse_base_name(f"{HASH}-{name}").name == name


@pytest.mark.parametrize(
    ("base_name", "message"),
    [
        ("", "is not a store path's base name"),
        (HASH, "is not a store path's base name"),
        (f"{HASH}_a", "is not a store path's base name"),
        (f"{HASH}-", "is empty"),
        (f"{'e' * 32}-a", "hash part 'eeee.*is not 32 characters of 0123"),
        (f"{'A' * 32}-a", "hash part"),
        (f"{HASH}-{'a' * 212}", "has 212 characters, expected at most 211"),
        (f"{HASH}-a b", "has the character ' '"),
        (f"{HASH}-a/b", "has the character '/'"),
        (f"{HASH}-a\n", r"has the character '\\n'"),
        (f"{HASH}-\u0661", "has the character '\u0661'"),
        (f"{HASH}-.", "component '.' or '..', which Nix refuses"),
        (f"{HASH}-..", "component '.' or '..'"),
        (f"{HASH}-.-a", "component '.' or '..'"),
        (f"{HASH}-..-a", "component '.' or '..'"),
    ],
)
def test_bad_base_names_are_refused(base_name: str, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        StorePath.parse_base_name(base_name)


@pytest.mark.parametrize(
    "text",
    [
        f"{HASH}-a",
        f"/{HASH}-a",
        f"nix/store/{HASH}-a",
        f"/nix/store/{HASH}-a/",
        f"/nix/store/{HASH}-a/bin",
        f"/nix/store//{HASH}-a",
        f"/nix/store/../store/{HASH}-a",
        f"/gnu/store/{HASH}-a",
        f" /nix/store/{HASH}-a",
        "/nix/store/",
        "/nix/store",
        "",
    ],
)
def test_only_store_paths_of_this_directory_are_taken(text: str) -> None:
    with pytest.raises(InvalidData, match=r"is not a store path"):
        StoreDir().parse(text)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "nix/store",
        "/nix/store/",
        "/nix//store",
        "/nix/../store",
        "/nix/./s",
        "/a b",
        "/a:b",
    ],
)
def test_bad_store_directories_are_refused(path: str) -> None:
    with pytest.raises(InvalidData, match="is not an absolute, normalised path"):
        StoreDir(path)


def test_other_store_directories_work() -> None:
    store_dir = StoreDir("/opt/..x/store")
    path = StorePath(HASH, "a")
    assert store_dir.parse(store_dir.format(path)) == path
    assert str(store_dir) == "/opt/..x/store"


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "e" * 32, "A" * 32, "0" * 31 + "-"])
def test_what_is_no_hash_part(text: str) -> None:
    with pytest.raises(InvalidData, match="is not 32 characters of"):
        HashPart(text)


def test_a_hash_part_is_that_of_any_name() -> None:
    part = HashPart("0" * 32)
    assert part.is_of(StorePath("0" * 32, "a"))
    assert not part.is_of(StorePath("1" * 32, "a"))
    assert StoreDir().format(part) == "/nix/store/" + "0" * 32
