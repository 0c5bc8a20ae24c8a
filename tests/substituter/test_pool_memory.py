"""What a pool remembers of answers and of failures, and how long it waits, on a virtual clock."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import (
    ContentMismatch,
    DeadlineExceeded,
    PathNotFound,
    Unavailable,
)
from fusesnap.nix.store_path import StorePath
from fusesnap.substituter.breaker import BreakerState
from fusesnap.substituter.memory import Fault
from fusesnap.substituter.pool import Offer
from fusesnap.substituter.retry import Refusal, Throttled
from tests.substituter.caches import (
    BROKEN,
    SAMPLE,
    STALL,
    MakePool,
    WallClock,
    failure,
    memory,
    narinfos,
    read,
)
from tests.substituter.samples import Sample, sample

# Memory


async def test_remembered_offer_costs_no_request(make_pool: MakePool) -> None:
    cache = memory("a", SAMPLE)
    await make_pool(cache).find(SAMPLE.path)
    asked = list(cache.requests)
    assert asked == ["nix-cache-info", SAMPLE.narinfo_name]
    offer = await make_pool(cache).find(SAMPLE.path)  # as another process would
    assert offer.narinfo == SAMPLE.info
    assert cache.requests == asked


async def test_remembered_absence_spares_a_request_where_another_has_it(
    make_pool: MakePool, wall_clock: WallClock
) -> None:
    first, second = memory("a"), memory("b")
    await failure(make_pool(first, second), PathNotFound)
    second.publish(SAMPLE.info, SAMPLE.file)
    wall_clock.now += 10
    pool = make_pool(first, second)
    offer = await pool.find(SAMPLE.path)
    assert offer.substituter.url == "memory://b"


async def test_path_that_arrives_is_found_although_its_absence_is_remembered(
    make_pool: MakePool,
) -> None:
    cache = memory("a")
    pool = make_pool(cache)
    await failure(pool, PathNotFound)
    cache.publish(SAMPLE.info, SAMPLE.file)
    assert (await pool.find(SAMPLE.path)).narinfo == SAMPLE.info


async def test_cache_without_the_path_is_spared_while_another_has_it(make_pool: MakePool) -> None:
    first, second = memory("a"), memory("b", SAMPLE)
    pool = make_pool(first, second)
    for _ in range(3):
        await pool.find(SAMPLE.path)
    assert len(narinfos(first)) == 1


async def test_cache_info_is_asked_once(make_pool: MakePool, autojump_clock: MockClock) -> None:
    cache = memory("a", *(sample(f"p-{n}", size=1) for n in range(300)))
    cache._delay = 0.1
    pool = make_pool(cache)
    async with trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(pool.find, sample(f"p-{number}", size=1).path)
    assert cache.requests.count("nix-cache-info") == 1
    assert len(narinfos(cache)) == 300


async def test_what_a_cache_says_is_remembered_even_if_it_is_what_is_assumed_of_one_that_is_silent(
    make_pool: MakePool,
) -> None:
    said, silent = memory("a", SAMPLE), memory("b", SAMPLE)
    said.files["nix-cache-info"] = b"StoreDir: /nix/store\n"  # as `nix copy` writes it
    del silent.files["nix-cache-info"]
    for _ in range(2):
        pool = make_pool(said, silent)  # as another process would
        await pool.find(SAMPLE.path)
        await pool.find(SAMPLE.path, exclude=frozenset({said.url}))
    assert said.requests.count("nix-cache-info") == 1
    assert silent.requests.count("nix-cache-info") == 2


async def test_a_pool_gets_ready_and_says_nothing_of_what_fails(make_pool: MakePool) -> None:
    good, broken = memory("a", SAMPLE), memory("b")
    broken.files["nix-cache-info"] = b"StoreDir: ?"
    pool = make_pool(good, broken)
    await pool.get_ready()
    asked = good.requests.count("nix-cache-info")
    assert asked > 1  # once to be told, and to have connections
    await pool.find(SAMPLE.path)
    assert good.requests.count("nix-cache-info") == asked


async def test_a_cache_that_is_left_alone_is_not_made_ready(make_pool: MakePool) -> None:
    cache = memory("a")
    pool = make_pool(cache)
    (watched,) = pool.caches()
    watched.note_failure(Throttled("memory://a: not now", 60))
    await pool.get_ready()
    assert cache.requests == []


async def test_asker_that_is_cancelled_leaves_the_question_to_another(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    cache = memory("a", SAMPLE)
    cache._delay = 1
    pool = make_pool(cache)
    found = []

    async def find() -> None:
        found.append(await pool.find(SAMPLE.path))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope(deadline=trio.current_time() + 0.5):
            nursery.start_soon(find)  # waits for what the other asked
            await pool.find(SAMPLE.path)
    assert [offer.narinfo for offer in found] == [SAMPLE.info]


# Offers that do not hold


async def test_bad_offer_is_forgotten(make_pool: MakePool) -> None:
    cache = memory("a", SAMPLE)
    pool = make_pool(cache)
    offer = await pool.find(SAMPLE.path)
    moved = SAMPLE.but(url="nar/moved.nar.xz")
    cache.publish(moved.info, moved.file)
    assert (await pool.find(SAMPLE.path)).narinfo == SAMPLE.info  # as remembered
    await pool.report_bad(offer, PathNotFound("memory://a: gone"))
    assert (await pool.find(SAMPLE.path)).narinfo == moved.info
    assert pool.states()[0].reachable


async def test_cache_with_a_bad_file_is_asked_last(make_pool: MakePool) -> None:
    other = sample("other")
    first, second = memory("a", SAMPLE, other), memory("b", SAMPLE, other)
    pool = make_pool(first, second)
    offer = await pool.find(SAMPLE.path)
    assert offer.substituter.url == "memory://a"
    await pool.report_bad(offer, ContentMismatch("memory://a: hash is wrong"))
    assert (await pool.find(other.path)).substituter.url == "memory://b"
    assert pool.states()[0].last_error == "memory://a: hash is wrong"


async def test_cache_whose_file_breaks_off_is_asked_last(make_pool: MakePool) -> None:
    other = sample("other")
    first, second = memory("a", SAMPLE, other), memory("b", SAMPLE, other)
    first.script(SAMPLE.info.url, Fault(Unavailable("memory://a: broken connection"), after=100))
    pool = make_pool(first, second)
    with pytest.raises(Unavailable):
        await read(await pool.find(SAMPLE.path))
    assert (await pool.find(other.path)).substituter.url == "memory://b"


async def test_cache_with_a_bad_file_is_avoided_however_well_it_answers(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    only, other = sample("only"), sample("other")
    first, second = memory("a", SAMPLE, only, other, priority=10), memory("b", SAMPLE, other)
    pool = make_pool(first, second)
    await pool.report_bad(
        await pool.find(SAMPLE.path), ContentMismatch("memory://a: hash is wrong")
    )
    assert (await pool.find(only.path)).substituter.url == "memory://a"
    assert (await pool.find(other.path)).substituter.url == "memory://b"
    state = pool.states()[0]
    assert (state.reachable, state.bad_nars, state.avoided_for) == (False, 1, 60)
    await trio.sleep(60)
    assert (await pool.find(SAMPLE.path)).substituter.url == "memory://a"
    assert pool.states()[0].reachable


# Time


async def test_many_who_wait_for_a_dead_cache_send_few_requests(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    paths = [sample(f"p-{n}", size=1) for n in range(500)]
    dead = memory("a", *paths)
    pool = make_pool(dead, attempts=10, deadline=30)
    await pool.find(paths[0].path)
    dead.requests.clear()
    for each in paths:
        dead.script(each.narinfo_name, *[BROKEN] * 100)
    messages = []

    async def find(path: StorePath) -> None:
        with pytest.raises(Unavailable) as caught:
            await pool.find(path)
        messages.append(str(caught.value))

    async with trio.open_nursery() as nursery:
        for each in paths[1:]:
            nursery.start_soon(find, each.path)
    assert len(messages) == 499
    # Those that were under way when it failed, and then one at a time: not 10 for each.
    assert len(dead.requests) < 150
    state = pool.states()[0]
    assert state.breaker is not BreakerState.CLOSED
    said = "times in a row; the last time: 500 internal server error"
    assert any(said in message for message in messages)


async def test_cache_that_is_back_is_noticed_by_all_who_wait(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    paths = [sample(f"p-{n}", size=1) for n in range(50)]
    cache = memory("a", *paths)
    pool = make_pool(cache, attempts=20, deadline=30)
    for each in paths:
        cache.script(each.narinfo_name, BROKEN)
    async with trio.open_nursery() as nursery:
        for each in paths:
            nursery.start_soon(pool.find, each.path)
    assert pool.states()[0].breaker is BreakerState.CLOSED


async def test_dead_cache_costs_its_timeout_once(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    paths = [sample(f"p-{n}", size=1) for n in range(400)]
    dead, alive = memory("a", priority=10), memory("b", *paths)
    pool = make_pool(dead, alive, deadline=20)
    await pool.find(paths[0].path)  # so that it is known what the caches are
    for each in paths:
        dead.script(each.narinfo_name, STALL)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for each in paths:
            nursery.start_soon(pool.find, each.path)
    assert trio.current_time() - start == pytest.approx(10)
    assert len(narinfos(dead)) < 200


async def test_failed_cache_is_asked_first_again_after_a_while(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    paths = [sample(f"p-{n}", size=1) for n in range(4)]
    first, second = memory("a", *paths, priority=10), memory("b", *paths)
    first.script(paths[0].narinfo_name, BROKEN)
    pool = make_pool(first, second)
    urls = []
    for pause, each in zip([0, 1, 58, 2], paths, strict=True):
        await trio.sleep(pause)
        urls.append((await pool.find(each.path)).substituter.url)
    assert urls == ["memory://b", "memory://b", "memory://b", "memory://a"]


async def test_one_lookup_tries_whether_a_failed_cache_is_back(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    paths = [sample(f"p-{n}", size=1) for n in range(50)]
    first, second = memory("a", *paths, priority=10), memory("b", *paths)
    first.script(paths[0].narinfo_name, BROKEN)
    pool = make_pool(first, second)
    await pool.find(paths[0].path)
    await trio.sleep(61)
    first.requests.clear()
    for each in paths[1:]:
        first.script(each.narinfo_name, STALL)
    async with trio.open_nursery() as nursery:
        for each in paths[1:]:
            nursery.start_soon(pool.find, each.path)
    assert len(first.requests) == 1


async def test_one_lookup_asks_what_a_failed_cache_is(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    paths = [sample(f"p-{n}", size=1) for n in range(50)]
    first, second = memory("a", *paths), memory("b", *paths)
    first.script("nix-cache-info", *[STALL] * 100)
    pool = make_pool(first, second, deadline=20)
    await pool.find(paths[0].path)
    await trio.sleep(61)
    start = trio.current_time()
    ended = []

    async def find(published: Sample) -> None:
        await pool.find(published.path)
        ended.append(trio.current_time() - start)

    async with trio.open_nursery() as nursery:
        for each in paths[1:]:
            nursery.start_soon(find, each)
    assert ended[:-1] == pytest.approx([0] * 48)
    assert ended[-1] == pytest.approx(10)
    assert first.requests == ["nix-cache-info"] * 2


async def test_cache_with_an_old_no_has_its_share_of_the_time(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    first, second = memory("a"), memory("b")
    pool = make_pool(first, second, deadline=12)
    await failure(pool, PathNotFound)
    first.publish(SAMPLE.info, SAMPLE.file)
    await pool.report_bad(Offer(second, SAMPLE.info), PathNotFound("memory://b: forget it"))
    second.script(SAMPLE.narinfo_name, STALL)
    assert (await pool.find(SAMPLE.path)).substituter.url == "memory://a"


async def test_failed_cache_is_asked_all_the_same_where_no_other_has_it(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    only = sample("only")
    first, second = memory("a", SAMPLE, only), memory("b", SAMPLE)
    first.script(SAMPLE.narinfo_name, BROKEN)
    pool = make_pool(first, second)
    await pool.find(SAMPLE.path)
    assert (await pool.find(only.path)).substituter.url == "memory://a"


async def test_cache_that_could_not_answer_is_asked_again(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    cache = memory("a", SAMPLE)
    cache.script("nix-cache-info", BROKEN)
    cache.script(SAMPLE.narinfo_name, BROKEN)
    pool = make_pool(cache, memory("b"), attempts=3)
    assert (await pool.find(SAMPLE.path)).narinfo == SAMPLE.info


async def test_attempts_are_bounded(make_pool: MakePool, autojump_clock: MockClock) -> None:
    cache = memory("a")
    cache.script(SAMPLE.narinfo_name, *[BROKEN] * 100)
    other = memory("b")
    message = await failure(make_pool(cache, other, attempts=3), Unavailable)
    assert message == (
        "no substituter has it: memory://a: 500 internal server error; memory://b: not found"
    )
    assert len(narinfos(cache)) == 3
    assert len(narinfos(other)) == 1


async def test_refusal_is_not_repeated(make_pool: MakePool, autojump_clock: MockClock) -> None:
    cache = memory("a")
    cache.script(SAMPLE.narinfo_name, *[Fault(Refusal("memory://a: 401 unauthorized"))] * 100)
    await failure(make_pool(cache, attempts=3), Unavailable)
    assert len(narinfos(cache)) == 1


async def test_cache_that_asks_to_be_left_alone_is(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    others = [sample(f"p-{n}", size=1) for n in range(20)]
    cache = memory("a", SAMPLE, *others)
    cache.script(SAMPLE.narinfo_name, Fault(Throttled("memory://a: 429", 7)))
    pool = make_pool(cache, attempts=3)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.find, SAMPLE.path)
        await trio.sleep(1)
        for each in others:
            nursery.start_soon(pool.find, each.path)
        await trio.sleep(5.9)
        assert len(narinfos(cache)) == 1
    assert trio.current_time() - start == pytest.approx(7)


async def test_deadline_holds_whatever_the_caches_do(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    caches = [memory(name) for name in "abc"]
    for cache in caches:
        cache.script("nix-cache-info", *[STALL] * 100)
    pool = make_pool(*caches, attempts=10, deadline=12)
    start = trio.current_time()
    message = await failure(pool, DeadlineExceeded)
    assert trio.current_time() - start <= 12
    for name in "abc":
        assert f"memory://{name}: no answer within " in message


async def test_every_cache_has_its_share_of_the_time(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    first, second = memory("a"), memory("b")
    first.script(SAMPLE.narinfo_name, STALL)
    second.script(SAMPLE.narinfo_name, STALL)
    pool = make_pool(first, second, memory("c", SAMPLE), deadline=12)
    assert (await pool.find(SAMPLE.path)).substituter.url == "memory://c"
    assert trio.current_time() == pytest.approx(8)


async def test_cancellation_passes(make_pool: MakePool, autojump_clock: MockClock) -> None:
    cache = memory("a")
    cache.script("nix-cache-info", STALL)
    with trio.move_on_after(3) as scope:
        await make_pool(cache).find(SAMPLE.path)
    assert scope.cancelled_caught
