"""What is fetched of a path besides what is read of it."""

from __future__ import annotations

import random

import pytest

from fusesnap.fetch.guesses import (
    FIRST_GUESS,
    SCATTERED_RUN,
    SMALL_FILE,
    Guesses,
    SmallFiles,
)
from fusesnap.fetch.read_ahead import FURTHEST
from fusesnap.substituter.memory import MemorySubstituter

from ..store.conftest import Tree
from .lazy_node import MakeNode, bytes_asked, node_with, read, until
from .published import CHUNK, PublishedPath, published, put

RANDOM = random.Random(3)  # noqa: S311 - not for secrets
MODULES = {f"m{number:04}": RANDOM.randbytes(CHUNK) for number in range(1200)}
LARGE = RANDOM.randbytes(300 * CHUNK)
assert len(LARGE) > SMALL_FILE


@pytest.fixture(scope="module")
def path() -> PublishedPath:
    tree: Tree = {"a": LARGE, "modules": dict(MODULES), "z": LARGE}
    return published("modules", tree)


def number_of(path: PublishedPath, module: int) -> int:
    return path.chunk_of(b"m%04d" % module, CHUNK // 2).number


def size_of(path: PublishedPath, numbers: list[int]) -> int:
    return sum(path.index.chunks[number].file_size for number in numbers)


def test_the_second_small_file_that_is_missed_has_others_fetched(path: PublishedPath) -> None:
    small = SmallFiles.of(path.index)
    assert small.after(number_of(path, 0), lambda _: True, 0) == []
    missed = number_of(path, 600)
    guessed = small.after(missed, lambda number: number != missed, 0)
    assert FIRST_GUESS - 2 * CHUNK < size_of(path, guessed) <= FIRST_GUESS
    assert guessed[0] == missed + 1  # what is behind it comes first
    assert guessed == sorted(guessed)


def test_each_further_one_has_twice_as_much_fetched_up_to_a_limit(path: PublishedPath) -> None:
    small = SmallFiles.of(path.index)
    sizes = [size_of(path, small.after(number_of(path, 0), lambda _: True, 0)) for _ in range(3)]
    assert sizes[0] == 0
    assert sizes[2] > 1.9 * sizes[1]
    for _ in range(40):
        assert size_of(path, small.after(number_of(path, 0), lambda _: True, 0)) <= FURTHEST


def test_what_was_guessed_and_has_not_come_counts(path: PublishedPath) -> None:
    small = SmallFiles.of(path.index)
    missed = number_of(path, 600)
    small.after(missed, lambda _: True, 0)
    guessed = small.after(missed, lambda _: True, FIRST_GUESS - 10 * CHUNK)
    assert 0 < size_of(path, guessed) <= 10 * CHUNK
    assert small.after(missed, lambda _: True, FURTHEST) == []


def test_large_files_are_no_sign_and_are_not_guessed_at(path: PublishedPath) -> None:
    small = SmallFiles.of(path.index)
    for name in (b"a", b"z"):
        large = path.chunk_of(name, 100 * CHUNK).number
        for _ in range(3):
            assert small.after(large, lambda _: True, 0) == []
    small.after(number_of(path, 1100), lambda _: True, 0)
    guessed = small.after(number_of(path, 1100), lambda _: True, 0)
    assert number_of(path, 1199) in guessed
    assert number_of(path, 1090) in guessed  # behind it there is not enough
    assert path.chunk_of(b"z", 10 * CHUNK).number not in guessed


def test_what_is_here_or_coming_is_not_guessed_at(path: PublishedPath) -> None:
    small = SmallFiles.of(path.index)
    wanted = {number_of(path, module) for module in (3, 5, 7)}
    small.after(number_of(path, 0), lambda _: True, 0)
    assert small.after(number_of(path, 0), wanted.__contains__, 0) == sorted(wanted)


def test_near_and_far_are_no_part_of_it(path: PublishedPath) -> None:
    guesses = Guesses(path.index.chunks, SmallFiles.of(path.index))
    due = [number_of(path, 600)]
    guesses.after(due, 10 * CHUNK, lambda _: True, 0)
    guess = guesses.after(due, 10 * CHUNK, lambda _: True, 0)
    assert guess.near
    assert guess.near[0] == due[0] + 1
    assert not {*due, *guess.near, *guess.far} & set(guess.scattered)
    assert guess.scattered


def test_nobody_guesses_where_that_is_not_wanted(path: PublishedPath) -> None:
    guesses = Guesses(path.index.chunks, None)
    for _ in range(3):
        guess = guesses.after([number_of(path, 600)], 10 * CHUNK, lambda _: True, 0)
        assert guess.scattered == []


async def test_modules_come_before_they_are_read_in_small_requests(
    path: PublishedPath, cache: MemorySubstituter, make_node: MakeNode
) -> None:
    put(cache, path)
    node = await node_with(make_node, path)
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    for module in (100, 600):
        name = b"m%04d" % module
        assert await read(node, path, name, 0, CHUNK) == MODULES[name.decode()]
        await until(lambda: chunked.is_idle)
    asked = bytes_asked(cache)
    assert asked > FIRST_GUESS
    assert all(end - start <= SCATTERED_RUN + CHUNK for _, start, end in cache.parts[2:])
    assert await read(node, path, b"m0690", 0, CHUNK) == MODULES["m0690"]
    assert bytes_asked(cache) == asked
