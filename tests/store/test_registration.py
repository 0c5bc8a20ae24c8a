from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.store.nix_database import Registrar

Make = Callable[..., Any]
Commit = Callable[..., StorePath]

GRAPH: dict[str, Sequence[str]] = {
    "top": ["left", "right", "top"],
    "left": ["leaf", "self"],
    "right": ["leaf"],
    "self": ["self"],
    "leaf": [],
}


def names(paths: Sequence[StorePath]) -> list[str]:
    return sorted(path.name for path in paths)


def test_a_path_is_valid_when_its_closure_is_complete(
    store: LocalStore, make: Make, commit: Commit
) -> None:
    made = {name: make(name, None, references) for name, references in GRAPH.items()}
    steps = [("top", 0), ("leaf", 1), ("left", 1), ("right", 2), ("self", 5)]
    for name, valid in steps:
        path = commit(store, made[name])
        assert store.counts().valid == valid
        assert store.is_committed(path)
    top = made["top"][0].store_path
    info = store.valid_path_info(top)
    assert info is not None
    assert info.references == made["top"][0].references
    assert info.nar_hash == made["top"][0].nar_hash
    assert info.nar_size == made["top"][0].nar_size
    assert info.registration_time == 1_700_000_000
    assert not info.ultimate
    assert names(store.valid_closure(top)) == sorted(GRAPH)
    assert names(store.valid_closure(made["right"][0].store_path)) == ["leaf", "right"]


def test_every_order_ends_with_everything_valid(
    opened: Callable[[], LocalStore], make: Make, commit: Commit
) -> None:
    store = opened()
    for number, order in enumerate(permutations(GRAPH)):
        for name in order:
            references = [f"{reference}-{number}" for reference in GRAPH[name]]
            commit(store, make(f"{name}-{number}", b"", references))
        assert store.counts().valid == len(GRAPH) * (number + 1), order


def test_paths_that_refer_to_each_other_never_become_valid(
    store: LocalStore, make: Make, commit: Commit, verify_clean: Callable[[LocalStore], None]
) -> None:
    """Nix knows no such cycle; a narinfo could claim one."""
    commit(store, make("a", None, ["b"]))
    commit(store, make("b", None, ["a"]))
    assert store.counts().valid == 0
    assert store.counts().committed == 2
    verify_clean(store)


def test_the_closure_of_an_invalid_path_is_empty(store: LocalStore, make: Make) -> None:
    assert store.valid_closure(make("no")[0].store_path) == []
    assert store.valid_path_info(make("no")[0].store_path) is None


@pytest.mark.parametrize("order", ["sorted", "reverse", "shuffled"])
def test_the_cost_is_linear_in_the_number_of_references(
    store: LocalStore,
    make: Make,
    commit: Commit,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
) -> None:
    """A path that refers to everything, committed first, is looked at with each of its references."""
    count = 150
    leaves = [make(f"leaf-{number}", b"") for number in range(count)]
    leaves.sort(key=lambda made: made[0].store_path, reverse=order == "reverse")
    if order == "shuffled":
        random.Random(1).shuffle(leaves)  # noqa: S311
    commit(store, make("root", b"", [f"leaf-{number}" for number in range(count)]))
    asked = 0
    original = Registrar.is_valid

    def counting(self: Registrar, base_name: str) -> bool:
        nonlocal asked
        asked += 1
        return original(self, base_name)

    monkeypatch.setattr(Registrar, "is_valid", counting)
    for made in leaves:
        commit(store, made)
    assert store.counts().valid == count + 1
    assert asked <= 6 * count


def test_a_reference_that_became_invalid_meanwhile_is_waited_for_again(
    store: LocalStore, make: Make, commit: Commit
) -> None:
    leaves = [make(f"leaf-{number}", b"") for number in range(3)]
    leaves.sort(key=lambda made: made[0].store_path)
    root = make("root", b"", ["leaf-0", "leaf-1", "leaf-2"])
    commit(store, root)
    commit(store, leaves[0])
    commit(store, leaves[1])
    with store._target.nix.registering() as registrar:  # as Nix's garbage collector does
        assert len(registrar.invalidate(leaves[0][0].store_path.base_name)) == 1
    commit(store, leaves[2])
    assert store.valid_path_info(root[0].store_path) is None
    commit(store, leaves[0])
    assert store.valid_path_info(root[0].store_path) is not None


def test_a_broken_content_address_is_not_handed_to_nix(
    store: LocalStore, make: Make, commit: Commit, verify_clean: Callable[[LocalStore], None]
) -> None:
    info, events = make("odd")
    path = commit(store, (replace(info, ca="fixed:nonsense"), events))
    valid = store.valid_path_info(path)
    assert valid is not None
    assert valid.ca is None
    verify_clean(store)
