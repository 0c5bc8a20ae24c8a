"""A disk that is full, and limits that hold, under a whole node without its mount, on a real small file system."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
from testbed.bad_caches import BadCaches
from testbed.disk_usage import taken_by_store
from testbed.nix_store import CONFIGURATION
from testbed.processes import run_unchecked

from fusesnap.daemon.build import Node
from fusesnap.errors import StorageFailure
from fusesnap.filesystem.operations import errno_of
from fusesnap.store.disk_space import free_space

from ..substituter.samples import Sample, sample
from .conftest import LARGE, MANY, SMALL, MakeNode, publish

MIB = 1 << 20


@contextmanager
def file_system(mount_point: Path, mib: int) -> Iterator[Path]:
    """A file system of so many MiB."""
    mount_point.mkdir()
    options = f"size={mib}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount_point], check=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", mount_point], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with file_system(tmp_path / "disk", 12) as mount_point:
        yield mount_point


@contextmanager
def full(disk: Path, leave: int = 0) -> Iterator[None]:
    """Fill the disk but for ``leave`` bytes, for the time of the context."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    try:
        yield
    finally:
        filler.unlink()


def verify(node: Node) -> None:
    """Real Nix has nothing to say of the store."""
    command = ["nix-store", "--store", node.store.nix_url, "--verify", "--check-contents"]
    done = run_unchecked(command, env=CONFIGURATION)
    said = [line for line in done.stderr.splitlines() if "error" in line or "differ" in line]
    assert (done.returncode, said) == (0, [])


async def realise(node: Node, *samples: Sample) -> None:
    for each in samples:
        await node.realiser.realise(each.path)


async def test_the_reader_of_what_does_not_fit_is_told_and_others_go_on(
    make_node: MakeNode, caches: BadCaches, disk: Path
) -> None:
    async with make_node(caches.url("good"), root=disk / "state") as node:
        await realise(node, MANY[0])
        node.store.roots.add("image", [MANY[0].path, SMALL.path])
        with full(disk, leave=MIB):
            with pytest.raises(StorageFailure, match="No space left on device") as caught:
                await node.realiser.realise(LARGE.path)
            assert errno_of(caught.value) == caught.value.errno
            assert LARGE.path.name in str(caught.value)
            await realise(node, MANY[0], SMALL)
            assert node.store.committed_among([MANY[0].path, SMALL.path, LARGE.path]) == {
                MANY[0].path,
                SMALL.path,
            }
            assert list((disk / "state" / "staging").iterdir()) == []
            verify(node)
        await realise(node, LARGE)
        verify(node)


async def test_what_nothing_needs_is_removed_first_and_the_reader_notices_nothing(
    make_node: MakeNode, caches: BadCaches, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_node(caches.url("good"), root=disk / "state") as node:
        await realise(node, LARGE, MANY[0])
        node.store.roots.add("image", [MANY[0].path])
        with full(disk):
            await realise(node, SMALL)
            assert node.store.committed_among([LARGE.path, MANY[0].path]) == {MANY[0].path}
            verify(node)
    assert "removed 1 paths" in caplog.text


async def test_on_a_disk_without_a_single_block_what_is_there_is_served_and_asked_for(
    make_node: MakeNode, caches: BadCaches, disk: Path
) -> None:
    async with make_node(caches.url("good"), root=disk / "state") as node:
        await realise(node, SMALL)
        node.store.roots.add("image", [SMALL.path])
        (disk / "state" / "ballast").unlink()
        with full(disk):
            await realise(node, SMALL)
            # What is remembered of paths is written for this: it is known, or it is told that it could not be.
            with suppress(StorageFailure):
                await node.realiser.admit([each.path for each in MANY])
            with pytest.raises(StorageFailure, match=r"No space left on device|is full"):
                await realise(node, LARGE)
            await node.pool.find(MANY[5].path)
            verify(node)
        await node.realiser.admit([each.path for each in MANY])
        await realise(node, LARGE, *MANY[:3])
        verify(node)


def test_a_log_that_cannot_be_written_stops_nobody() -> None:
    code = (
        "import logging; from fusesnap.daemon.logs import log_to_stderr; log_to_stderr();"
        "[logging.error('line %d', n) for n in range(1000)]; print('still here')"
    )
    with Path("/dev/full").open("w") as full_disk:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stderr=full_disk,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stdout == "still here\n"


# Limits

CLOSURES = [sample(f"closure-{number}", size=300_000, compression="none") for number in range(100)]
LIMIT = 4 * MIB


@pytest.fixture(scope="session")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("closures") / "files", *CLOSURES)


async def watched(measure: Callable[[], int], work: Callable[[], Awaitable[object]]) -> int:
    """The most that ``measure`` said at any look while ``work`` ran."""
    most = 0
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, await trio.to_thread.run_sync(measure))
                await trio.sleep(0.003)

        nursery.start_soon(look)
        await work()
        nursery.cancel_scope.cancel()
    return most


async def start_all(node: Node) -> None:
    async with trio.open_nursery() as starts:
        for each in CLOSURES:
            starts.start_soon(node.realiser.realise, each.path)


async def test_the_size_limit_holds_at_every_moment_of_a_hundred_starts(
    make_node: MakeNode, many_files: Path
) -> None:
    url = f"file://{many_files}"
    async with make_node(url, store={"max-size": LIMIT}) as node:
        most = await watched(lambda: taken_by_store(node.settings.root), lambda: start_all(node))
        assert 1_000_000 < most <= LIMIT
        verify(node)


async def test_the_minimum_of_free_space_holds_at_every_moment_of_a_hundred_starts(
    make_node: MakeNode, many_files: Path, tmp_path: Path
) -> None:
    # The logs of the databases take some MiB as well.
    whole, least = 64 * MIB, 40 * MIB
    with file_system(tmp_path / "disk", 64) as disk:
        settings = {"root": disk / "state", "store": {"min-free": least}}
        async with make_node(f"file://{many_files}", **settings) as node:
            used = await watched(lambda: whole - free_space(disk), lambda: start_all(node))
            verify(node)
    assert used <= whole - least


async def test_what_images_need_may_go_beyond_the_limit_and_it_is_said(
    make_node: MakeNode, many_files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with make_node(f"file://{many_files}", store={"max-size": 2 * MIB}) as node:
        paths = [each.path for each in CLOSURES[:20]]
        node.store.roots.add("image", paths)
        for path in paths:
            await node.realiser.realise(path)
        assert node.store.committed_among(paths) == set(paths)
    assert caplog.text.count("goes beyond its limits by") == 1
