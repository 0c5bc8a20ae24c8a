"""Which traces of strangers are used, and how often caches are asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from trio.testing import MockClock

from fusesnap.errors import Unavailable
from fusesnap.fetch.traces.database import Origin, TraceDatabase
from fusesnap.fetch.traces.search import ABSENT_FOR, PRESENT_FOR, TraceSearch, file_name
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.startup_trace_text import format_trace, sign_trace
from fusesnap.substituter.memory import Fault, MemorySubstituter

from ...nix.traces import CLOSURE, DATA, GLIBC, HELLO, example
from ...substituter.samples import KEY, TRUSTED, secret_key
from .starts import Clock

PATHS = frozenset({HELLO, GLIBC, DATA})
NAME = file_name(CLOSURE)
GOOD = sign_trace(example(), KEY)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[TraceDatabase]:
    opened = TraceDatabase(tmp_path / "traces.sqlite")
    yield opened
    opened.close()


def cache(name: str, trace: StartupTrace | None = None) -> MemorySubstituter:
    files = {} if trace is None else {NAME: format_trace(trace)}
    return MemorySubstituter(f"memory://{name}", files)


async def test_the_first_cache_that_has_one_gives_it(database: TraceDatabase) -> None:
    other = sign_trace(replace(example(), extents=()), KEY)
    caches = [cache("none"), cache("first", GOOD), cache("second", other)]
    found = await TraceSearch(caches, TRUSTED, Clock(), 30).find(database, CLOSURE, PATHS)
    assert found == GOOD
    assert [(each.trace, each.origin) for each in database.traces()] == [(GOOD, Origin.CACHE)]
    assert [each.requests for each in caches] == [[NAME]] * 3


REFUSED = {
    "is not trusted: it is unsigned": format_trace(example()),
    "signed by 'key-9', not by a trusted": format_trace(sign_trace(example(), secret_key("key-9"))),
    "expected 5555": format_trace(
        sign_trace(replace(example(), closure=ClosureDigest("6" * 64)), KEY)
    ),
    "cut short": format_trace(GOOD)[:-1],
    "begins with '<html>'": b"<html>\n",
    "expected at most 8388608 bytes, got more": b"x" * ((8 << 20) + 1),
}


@pytest.mark.parametrize("said", REFUSED)
async def test_what_cannot_be_trusted_is_not_used(
    database: TraceDatabase, caplog: pytest.LogCaptureFixture, said: str
) -> None:
    bad, clock = MemorySubstituter("memory://bad", {NAME: REFUSED[said]}), Clock()
    search = TraceSearch([bad], TRUSTED, clock, 30)
    assert await search.find(database, CLOSURE, PATHS) is None
    assert said in caplog.text
    assert "memory://bad: trace/5555" in caplog.text
    assert database.traces() == []
    await search.find(database, CLOSURE, PATHS)
    assert len(bad.requests) == 1  # what is wrong stays so for a while


async def test_a_signed_trace_with_paths_of_others_is_refused(
    database: TraceDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    search = TraceSearch([cache("one", GOOD)], TRUSTED, Clock(), 30)
    assert await search.find(database, CLOSURE, PATHS - {GLIBC}) is None
    assert f"{GLIBC} does not belong to the closure" in caplog.text


async def test_absence_is_remembered_for_a_while(database: TraceDatabase) -> None:
    empty, clock = cache("empty"), Clock()
    search = TraceSearch([empty], TRUSTED, clock, 30)
    for _ in range(3):
        assert await search.find(database, CLOSURE, PATHS) is None
    assert len(empty.requests) == 1
    clock.now += ABSENT_FOR + 1
    empty.files[NAME] = format_trace(GOOD)
    assert await search.find(database, CLOSURE, PATHS) == GOOD
    clock.now += PRESENT_FOR - 1
    await search.find(database, CLOSURE, PATHS)
    assert len(empty.requests) == 2
    clock.now += 2  # it may have become better
    await search.find(database, CLOSURE, PATHS)
    assert len(empty.requests) == 3


async def test_a_cache_that_could_not_answer_is_asked_again(
    database: TraceDatabase, autojump_clock: MockClock
) -> None:
    broken, slow = cache("broken", GOOD), cache("slow", GOOD)
    search = TraceSearch([broken, slow], TRUSTED, Clock(), 30)
    broken.script(NAME, Fault(Unavailable("memory://broken: gone"), 5))
    slow.script(NAME, Fault(None, 5))
    assert await search.find(database, CLOSURE, PATHS) is None
    assert await search.find(database, CLOSURE, PATHS) == GOOD


async def test_a_closure_that_is_forgotten_is_asked_for_anew(database: TraceDatabase) -> None:
    empty = cache("empty")
    search = TraceSearch([empty], TRUSTED, Clock(), 30)
    await search.find(database, CLOSURE, PATHS)
    database.remove(CLOSURE)
    await search.find(database, CLOSURE, PATHS)
    assert len(empty.requests) == 2
