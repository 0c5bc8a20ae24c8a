from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusesnap.errors import ContentMismatch, InvalidData, StorageFailure
from fusesnap.nix.nar import DirectoryStart, NarEnd, NarEvent, RegularFile, Symlink, nar_bytes
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import STORE_MTIME_NS, TreeBuilder
from fusesnap.store.local_store import LocalStore
from fusesnap.store.locks import try_flock
from fusesnap.store.staging import StagedPath
from fusesnap.store.tree_reader import nar_events, scan_tree

Make = Callable[..., Any]
Commit = Callable[..., StorePath]

EVERYTHING = {
    "bin": {"tool": (b"#!/bin/sh\n",), "other": "tool"},
    "dangling": "/no/where",
    "empty": {},
    "none": b"",
    "share": {"text": b"text", "page": b"x" * 4096, "large": bytes(700_000)},
    "not utf-8 \udcff": b"name",
}


def staging_of(store: LocalStore) -> list[Path]:
    return list((store.layer.parent / "staging").iterdir())


def shape(location: Path) -> list[tuple[str, int, float, int]]:
    paths = [location, *sorted(location.rglob("*"))]
    return [
        (str(path.relative_to(location)), status.st_mode, status.st_mtime_ns, status.st_uid)
        for path in paths
        for status in [path.lstat()]
    ]


def test_a_committed_path_has_its_nar_and_canonical_metadata(
    store: LocalStore, make: Make, commit: Commit
) -> None:
    made = make("everything", EVERYTHING)
    path = commit(store, made)
    assert store.is_committed(path)
    assert b"".join(nar_bytes(nar_events(store.location(path)))) == b"".join(nar_bytes(made[1]))
    for name, mode, mtime, owner in shape(store.location(path)):
        expected = {
            stat.S_IFDIR: 0o555,
            stat.S_IFLNK: 0o777,
            stat.S_IFREG: 0o555 if name == "bin/tool" else 0o444,
        }
        assert stat.S_IMODE(mode) == expected[stat.S_IFMT(mode)], name
        assert (mtime, owner) == (STORE_MTIME_NS, os.geteuid()), name
    assert staging_of(store) == []


def test_the_umask_does_not_show(store: LocalStore, make: Make, commit: Commit) -> None:
    before = os.umask(0o077)
    try:
        path = commit(store, make("masked", {"d": {"f": b"1", "x": (b"2",)}}))
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(mode) for _, mode, _, _ in shape(store.location(path))]
    assert modes == [0o555, 0o555, 0o444, 0o555]


@pytest.mark.parametrize("tree", [b"file", (b"program",), "link", {}], ids=repr)
def test_a_path_may_be_of_any_kind(
    store: LocalStore, make: Make, commit: Commit, tree: object
) -> None:
    made = make("kind", tree)
    location = store.location(commit(store, made))
    assert b"".join(nar_bytes(nar_events(location))) == b"".join(nar_bytes(made[1]))
    assert location.lstat().st_mtime_ns == STORE_MTIME_NS


_names = st.binary(min_size=1, max_size=9).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"0").replace(b".", b"-")
)
_leaves = st.binary(max_size=40) | st.tuples(st.binary(max_size=40)) | st.just("target")
_trees = st.recursive(
    _leaves,
    lambda trees: st.dictionaries(_names.map(os.fsdecode), trees, max_size=4),
    max_leaves=8,
)


@given(tree=_trees)
@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_goes_in_comes_out(
    store: LocalStore, make: Make, commit: Commit, tree: object
) -> None:
    info, events = make(f"any-{store.counts().committed}", tree)
    location = store.location(commit(store, (info, events)))
    assert b"".join(nar_bytes(nar_events(location))) == b"".join(nar_bytes(events))
    builder = TreeBuilder()
    for event in events:
        builder.receive(event)
    assert list(scan_tree(location).entries) == list(builder.tree().entries)


def test_leaving_without_commit_leaves_nothing(store: LocalStore, make: Make) -> None:
    info, events = make("left", EVERYTHING)
    for end in range(len(events)):
        with store.stage(store.pin(info)) as staged:
            for event in events[:end]:
                staged.receive(event)
        assert staging_of(store) == []
    assert not store.is_committed(info.store_path)
    assert list(store.real.iterdir()) == []


def test_leaving_by_an_error_raises_that_error(store: LocalStore, make: Make) -> None:
    info, events = make("left", EVERYTHING)
    with pytest.raises(KeyError, match="mine"), store.stage(store.pin(info)) as staged:
        for event in events[:7]:
            staged.receive(event)
        raise KeyError("mine")
    assert staging_of(store) == []


def test_no_commit_before_the_end_of_the_nar(store: LocalStore, make: Make) -> None:
    info, events = make("early", b"contents")
    with store.stage(store.pin(info)) as staged:
        for event in events[:-1]:
            staged.receive(event)
        with pytest.raises(InvalidData, match="early: commit before the end"):
            staged.commit()
    assert not store.is_committed(info.store_path)


def receive_all(staged: StagedPath, events: list[NarEvent]) -> None:
    for event in events:
        staged.receive(event)


@pytest.mark.parametrize(
    "second", [DirectoryStart(b"a"), RegularFile(b"a", 1, executable=False, offset=0)], ids=repr
)
def test_a_link_in_the_nar_is_never_followed(
    store: LocalStore, make: Make, tmp_path: Path, second: NarEvent
) -> None:
    """The parser refuses such a NAR; the writer holds by itself."""
    outside = tmp_path / "outside"
    outside.mkdir()
    info, _ = make("hostile")
    hostile: list[NarEvent] = [DirectoryStart(b""), Symlink(b"a", os.fsencode(outside)), second]
    with store.stage(store.pin(info)) as staged, pytest.raises(StorageFailure) as caught:
        receive_all(staged, hostile)
    assert caught.value.errno == 17
    assert "File exists" in str(caught.value)
    assert info.store_path.base_name in str(caught.value)
    assert list(outside.iterdir()) == []
    assert staging_of(store) == []


def test_deeper_than_a_path_may_be_long(store: LocalStore, make: Make, commit: Commit) -> None:
    for depth in (40, 200):  # flushed one by one, and all at once
        tree: object = b"bottom"
        for _ in range(depth):
            tree = {"d" * 200: tree}
        info, events = make(f"deep-{depth}", tree)
        location = store.location(commit(store, (info, events)))
        assert list(nar_events(location)) == events
        with store.stage(store.pin(replace(info, store_path=StorePath("0" * 32, "b")))) as staged:
            receive_all(staged, events)
        assert staging_of(store) == []


def test_a_second_committer_finds_it_there(store: LocalStore, make: Make, commit: Commit) -> None:
    made = make("twice", EVERYTHING)
    path = commit(store, made)
    before = store.location(path).stat()
    commit(store, made)
    assert store.location(path).stat().st_ino == before.st_ino
    assert staging_of(store) == []
    assert store.counts().committed == 1


def test_another_nar_of_a_committed_path_is_refused(
    store: LocalStore, make: Make, commit: Commit
) -> None:
    path = commit(store, make("twice", b"one"))
    with pytest.raises(ContentMismatch, match="twice is in the store with NAR hash sha256:"):
        commit(store, make("twice", b"other"))
    assert store.location(path).read_bytes() == b"one"
    pin = store.pinned(path)
    assert pin is not None
    assert pin.info == make("twice", b"one")[0]


def test_many_threads_commit_the_same_paths_at_once(
    store: LocalStore, make: Make, commit: Commit, verify_clean: Callable[[LocalStore], None]
) -> None:
    closure = [
        make("a", {"f": b"a"}, ["b", "a"]),
        make("b", {"f": b"b"}, ["c", "d"]),
        make("c", b"c"),
        make("d", {}, ["c"]),
    ]
    start = threading.Barrier(6)
    failures: list[BaseException] = []

    def work(shift: int) -> None:
        start.wait()
        try:
            for made in closure[shift:] + closure[:shift]:
                commit(store, made)
        except BaseException as error:  # noqa: BLE001 - of a thread; raised below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number % 4,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.counts().valid == 4
    assert sorted(path.name for path in store.real.iterdir()) == sorted(
        info.store_path.base_name for info, _ in closure
    )
    verify_clean(store)


def test_what_nobody_finished_gives_way(
    store: LocalStore, make: Make, commit: Commit, caplog: pytest.LogCaptureFixture
) -> None:
    made = make("unknown", {"f": b"good"})
    location = store.location(made[0].store_path)
    location.mkdir()
    (location / "f").write_bytes(b"half")
    location.chmod(0o555)
    assert not store.is_committed(made[0].store_path)
    commit(store, made)
    assert (location / "f").read_bytes() == b"good"
    assert f"removing {location}: neither recorded nor valid" in caplog.text
    assert staging_of(store) == []


def test_a_name_as_long_as_may_be(store: LocalStore, make: Make, commit: Commit) -> None:
    path = commit(store, make("n" * 211, {"f": b""}))
    assert store.is_committed(path)


def test_a_staging_directory_that_a_start_took_is_given_up(
    store: LocalStore, make: Make, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made and not locked yet, so it looked like a leftover."""
    tried: list[int] = []

    def lose_twice(descriptor: int) -> bool:
        tried.append(descriptor)
        made = Path(f"/proc/self/fd/{descriptor}").readlink()
        if len(tried) == 1:  # removed before it was locked
            made.rmdir()
        return len(tried) != 2 and try_flock(descriptor)  # and locked by another

    monkeypatch.setattr("fusesnap.store.staging.try_flock", lose_twice)
    assert store.is_committed(commit(store, make("a")))
    assert len(tried) == 3


def test_an_empty_nar_end_only_is_no_path(store: LocalStore, make: Make) -> None:
    info, _ = make("nothing")
    with store.stage(store.pin(info)) as staged:
        staged.receive(NarEnd())
        with pytest.raises(StorageFailure, match="cannot flush"):
            staged.commit()
    assert not store.is_committed(info.store_path)
