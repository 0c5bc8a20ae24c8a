"""Single flight, verified before visible, and one cache after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from fusesnap.errors import (
    ClosureUnavailable,
    ContentMismatch,
    DeadlineExceeded,
    FusesnapError,
    InvalidData,
    PathNotFound,
    Unavailable,
    UntrustedPath,
)
from fusesnap.fetch.events import (
    Asked,
    Boarded,
    FetchEvent,
    Landed,
    Received,
    TransferBegun,
    Verifying,
)
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Limits
from fusesnap.fetch.scheduler import LinkLimits
from fusesnap.nix.store_path import HashPart, StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.memory import Fault, MemorySubstituter

from ..substituter.samples import KEY, Sample, sample
from .conftest import MakeRealiser


def cache_of(*samples: Sample, url: str = "memory://cache") -> MemorySubstituter:
    cache = MemorySubstituter(url)
    for each in samples:
        cache.publish(each.info, each.file)
    return cache


async def test_any_number_of_readers_share_one_transfer(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello = sample("hello", size=300_000)
    cache = cache_of(hello)
    realiser = make_realiser(cache)
    trees: list[Tree] = []

    async def read(pid: int) -> None:
        trees.append(await realiser.realise(hello.path, pid))

    async with trio.open_nursery() as nursery:
        for pid in range(50):
            nursery.start_soon(read, pid)
    assert cache.requests.count(hello.info.url) == 1
    assert len(trees) == 50
    assert trees[0].entries[0].size == 300_000
    assert store.is_committed(hello.path)
    assert realiser.flights() == []


async def test_what_is_committed_asks_nobody(make_realiser: MakeRealiser) -> None:
    hello = sample("hello")
    cache = cache_of(hello)
    await make_realiser(cache).realise(hello.path)
    cache.requests.clear()
    await make_realiser(cache).realise(hello.path)  # another process's, without a tree in memory
    assert cache.requests == []


async def test_a_reader_that_gives_up_does_not_stop_the_transfer(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello = sample("hello")
    realiser = make_realiser(cache_of(hello))
    with trio.CancelScope() as scope:
        scope.cancel()
        await realiser.realise(hello.path)
    await realiser.realise(hello.path)
    assert store.is_committed(hello.path)


def flipped(file: bytes) -> bytes:
    middle = len(file) // 2
    return file[:middle] + bytes([file[middle] ^ 1]) + file[middle + 1 :]


WRONG = {
    "flipped": (flipped, ContentMismatch),
    "cut short": (lambda file: file[:-8], FusesnapError),
    "too long": (lambda file: file + bytes(8), FusesnapError),
    "empty": (lambda file: b"", FusesnapError),
    "nonsense": (lambda file: b"\0" * len(file), InvalidData),
}


@pytest.mark.parametrize("how", WRONG)
async def test_a_nar_that_is_not_the_one_announced_is_never_visible(
    how: str, make_realiser: MakeRealiser, store: LocalStore
) -> None:
    damage, error = WRONG[how]
    hello = sample("hello", compression="none")
    cache = cache_of(Sample(hello.info, damage(hello.file)))
    with pytest.raises(error, match="memory://cache"):
        await make_realiser(cache).realise(hello.path)
    assert not store.is_committed(hello.path)
    assert not store.location(hello.path).exists()
    assert list((store.layer.parent / "staging").iterdir()) == []


async def test_where_one_cache_is_corrupt_the_other_serves(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello = sample("hello", compression="none")
    bad = cache_of(Sample(hello.info, flipped(hello.file)), url="memory://bad")
    good = cache_of(hello, url="memory://good")
    await make_realiser(bad, good).realise(hello.path)
    assert store.is_committed(hello.path)
    assert hello.info.url in bad.requests


async def test_a_transfer_that_breaks_off_is_had_from_the_next_cache(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello = sample("hello", size=500_000)
    broken = cache_of(hello, url="memory://broken")
    broken.script(hello.info.url, *[Fault(Unavailable("memory://broken: gone"), after=1000)] * 9)
    await make_realiser(broken, cache_of(hello, url="memory://other")).realise(hello.path)
    assert store.is_committed(hello.path)


async def test_a_path_of_which_nothing_was_shown_becomes_what_its_cache_has_by_now(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello, other = sample("hello"), sample("other", size=77)
    old = store.pin(hello.info)
    rebuilt = Sample(replace(other.info, store_path=hello.path), other.file).signed_by(KEY)
    tree = await make_realiser(cache_of(rebuilt)).realise(hello.path)
    pinned = store.pinned(hello.path)
    assert tree.entries[0].size == 77
    assert pinned is not None
    assert pinned.ordinal != old.ordinal
    assert pinned.info.nar_hash == rebuilt.info.nar_hash


async def test_another_nar_than_the_committed_one_is_no_substitute(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello, other = sample("hello"), sample("other", size=77)
    await make_realiser(cache_of(hello)).realise(hello.path)
    rebuilt = Sample(replace(other.info, store_path=hello.path), other.file).signed_by(KEY)
    tree = await make_realiser(cache_of(rebuilt)).realise(hello.path)
    assert tree.entries[0].size == 1000


async def test_a_cache_that_says_nothing_is_not_waited_for_for_ever(
    make_realiser: MakeRealiser, mock_clock: trio.testing.MockClock
) -> None:
    hello = sample("hello", size=500_000)
    cache = cache_of(hello)
    cache.script(hello.info.url, Fault(None, after=100_000))
    received, silent = 0, trio.Event()

    def observe(event: FetchEvent) -> None:
        nonlocal received
        if isinstance(event, Received):
            received += event.count
            if received == 100_000:
                silent.set()

    async def let_time_pass() -> None:
        await silent.wait()
        mock_clock.jump(9)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(100)  # so that the test ends if nobody has given up

    realiser = make_realiser(cache, limits=Limits(stall=8), observe=observe)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(let_time_pass)
        with (
            pytest.raises(DeadlineExceeded, match=r"no progress .* 100000 of .* memory://cache"),
            trio.fail_after(60),
        ):
            await realiser.realise(hello.path)


async def test_after_a_failure_the_next_reader_tries_again(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello = sample("hello")
    cache = cache_of(hello)
    file = cache.files.pop(hello.info.url)
    realiser = make_realiser(cache)
    with pytest.raises(FusesnapError):
        await realiser.realise(hello.path)
    cache.files[hello.info.url] = file
    await realiser.realise(hello.path)
    assert store.is_committed(hello.path)


async def test_admitting_finds_every_path_and_fetches_none(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    samples = [sample(f"path-{number}") for number in range(100)]
    cache = cache_of(*samples)
    await make_realiser(cache).admit([each.path for each in samples])
    assert not [name for name in cache.requests if name.startswith("nar/")]
    assert all(store.pinned(each.path) for each in samples)
    assert store.counts().committed == 0


async def test_what_cannot_be_had_is_named_with_what_each_cache_said(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    there, absent, unsigned = sample("there"), sample("absent"), sample("unsigned").signed_by()
    realiser = make_realiser(cache_of(there, unsigned))
    with pytest.raises(ClosureUnavailable) as caught:
        await realiser.admit([there.path, absent.path, unsigned.path])
    assert str(absent.path) in str(caught.value)
    assert str(unsigned.path) in str(caught.value)
    assert "memory://cache" in str(caught.value)
    assert str(there.path) not in str(caught.value)
    assert not caught.value.retryable
    assert store.pinned(there.path) is None


async def test_a_cache_that_is_down_makes_it_worth_trying_again(
    make_realiser: MakeRealiser,
) -> None:
    hello = sample("hello")
    cache = cache_of(hello)
    name = hello.narinfo_name
    cache.script(name, *[Fault(Unavailable("memory://cache: down"))] * 50)
    realiser = make_realiser(cache)
    with pytest.raises(ClosureUnavailable) as caught:
        await realiser.admit([hello.path])
    assert caught.value.retryable


async def test_a_closure_is_followed_through_its_references(make_realiser: MakeRealiser) -> None:
    leaf = sample("leaf")
    middle = sample("middle").but(references=(leaf.path,)).signed_by(KEY)
    own = sample("root")
    references = tuple(sorted((middle.path, own.path)))
    root = own.but(references=references).signed_by(KEY)
    closure = await make_realiser(cache_of(leaf, middle, root)).closure(root.path)
    assert closure == [root.path, middle.path, leaf.path]


@pytest.mark.parametrize("priority", Priority)
async def test_a_hint_fetches_without_anybody_waiting_in_the_order_of_its_kind(
    priority: Priority, make_realiser: MakeRealiser, store: LocalStore
) -> None:
    samples = [sample(f"path-{number}", size=10 * number + 1) for number in range(5)]
    cache = cache_of(*samples)
    realiser = make_realiser(cache, link_limits=LinkLimits(transfers=1))
    paths: list[StorePath] = [each.path for each in reversed(samples)]
    await realiser.admit(paths)
    realiser.request([*paths, *paths], priority)
    with trio.fail_after(30):
        while len(store.committed_among(paths)) < len(paths):
            await trio.testing.wait_all_tasks_blocked(0.01)
    nars = [name for name in cache.requests if name.startswith("nar/")]
    smallest_first = [each.info.url for each in samples]
    assert nars == (smallest_first[::-1] if priority.keeps_order else smallest_first)


async def test_a_path_that_nobody_has_is_not_found(make_realiser: MakeRealiser) -> None:
    with pytest.raises(PathNotFound, match="memory://cache"):
        await make_realiser(cache_of()).realise(sample("hello").path)


async def test_a_file_that_its_cache_renamed_is_had_under_its_new_name(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hello = sample("hello")
    cache = cache_of(hello)
    realiser = make_realiser(cache)
    await realiser.admit([hello.path])
    del cache.files[hello.info.url]  # its narinfo is remembered
    moved = hello.but(url="nar/moved").signed_by(KEY)
    cache.publish(moved.info, moved.file)
    await realiser.realise(hello.path)
    assert store.is_committed(hello.path)


async def test_many_hints_together_leave_half_of_the_transfers_to_readers(
    make_realiser: MakeRealiser, store: LocalStore
) -> None:
    hinted = [sample(f"path-{number}", size=200_000) for number in range(8)]
    wanted = sample("wanted")
    cache = cache_of(*hinted, wanted)
    for each in hinted:
        cache.script(each.info.url, Fault(None, after=10))  # these never end
    realiser = make_realiser(cache, link_limits=LinkLimits(transfers=4))
    await realiser.admit([each.path for each in hinted])
    for each in hinted:
        realiser.request([each.path])
    await trio.testing.wait_all_tasks_blocked(0.05)
    await realiser.realise(wanted.path)
    assert store.is_committed(wanted.path)


async def test_what_becomes_of_a_path_is_told_in_order(make_realiser: MakeRealiser) -> None:
    heard: list[FetchEvent] = []
    hello, lost = sample("hello", size=300_000), sample("lost")
    bad, good = cache_of(hello, url="memory://bad"), cache_of(hello, url="memory://good")
    bad.publish(hello.info, flipped(hello.file))
    realiser = make_realiser(bad, good, observe=heard.append)
    await realiser.realise(hello.path)
    sizes: dict[str, int] = {}
    for event in heard:
        if isinstance(event, Received):
            sizes[event.cache] = sizes.get(event.cache, 0) + event.count
    assert sizes["memory://good"] == len(hello.file)
    path, expected = hello.path, hello.info.file_size
    assert [event for event in heard if not isinstance(event, Received | Verifying)] == [
        Asked(path, Priority.READER),
        Boarded(path),
        TransferBegun(path, "memory://bad", expected),
        TransferBegun(path, "memory://good", expected),
        Landed(path),
    ]
    assert heard[-2:] == [Verifying(path), Landed(path)]
    heard.clear()
    with pytest.raises(PathNotFound) as caught:
        await realiser.realise(lost.path)
    assert heard == [
        Asked(lost.path, Priority.READER),
        Boarded(lost.path),
        Landed(lost.path, caught.value),
    ]


async def test_a_hash_part_is_resolved_by_a_cache_and_then_by_the_store(
    make_realiser: MakeRealiser,
) -> None:
    hello = sample("hello")
    part = HashPart(hello.path.hash_part)
    cache = cache_of(hello)
    realiser = make_realiser(cache)
    assert await realiser.resolve(part) == hello.path
    await realiser.realise(hello.path)
    cache.requests.clear()
    assert await make_realiser(cache).resolve(part) == hello.path
    assert cache.requests == []


async def test_a_hash_part_that_nobody_has_or_signed(make_realiser: MakeRealiser) -> None:
    hello = sample("hello")
    part = HashPart(hello.path.hash_part)
    with pytest.raises(PathNotFound, match=f"/nix/store/{part}: no substituter has it"):
        await make_realiser(cache_of()).resolve(part)
    with pytest.raises(UntrustedPath, match="no substituter offers it so that it is trusted"):
        await make_realiser(cache_of(hello.signed_by())).resolve(part)


async def test_a_narinfo_of_another_hash_part_is_not_taken(make_realiser: MakeRealiser) -> None:
    hello, other = sample("hello"), sample("other")
    cache = cache_of()
    cache.files[other.narinfo_name] = hello.narinfo
    with pytest.raises(FusesnapError, match=f"expected the narinfo of {other.path.hash_part}, got"):
        await make_realiser(cache).resolve(HashPart(other.path.hash_part))
