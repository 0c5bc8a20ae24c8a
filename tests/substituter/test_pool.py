"""Several caches as one: whom it asks, whom it trusts, what it says."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import (
    InvalidData,
    PathNotFound,
    Unavailable,
    UntrustedPath,
)
from fusesnap.nix.signature import TrustedKeys
from fusesnap.substituter.memory import Fault, MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import CacheState
from fusesnap.substituter.retry import Refusal
from tests.substituter.caches import (
    BROKEN,
    SAMPLE,
    STALL,
    MakePool,
    cache_info,
    failure,
    memory,
    narinfos,
    read,
)
from tests.substituter.samples import sample, secret_key

# Order and failing over


async def test_offer(make_pool: MakePool) -> None:
    offer = await make_pool(memory("a", SAMPLE)).find(SAMPLE.path)
    assert offer.narinfo == SAMPLE.info
    assert offer.substituter.url == "memory://a"
    assert await read(offer) == SAMPLE.file


async def test_no_cache_at_all(make_pool: MakePool) -> None:
    message = await failure(make_pool(), PathNotFound)
    assert message == "no substituter has it: no substituter is configured"


async def test_nobody_has_it(make_pool: MakePool) -> None:
    message = await failure(make_pool(memory("a"), memory("b")), PathNotFound)
    assert message == "no substituter has it: memory://a: not found; memory://b: not found"


async def test_lowest_priority_number_is_asked_first(make_pool: MakePool) -> None:
    caches = [
        memory("none", SAMPLE),
        memory("60", SAMPLE, priority=60),
        memory("40", SAMPLE, priority=40),
        memory("41", SAMPLE, priority=41),
    ]
    pool = make_pool(*caches)
    urls = []
    excluded: frozenset[str] = frozenset()
    for _ in caches:
        offer = await pool.find(SAMPLE.path, exclude=excluded)
        urls.append(offer.substituter.url)
        excluded |= {offer.substituter.url}
    assert urls == ["memory://40", "memory://41", "memory://none", "memory://60"]


async def test_users_priority_overrules_the_caches(make_pool: MakePool) -> None:
    first = MemorySubstituter("memory://a", {"nix-cache-info": cache_info(10)}, priority=90)
    first.publish(SAMPLE.info, SAMPLE.file)
    pool = make_pool(first, memory("b", SAMPLE))
    assert (await pool.find(SAMPLE.path)).substituter.url == "memory://b"


async def test_others_are_not_asked_once_one_has_it(make_pool: MakePool) -> None:
    first, second = memory("a", SAMPLE), memory("b", SAMPLE)
    await make_pool(first, second).find(SAMPLE.path)
    assert narinfos(second) == []


async def test_same_cache_twice_is_one(make_pool: MakePool) -> None:
    first = memory("a")
    pool = make_pool(first, memory("b"), memory("a"))
    assert [state.url for state in pool.states()] == ["memory://a", "memory://b"]
    await failure(pool, PathNotFound)
    assert len(narinfos(first)) == 1


@pytest.mark.parametrize(
    "fault",
    [
        BROKEN,
        Fault(Refusal("memory://a: 401 unauthorized")),
        Fault(InvalidData("memory://a: garbage")),
        Fault(PathNotFound("memory://a: not found")),
        STALL,
    ],
)
async def test_next_cache_is_asked_where_one_fails(
    make_pool: MakePool, fault: Fault, autojump_clock: MockClock
) -> None:
    first = memory("a", SAMPLE)
    first.script(SAMPLE.narinfo_name, fault)
    offer = await make_pool(first, memory("b", SAMPLE)).find(SAMPLE.path)
    assert offer.substituter.url == "memory://b"


@pytest.mark.parametrize("fault", [BROKEN, Fault(InvalidData("memory://a: a web page")), STALL])
async def test_cache_that_does_not_say_what_it_is(
    make_pool: MakePool, fault: Fault, autojump_clock: MockClock
) -> None:
    first = memory("a", SAMPLE)
    first.script("nix-cache-info", fault)
    pool = make_pool(first, memory("b", SAMPLE))
    assert (await pool.find(SAMPLE.path)).substituter.url == "memory://b"
    assert narinfos(first) == []


async def test_garbage_is_a_cache_that_cannot_answer(make_pool: MakePool) -> None:
    first = memory("a")
    first.files[SAMPLE.narinfo_name] = b"<html>log in</html>"
    message = await failure(make_pool(first, memory("b")), Unavailable)
    assert message.startswith(f"no substituter has it: memory://a: {SAMPLE.narinfo_name}: narinfo")
    assert message.endswith("; memory://b: not found")


async def test_store_directory_that_is_not_ours(make_pool: MakePool) -> None:
    first = memory("a", SAMPLE)
    first.files["nix-cache-info"] = cache_info(10, "/opt/store")
    pool = make_pool(first, memory("b"))
    refused = "memory://a: refused: its store directory is '/opt/store', ours is /nix/store"
    message = await failure(pool, PathNotFound)
    assert message == f"no substituter has it: {refused}; memory://b: not found"
    assert narinfos(first) == []
    assert pool.states()[0] == CacheState("memory://a", 10, False, refused, 0, 0)


async def test_store_directory_that_is_mended_is_noticed(
    make_pool: MakePool, autojump_clock: MockClock
) -> None:
    cache = memory("a", SAMPLE)
    cache.files["nix-cache-info"] = cache_info(10, "/opt/store")
    pool = make_pool(cache)
    await failure(pool, PathNotFound)
    cache.files["nix-cache-info"] = cache_info(10)
    await trio.sleep(61)
    assert (await pool.find(SAMPLE.path)).narinfo == SAMPLE.info


async def test_excluded_caches_are_not_asked(make_pool: MakePool) -> None:
    first = memory("a", SAMPLE)
    pool = make_pool(first, memory("b"))
    message = await failure(pool, Unavailable, exclude=frozenset({"memory://a"}))
    assert "memory://a: left out" in message
    assert "memory://b: not found" in message
    assert narinfos(first) == []


# Trust


async def test_unsigned_offer(make_pool: MakePool) -> None:
    unsigned = SAMPLE.signed_by()
    message = await failure(make_pool(memory("a", unsigned), memory("b")), UntrustedPath)
    assert message == (
        "no substituter offers it so that it is trusted: memory://a: is not trusted: it is"
        " unsigned; it is not content-addressed; memory://b: not found"
    )


async def test_trusted_offer_is_preferred_to_an_earlier_one(make_pool: MakePool) -> None:
    stranger = SAMPLE.signed_by(secret_key("stranger-1"))
    pool = make_pool(memory("a", stranger, priority=10), memory("b", SAMPLE))
    assert (await pool.find(SAMPLE.path)).substituter.url == "memory://b"


async def test_failure_outweighs_mistrust(make_pool: MakePool) -> None:
    broken = memory("b")
    broken.script(SAMPLE.narinfo_name, Fault(Unavailable("memory://b: 500")))
    pool = make_pool(memory("a", SAMPLE.signed_by()), broken)
    await failure(pool, Unavailable)


async def test_trust_is_checked_when_an_answer_is_remembered(make_pool: MakePool) -> None:
    cache = memory("a", SAMPLE)
    await make_pool(cache).find(SAMPLE.path)
    other = secret_key("other-1")
    pool = make_pool(cache, keys=TrustedKeys((other.public_key(),)))
    await failure(pool, UntrustedPath)
    resigned = SAMPLE.signed_by(other)
    cache.publish(resigned.info, resigned.file)
    assert (await pool.find(SAMPLE.path)).narinfo == resigned.info


# States


async def test_states(make_pool: MakePool) -> None:
    first, second = memory("a", SAMPLE, priority=40), memory("b")
    second.script("nix-cache-info", Fault(Unavailable("memory://b: no connection")))
    pool = make_pool(first, second)
    assert pool.states() == [
        CacheState("memory://a", None, None, None, 0, 0),
        CacheState("memory://b", None, None, None, 0, 0),
    ]
    await read(await pool.find(SAMPLE.path))
    assert pool.states() == [
        CacheState("memory://a", 40, True, None, 1, len(SAMPLE.file)),
        CacheState("memory://b", None, False, "memory://b: no connection", 0, 0, failures=1),
    ]


async def test_many_lookups_write_few_times(
    make_pool: MakePool, disk: NarInfoCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = []
    flush = disk.flush

    def counted_flush() -> None:
        flushes.append(disk.pending)
        flush()

    monkeypatch.setattr(disk, "flush", counted_flush)
    published = [sample(f"p-{n}", size=1) for n in range(600)]
    pool = make_pool(memory("a", *published))
    async with trio.open_nursery() as nursery:
        for each in published:
            nursery.start_soon(pool.find, each.path)
    assert disk.pending == 0
    assert len(flushes) <= 5
