from __future__ import annotations

import re

import pytest

from fusesnap.errors import InvalidData
from fusesnap.nix import closure_labels
from fusesnap.nix.closure_labels import (
    ClosureLabel,
    PathLabels,
    parse_nix_labels,
    parse_store_paths,
)
from fusesnap.nix.store_path import StoreDir, StorePath

STORE = StoreDir()
HELLO = StorePath("a" * 32, "hello-2.12")
GLIBC = StorePath("b" * 32, "glibc-2.38")
CLOSURE = "containerd.io/snapshot/nix-closure"
LAYER = "containerd.io/snapshot/nix-layer"
PATH = "containerd.io/snapshot/nix-store-path."


def full(path: StorePath) -> str:
    return STORE.format(path)


def test_closure_label() -> None:
    assert parse_nix_labels({CLOSURE: full(HELLO)}, STORE) == ClosureLabel(HELLO)


def test_numbered_labels_in_the_order_of_their_numbers_without_duplicates() -> None:
    labels = {
        LAYER: "true",
        PATH + "10": full(GLIBC),
        PATH + "2": full(HELLO),
        PATH + "11": full(HELLO),
        "containerd.io/snapshot.ref": "sha256:0",
    }
    assert parse_nix_labels(labels, STORE) == PathLabels((HELLO, GLIBC))


def test_a_nix_layer_may_stand_for_nothing() -> None:
    assert parse_nix_labels({LAYER: "true"}, STORE) == PathLabels(())


def test_the_closure_label_wins() -> None:
    labels = {CLOSURE: full(HELLO), LAYER: "true", PATH + "0": full(GLIBC)}
    assert parse_nix_labels(labels, STORE) == ClosureLabel(HELLO)


@pytest.mark.parametrize("labels", [{}, {PATH + "0": full(HELLO)}, {"other": "x"}])
def test_an_ordinary_layer(labels: dict[str, str]) -> None:
    assert parse_nix_labels(labels, STORE) is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "/nix/store",
        "/nix/store/",
        "/nix/store/" + "a" * 32,
        "/nix/store/" + "a" * 32 + "-x/bin/x",
        "/nix/store/" + "a" * 32 + "-x/",
        "/nix/store/../" + "a" * 32 + "-x",
        "/gnu/store/" + "a" * 32 + "-x",
        "a" * 32 + "-x",
        "/nix/store/" + "e" * 32 + "-x",
        "/nix/store/" + "a" * 32 + "-x\n",
        "/nix/store/" + "a" * 32 + "-" + "x" * 4096,
    ],
)
def test_a_value_that_is_not_exactly_a_store_path(value: str) -> None:
    named = re.escape(f"nix-closure: expected a store path in /nix/store, got {value[:80]!r}")
    with pytest.raises(InvalidData, match=rf"^label .*{named}"):
        parse_nix_labels({CLOSURE: value}, STORE)
    with pytest.raises(InvalidData, match=r"label .*nix-store-path\.0: "):
        parse_nix_labels({LAYER: "true", PATH + "0": value}, STORE)


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", "²", "1" * 10])
def test_a_number_that_is_none(number: str) -> None:
    with pytest.raises(InvalidData, match=r"expected a decimal number after .*nix-store-path\."):
        parse_nix_labels({LAYER: "true", PATH + number: full(HELLO)}, STORE)


def test_a_marker_that_is_not_true() -> None:
    with pytest.raises(InvalidData, match="nix-layer: expected 'true', got 'yes'"):
        parse_nix_labels({LAYER: "yes", PATH + "0": full(HELLO)}, STORE)


def test_too_many_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closure_labels, "MAX_CLOSURE_PATHS", 2)
    labels = {LAYER: "true", **{f"{PATH}{number}": full(HELLO) for number in range(3)}}
    with pytest.raises(InvalidData, match="expected at most 2 store paths, got 3"):
        parse_nix_labels(labels, STORE)


@pytest.mark.parametrize("end", ["", "\n"])
def test_store_paths_file(end: str) -> None:
    data = "\n".join([full(HELLO), full(GLIBC), full(HELLO)]) + end
    assert parse_store_paths(data.encode(), STORE) == (HELLO, GLIBC)


def test_an_empty_closure() -> None:
    assert parse_store_paths(b"", STORE) == ()


@pytest.mark.parametrize("line", [b"", b"relative", b"\xff\xfe", full(GLIBC).encode() + b"\r"])
def test_a_line_that_is_no_store_path(line: bytes) -> None:
    with pytest.raises(InvalidData, match="store-paths line 2: "):
        parse_store_paths(full(HELLO).encode() + b"\n" + line + b"\n" + b"\n", STORE)


def test_too_long_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closure_labels, "MAX_CLOSURE_PATHS", 1)
    with pytest.raises(InvalidData, match="store-paths: expected at most 1 store paths, got 2"):
        parse_store_paths(f"{full(HELLO)}\n{full(GLIBC)}\n".encode(), STORE)
    monkeypatch.setattr(closure_labels, "MAX_STORE_PATHS_SIZE", 10)
    with pytest.raises(InvalidData, match="store-paths: expected at most 10 bytes, got "):
        parse_store_paths(full(HELLO).encode(), STORE)
