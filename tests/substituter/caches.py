"""Caches in memory for the tests of a pool, and what those tests expect of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusesnap.errors import (
    FusesnapError,
    Unavailable,
)
from fusesnap.substituter.memory import Fault, MemorySubstituter
from fusesnap.substituter.pool import Offer, SubstituterPool
from tests.substituter.samples import Sample, sample

MakePool = Callable[..., SubstituterPool]

SAMPLE = sample()
STALL = Fault()
BROKEN = Fault(Unavailable("memory://a: 500 internal server error"))


def cache_info(priority: int | None = None, store_dir: str = "/nix/store") -> bytes:
    line = "" if priority is None else f"Priority: {priority}\n"
    return f"StoreDir: {store_dir}\nWantMassQuery: 1\n{line}".encode()


def memory(name: str, *published: Sample, priority: int | None = None) -> MemorySubstituter:
    cache = MemorySubstituter(f"memory://{name}", {"nix-cache-info": cache_info(priority)})
    for each in published:
        cache.publish(each.info, each.file)
    return cache


def narinfos(cache: MemorySubstituter) -> list[str]:
    return [name for name in cache.requests if name.endswith(".narinfo")]


async def failure(pool: SubstituterPool, kind: type[FusesnapError], **options: Any) -> str:
    with pytest.raises(FusesnapError) as caught:
        await pool.find(SAMPLE.path, **options)
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert message.startswith(f"/nix/store/{SAMPLE.path}: ")
    return message.removeprefix(f"/nix/store/{SAMPLE.path}: ")


async def read(offer: Offer) -> bytes:
    async with offer.substituter.nar(offer.narinfo) as pieces:
        return b"".join([piece async for piece in pieces])


class WallClock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now
