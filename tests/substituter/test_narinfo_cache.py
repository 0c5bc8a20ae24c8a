from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusesnap.nix.cache_info import CacheInfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.substituter.narinfo_cache import DAY, CachedAnswer, NarInfoCache
from tests.substituter.samples import sample

URL = "http://a"
STORE = StoreDir()
SAMPLE = sample()
INFO = CacheInfo("/nix/store", want_mass_query=True, priority=40)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "narinfo-cache.sqlite"


@pytest.fixture
def open_cache(file: Path, clock: Clock) -> Iterator[Callable[[], NarInfoCache]]:
    """Opens the same file again and again; what is open at the end is closed."""
    opened: list[NarInfoCache] = []

    def make() -> NarInfoCache:
        opened.append(NarInfoCache(file, clock))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close()


OpenCache = Callable[[], NarInfoCache]


@pytest.mark.parametrize("flushed", [False, True])
def test_answers_are_kept(open_cache: OpenCache, flushed: bool) -> None:
    cache = open_cache()
    other = sample("other")
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.remember(URL, other.path, None)
    cache.remember_cache_info(URL, INFO)
    assert cache.pending == 3
    if flushed:
        cache.flush()
        assert cache.pending == 0
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    assert cache.answer(URL, other.path, STORE) == CachedAnswer(None)
    assert cache.cache_info(URL) == INFO
    assert cache.answer("http://b", SAMPLE.path, STORE) is None
    assert cache.cache_info("http://b") is None


def test_answers_outlive_the_process(open_cache: OpenCache) -> None:
    first = open_cache()
    first.remember(URL, SAMPLE.path, SAMPLE.info)
    first.remember_cache_info(URL, INFO)
    first.close()
    second = open_cache()
    assert second.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    assert second.cache_info(URL) == INFO


def test_two_processes_share_a_file(open_cache: OpenCache) -> None:
    first, second = open_cache(), open_cache()
    first.remember(URL, SAMPLE.path, SAMPLE.info)
    first.flush()
    assert second.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    second.forget(URL, SAMPLE.path)
    second.flush()
    assert first.answer(URL, SAMPLE.path, STORE) is None


@pytest.mark.parametrize("flushed", [False, True])
def test_answers_grow_old(open_cache: OpenCache, clock: Clock, flushed: bool) -> None:
    cache = open_cache()
    other = sample("other")
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.remember(URL, other.path, None)
    cache.remember_cache_info(URL, INFO)
    if flushed:
        cache.flush()
    clock.now += DAY / 24 - 1
    assert cache.answer(URL, other.path, STORE) is not None
    clock.now += 1
    assert cache.answer(URL, other.path, STORE) is None
    clock.now += 7 * DAY
    assert cache.cache_info(URL) is None
    assert cache.answer(URL, SAMPLE.path, STORE) is not None
    clock.now += 23 * DAY
    assert cache.answer(URL, SAMPLE.path, STORE) is None


def test_answers_from_the_future_are_not_believed(open_cache: OpenCache, clock: Clock) -> None:
    cache = open_cache()
    cache.remember(URL, SAMPLE.path, None)
    clock.now -= 1
    assert cache.answer(URL, SAMPLE.path, STORE) is None


@pytest.mark.parametrize("flushed", [False, True])
def test_forgetting(open_cache: OpenCache, flushed: bool) -> None:
    cache = open_cache()
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    cache.forget(URL, SAMPLE.path)
    if flushed:
        cache.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) is None


def test_newer_answer_replaces_the_older(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.remember(URL, SAMPLE.path, None)
    cache.flush()
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    cache.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)


def test_the_path_that_a_cache_was_last_known_to_have(open_cache: OpenCache, clock: Clock) -> None:
    cache = open_cache()
    newest, lacking = sample("newest"), sample("lacking")
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    clock.now += 1
    cache.remember(URL, newest.path, newest.info)
    clock.now += 1
    cache.remember(URL, lacking.path, None)
    cache.remember("http://b", lacking.path, lacking.info)
    cache.flush()
    assert cache.newest_path(URL, STORE) == newest.path
    assert cache.newest_path("http://c", STORE) is None
    assert cache.newest_path(URL, StoreDir("/gnu/store")) is None


def test_answer_for_the_same_hash_under_another_name_is_not_used(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    namesake = StorePath(SAMPLE.path.hash_part, "namesake")
    assert cache.answer(URL, namesake, STORE) is None


def test_old_answers_are_purged(open_cache: OpenCache, file: Path, clock: Clock) -> None:
    cache = open_cache()
    for number in range(10):
        cache.remember(URL, sample(f"gone-{number}", size=1).path, None)
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.close()
    clock.now += DAY
    open_cache().close()
    connection = sqlite3.connect(file)
    assert connection.execute("SELECT count(*) FROM narinfos").fetchone() == (1,)
    connection.close()


@pytest.mark.parametrize(
    "damage", [b"this is not a database at all\n" * 300, b"SQLite format 3\0x"]
)
def test_file_that_is_no_database_is_made_anew(
    open_cache: OpenCache, file: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_bytes(damage)
    cache = open_cache()
    assert "thrown away and made anew" in caplog.text
    assert str(file) in caplog.text
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.close()
    assert open_cache().answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)


def test_file_that_is_damaged_while_it_is_used(
    open_cache: OpenCache, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    for number in range(200):
        cache.remember(URL, sample(f"n-{number}", size=1).path, SAMPLE.info)
    cache.close()
    cache = open_cache()
    size = file.stat().st_size
    with file.open("r+b") as damaged:  # every page but the first, which says what the file is
        damaged.seek(4096)
        damaged.write(b"\xff" * (size - 4096))
    assert not caplog.text
    assert cache.answer(URL, sample("n-7", size=1).path, STORE) is None
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    assert "thrown away and made anew" in caplog.text
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)


def test_file_of_another_version_is_made_anew(open_cache: OpenCache, file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.executescript("CREATE TABLE narinfos (x); PRAGMA user_version = 99;")
    connection.close()
    cache = open_cache()
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)


def test_file_that_cannot_be_made_is_done_without(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    cache = NarInfoCache(tmp_path / "no" / "directory.sqlite", clock)
    assert "cannot be used" in caplog.text
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    cache.close()


def test_file_that_somebody_else_is_writing_is_not_thrown_away(
    open_cache: OpenCache,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fusesnap.substituter.narinfo_cache._WRITE_TIMEOUT", 0.0)
    cache = open_cache()
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    other = sqlite3.connect(file)
    other.execute("BEGIN IMMEDIATE")
    cache.remember(URL, sample("other").path, None)
    cache.flush()
    assert "database is locked" in caplog.text
    late = open_cache()  # cannot purge, and so does without
    other.rollback()
    other.close()
    late.remember(URL, SAMPLE.path, None)
    late.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    assert "made anew" not in caplog.text


def test_damaged_row_is_a_miss(open_cache: OpenCache, file: Path, clock: Clock) -> None:
    open_cache().close()
    connection = sqlite3.connect(file)
    with connection:
        connection.execute(
            "INSERT INTO narinfos VALUES (?, ?, ?, ?)",
            (URL, SAMPLE.path.hash_part, clock.now, b"StorePath: nonsense\n"),
        )
    connection.close()
    assert open_cache().answer(URL, SAMPLE.path, STORE) is None


def test_in_memory(clock: Clock) -> None:
    cache = NarInfoCache(":memory:", clock)
    cache.remember(URL, SAMPLE.path, SAMPLE.info)
    cache.flush()
    assert cache.answer(URL, SAMPLE.path, STORE) == CachedAnswer(SAMPLE.info)
    cache.close()


def test_threads(open_cache: OpenCache, caplog: pytest.LogCaptureFixture) -> None:
    """One thread asks and remembers while others write to the disk."""
    cache = open_cache()
    done = threading.Event()

    def keep_flushing() -> None:
        while not done.is_set():
            cache.flush()

    threads = [threading.Thread(target=keep_flushing) for _ in range(2)]
    for thread in threads:
        thread.start()
    paths = [sample(f"t-{number}", size=1).path for number in range(500)]
    for path in paths:
        cache.remember(URL, path, None)
        assert cache.answer(URL, path, STORE) == CachedAnswer(None)
    done.set()
    for thread in threads:
        thread.join()
    cache.flush()
    assert all(cache.answer(URL, path, STORE) for path in paths)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
