"""Kinds are read from the first bytes of NARs, and fetched where that fails."""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fusesnap.errors import ClosureUnavailable
from fusesnap.fetch.kinds import KindFinder, Root
from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import EntryKind
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.memory import Fault, MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import PartsUnsupported, RetryPolicy

from ..store import conftest as made
from ..substituter.samples import KEY, TRUSTED
from .conftest import MakeRealiser

Setup = Callable[..., KindFinder]


@pytest.fixture
def cache() -> MemorySubstituter:
    return MemorySubstituter()


def publish(cache: MemorySubstituter, name: str, tree: made.Tree) -> StorePath:
    info, events = made.make_path(name, tree)
    packed = lzma.compress(b"".join(nar_bytes(events)))
    signed: NarInfo = replace(info, compression="xz", file_size=len(packed))
    signed = replace(signed, signatures=(KEY.sign(signed.fingerprint()),))
    cache.publish(signed, packed)
    return info.store_path


class Paid:
    """Counts bytes."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, count: int) -> None:
        self.count += count


@pytest.fixture
def paid() -> Paid:
    return Paid()


@pytest.fixture
def finder(
    make_realiser: MakeRealiser, store: LocalStore, cache: MemorySubstituter, paid: Paid
) -> KindFinder:
    pool = SubstituterPool(
        [cache],
        store_dir=StoreDir(),
        trusted_keys=TRUSTED,
        narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
        retry=RetryPolicy(attempts=1),
        deadline=10.0,
    )
    return KindFinder(store, pool, make_realiser(cache), paid)


@pytest.mark.parametrize("unpackers", ["threads"], indirect=True)
async def test_first_bytes(finder: KindFinder, cache: MemorySubstituter, store: LocalStore) -> None:
    trees: dict[str, made.Tree] = {
        "directory": {"big": bytes(3_000_000)},
        "file": b"x" * 100_000,
        "empty": b"",
        "program": (b"#!",),
        "link": "/nix/store/" + "x" * 4000,
    }
    paths = {name: publish(cache, name, tree) for name, tree in trees.items()}
    assert await finder.roots(paths.values()) == {
        paths["directory"]: Root(EntryKind.DIRECTORY),
        paths["file"]: Root(EntryKind.REGULAR),
        paths["empty"]: Root(EntryKind.REGULAR),
        paths["program"]: Root(EntryKind.REGULAR),
        paths["link"]: Root(EntryKind.SYMLINK, b"/nix/store/" + b"x" * 4000),
    }
    assert not any(store.is_committed(path) for path in paths.values())


@pytest.mark.parametrize("unpackers", ["threads"], indirect=True)
@pytest.mark.parametrize("parts", [True, False])
async def test_of_a_large_file_only_the_beginning_is_asked_for(
    finder: KindFinder,
    cache: MemorySubstituter,
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    parts: bool,
) -> None:
    path = publish(cache, "large", {"file": random.Random(1).randbytes(1_000_000)})  # noqa: S311
    asked: list[tuple[int, int]] = []
    part = cache.part

    def counted(info: NarInfo, start: int, end: int, *more: Any) -> Any:
        asked.append((start, end))
        if not parts:
            raise PartsUnsupported("memory://cache: whole files only")
        return part(info, start, end, *more)

    monkeypatch.setattr(cache, "part", counted)
    assert await finder.roots([path]) == {path: Root(EntryKind.DIRECTORY)}
    assert asked == [(0, 160 * 1024)]
    assert cache.requests.count("nar/large.nar") == 1
    assert not store.is_committed(path)


@pytest.mark.parametrize("unpackers", ["threads"], indirect=True)
async def test_what_comes_is_paid_for(
    finder: KindFinder, cache: MemorySubstituter, paid: Paid
) -> None:
    path = publish(cache, "large", {"file": random.Random(1).randbytes(100_000)})  # noqa: S311
    await finder.roots([path])
    assert paid.count == 64 * 1024  # the first piece says it


@pytest.mark.parametrize("unpackers", ["threads"], indirect=True)
async def test_what_is_committed_asks_nobody(
    finder: KindFinder, cache: MemorySubstituter, store: LocalStore
) -> None:
    trees: dict[str, made.Tree] = {"d": {}, "f": b"", "l": "target"}
    paths = [made.commit_path(store, made.make_path(name, tree)) for name, tree in trees.items()]
    found = await finder.roots(paths)
    assert [found[path] for path in paths] == [
        Root(EntryKind.DIRECTORY),
        Root(EntryKind.REGULAR),
        Root(EntryKind.SYMLINK, b"target"),
    ]
    assert cache.requests == []


@pytest.mark.parametrize("unpackers", ["threads"], indirect=True)
async def test_where_the_first_bytes_are_damaged_all_is_fetched(
    finder: KindFinder, cache: MemorySubstituter, store: LocalStore
) -> None:
    path = publish(cache, "directory", {"file": b"x"})
    cache.script("nar/directory.nar", Fault(after=0, error=ClosureUnavailable([])))
    assert await finder.roots([path]) == {path: Root(EntryKind.DIRECTORY)}
    assert store.is_committed(path)


@pytest.mark.parametrize("unpackers", ["threads"], indirect=True)
async def test_what_nobody_has(finder: KindFinder) -> None:
    path = made.path_named("absent")
    with pytest.raises(ClosureUnavailable, match="absent: no substituter has it"):
        await finder.roots([path])
