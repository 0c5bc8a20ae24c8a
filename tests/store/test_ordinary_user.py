"""Everything works without privileges, too."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.store.local_store import LocalStore
from fusesnap.store.tree_reader import nar_events

Make = Callable[..., Any]
Commit = Callable[..., StorePath]

NOBODY = 65534
TREE = {"d": {"e": {"f": b"1"}}, "f": b"2", "l": "d", "x": (b"3",)}


@contextmanager
def unprivileged() -> Iterator[int]:
    """Drop root's privileges, where there are any; give the user that is left."""
    user = os.geteuid() or NOBODY
    before = os.geteuid()
    if before == 0:
        os.seteuid(user)
    try:
        yield user
    finally:
        if before == 0:
            os.seteuid(before)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that an ordinary user owns and reaches."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, -1)
        yield Path(name)


def test_a_store_of_an_ordinary_user(
    home: Path, make: Make, commit: Commit, content: Callable[..., None]
) -> None:
    closure = [make("top", TREE, ["leaf", "top"]), make("leaf", {}), make("file", b"f")]
    with (
        unprivileged() as user,
        LocalStore.open(home / "state", StoreDir(), clock=lambda: 1) as store,
    ):
        assert not store.overlay_ready
        for made in closure:
            location = store.location(commit(store, made))
            assert b"".join(nar_bytes(nar_events(location))) == b"".join(nar_bytes(made[1]))
            assert location.stat().st_uid == user
        top = store.location(closure[0][0].store_path)
        for directory in (top, top / "d", top / "d" / "e"):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o555
            assert directory.stat().st_mtime_ns == STORE_MTIME_NS
        assert store.counts().valid == 3
    content(store.nix_url, home, None if os.geteuid() else NOBODY)


def test_an_ordinary_user_can_throw_a_sealed_tree_away(home: Path, make: Make) -> None:
    info, events = make("left", TREE)
    with unprivileged(), LocalStore.open(home / "state", StoreDir(), clock=lambda: 1) as store:
        with store.stage(store.pin(info)) as staged:
            for event in events:
                staged.receive(event)
            sealed = staged.location / "d"
            with pytest.raises(PermissionError):
                (sealed / "new").mkdir()
        assert list((home / "state" / "staging").iterdir()) == []


def test_an_ordinary_user_recovers(home: Path, make: Make) -> None:
    with unprivileged():
        LocalStore.open(home / "state", StoreDir(), clock=lambda: 1).close()
        staging, real = home / "state" / "staging", home / "state" / "layer" / ".fusesnap-store"
        unknown = real / make("unknown")[0].store_path.base_name
        for directory in (staging / "leftover", unknown):
            (directory / "d").mkdir(parents=True)
            (directory / "d" / "f").write_bytes(b"")
            (directory / "d").chmod(0o555)
        unknown.chmod(0o555)
        with LocalStore.open(home / "state", StoreDir(), clock=lambda: 1) as store:
            assert store.recovered.staging_removed == 1
            assert store.recovered.unknown_removed == 1
        assert list(staging.iterdir()) == []
        assert list(real.iterdir()) == []
