from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.local_store import LocalStore, StoreCounts

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Open = Callable[[], LocalStore]


def test_the_layout(store: LocalStore, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert store.layer == state / "layer"
    assert store.real == state / "layer" / ".fusesnap-store"
    assert list(store.layer.iterdir()) == [store.real]
    assert sorted(path.name for path in state.iterdir() if "sqlite" not in path.name) == [
        "ballast", "layer", "nix", "staging",
    ]  # fmt: skip
    assert (state / "nix/gcroots/profiles").readlink() == state / "nix/profiles"
    assert stat.S_IMODE((state / "staging").stat().st_mode) == 0o700
    assert store.nix_url == (
        f"local?store=/nix/store&real={store.real}&state={state}/nix&log={state}/log"
    )


def test_the_store_directory_is_opaque_to_overlay_where_that_is_allowed(store: LocalStore) -> None:
    assert store.overlay_ready
    assert os.getxattr(store.real, "trusted.overlay.opaque") == b"y"


def test_a_file_system_without_attributes_is_said(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    assert not opened().overlay_ready


def test_a_failing_attribute_is_not_taken_for_one_that_is_not_allowed(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "setxattr", fail)
    with pytest.raises(StorageFailure, match=r"cannot set trusted\.overlay\.opaque on"):
        opened()


def test_a_link_on_the_way_is_resolved(tmp_path: Path, make: Make, commit: Commit) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with LocalStore.open(tmp_path / "link" / "state", StoreDir(), clock=lambda: 1) as store:
        assert store.real == tmp_path / "real/state/layer/.fusesnap-store"


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailure, match=r"cannot create .*/file/state: Not a directory"):
        LocalStore.open(tmp_path / "file" / "state", StoreDir(), clock=lambda: 1)


def test_two_stores_on_one_state_see_each_other(opened: Open, make: Make, commit: Commit) -> None:
    one, other = opened(), opened()
    a, b = make("a", None, ["b"]), make("b")
    path = commit(one, a)
    assert other.is_committed(path)
    assert other.pin(a[0]) == one.pin(a[0]) == other.pin_of(1)
    commit(other, b)
    assert one.counts() == other.counts() == StoreCounts(committed=2, valid=2, pinned=0)
    assert one.valid_closure(path) == sorted([path, b[0].store_path])


def test_many_open_a_new_state_at_once(opened: Open) -> None:
    start = threading.Barrier(6)
    stores: list[LocalStore] = []

    def work() -> None:
        start.wait()
        stores.append(opened())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.counts() for store in stores] == [StoreCounts(0, 0, 0)] * 6


def test_committed_among(store: LocalStore, make: Make, commit: Commit) -> None:
    a, b, c = (make(name)[0].store_path for name in "abc")
    assert store.committed_among([a, b, c]) == set()
    commit(store, make("a"))
    commit(store, make("b"))
    for _ in range(2):
        assert store.committed_among(iter([a, b, c])) == {a, b}
    store.location(a).unlink()
    assert store.committed_among([a, b, c]) == {b}
    assert not store.is_committed(a)


def test_a_name_in_the_store_directory_is_not_enough(store: LocalStore, make: Make) -> None:
    path = make("half")[0].store_path
    store.location(path).mkdir()
    assert not store.is_committed(path)


def test_counts(store: LocalStore, make: Make, commit: Commit) -> None:
    commit(store, make("a", None, ["b"]))
    store.pins([make("b")[0], make("c")[0]])
    assert store.counts() == StoreCounts(committed=1, valid=0, pinned=2)
    commit(store, make("b"))
    assert store.counts() == StoreCounts(committed=2, valid=2, pinned=1)


def test_a_closed_store_says_so(opened: Open, make: Make) -> None:
    store = opened()
    store.close()
    store.close()
    with pytest.raises(StorageFailure, match="closed"):
        store.pin(make("a")[0])


def test_opening_fails_without_leaving_anything_open(tmp_path: Path) -> None:
    (tmp_path / "state/nix/db").mkdir(parents=True)
    (tmp_path / "state/nix/db/schema").write_text("9")
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with pytest.raises(Exception, match="version '9'"):
        LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: 1)
    assert len(list(descriptors.iterdir())) == before
