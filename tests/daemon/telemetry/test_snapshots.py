"""Starts of containers, seen in what a snapshotter answers; and in which container a reader is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from fusesnap.daemon.telemetry.counting import Counters, Counting
from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.owners import upper_of_reader
from fusesnap.daemon.telemetry.prompt_snapshots import ObservedPrompt
from fusesnap.daemon.telemetry.recorder import Recorder
from fusesnap.daemon.telemetry.records import StartRecord
from fusesnap.daemon.telemetry.snapshots import ObservedSnapshots, start_of
from fusesnap.daemon.telemetry.spans import NoSpans
from fusesnap.errors import NotFound
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Info, Mount, PromptSnapshots, Snapshots

STATE = "/var/lib/fusesnap"
UPPER = f"upperdir={STATE}/snapshots/3/fs"
COLD = f"lowerdir={STATE}/farms/a:{STATE}/lazy/views/1:{STATE}/farms/b:{STATE}/layer:{STATE}/lazy/layer"
MAPPED = f"lowerdir={STATE}/idmapped/3/state/farms/a:{STATE}/idmapped/3/lazy/layer:{STATE}/idmapped/3/state/layer"
PATH = StorePath("0" * 32, "redis")


def overlay(*options: str) -> list[Mount]:
    return [Mount("overlay", "overlay", ("index=off", *options))]


@pytest.mark.parametrize(
    ("mounts", "fuse"),
    [
        (overlay(UPPER, COLD), True),
        (overlay(UPPER, MAPPED), True),
        (overlay(UPPER, f"lowerdir={STATE}/farms/a:{STATE}/layer:{STATE}/snapshots/2/fs"), False),
    ],
)
def test_a_mount_that_shows_the_store_is_a_start(mounts: list[Mount], fuse: bool) -> None:
    assert start_of(mounts, STATE) == (f"{STATE}/snapshots/3/fs", fuse)


@pytest.mark.parametrize(
    "mounts",
    [
        [],
        [Mount("bind", f"{STATE}/snapshots/1/fs", ("rw", "rbind"))],
        overlay(UPPER, f"lowerdir={STATE}/snapshots/2/fs:{STATE}/snapshots/1/fs"),
        overlay(COLD),  # a view: nothing runs in it
        overlay("upperdir=/x/fs", "lowerdir=/elsewhere/farms/a:/elsewhere/lazy/layer"),
    ],
)
def test_another_mount_is_none(mounts: list[Mount]) -> None:
    assert start_of(mounts, STATE) is None


class Snapshotter:
    """Answers with the mounts of a cold container."""

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        return overlay(UPPER, COLD)

    async def remove(self, key: str) -> None:
        raise NotFound(f"{key}: no such snapshot")


async def test_calls_are_counted_and_an_images_paths_are_noted_once(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    now, asked = 100.0, []
    recorder = Recorder("one", lambda: now, lambda pid: None)
    counting = Counting(Counters(), trio.current_time)

    def paths_of(name: str) -> frozenset[StorePath]:
        asked.append(name)
        if len(asked) == 1:
            raise NotFound("gone for a moment")
        return frozenset([PATH])

    telemetry = Telemetry(tmp_path, recorder, counting, lambda: now, NoSpans())
    async with telemetry.running():
        snapshots = ObservedSnapshots(
            cast(Snapshots, Snapshotter()), telemetry, lambda: now, paths_of, STATE, nursery
        )
        for _ in range(3):
            now += 1
            await snapshots.prepare("default/3/redis", "default/2/chain", {})
            with trio.fail_after(10):
                while len(asked) < min(2, int(now - 100)):
                    await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(NotFound):
            await snapshots.remove("other")
        await telemetry.flush()
        journal = telemetry.journal
        upper = f"{STATE}/snapshots/3/fs"
        assert journal.starts() == [
            StartRecord("default/3/redis", "default/2/chain", upper, at, at, fuse=True)
            for at in (103, 102, 101)
        ]
        assert asked == ["default/2/chain"] * 2
        counters = journal.counters()
        assert counters["fusesnap_snapshot_call_seconds_count", "call=prepare"] == 3
        failed = "call=remove\nkind=no such snapshot"
        assert counters["fusesnap_snapshot_call_errors", failed] == 1
        while not journal.chain("default/2/chain"):
            await telemetry.flush()
        assert journal.chain("default/2/chain") == {PATH.base_name}


class Prompt(PromptSnapshots):
    """Prepares, and knows nothing else."""

    def stat(self, key: str) -> Info | None:
        return None

    def mounts(self, key: str) -> Sequence[Mount] | None:
        return None

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount] | None:
        return overlay(UPPER, COLD)


async def test_prompt_answers_are_counted_and_noted(tmp_path: Path, nursery: trio.Nursery) -> None:
    recorder = Recorder("one", lambda: 100.0, lambda pid: None)
    counting = Counting(Counters(), trio.current_time)
    telemetry = Telemetry(tmp_path, recorder, counting, lambda: 100.0, NoSpans())
    async with telemetry.running():
        observed = ObservedSnapshots(
            cast(Snapshots, Snapshotter()),
            telemetry,
            lambda: 100.0,
            lambda name: frozenset(),
            STATE,
            nursery,
        )
        prompt = ObservedPrompt(Prompt(), observed, lambda: 100.0, lambda: 1.0)
        prepared = await trio.to_thread.run_sync(prompt.prepare, "default/3/redis", "chain", {})
        assert prepared == overlay(UPPER, COLD)
        assert await trio.to_thread.run_sync(prompt.mounts, "default/3/redis") is None
        await trio.testing.wait_all_tasks_blocked()
        await telemetry.flush()
        (start,) = telemetry.journal.starts()
        assert (start.key, start.began, start.fuse) == ("default/3/redis", 100.0, True)
        counters = telemetry.journal.counters()
        assert counters["fusesnap_snapshot_call_seconds_count", "call=prepare"] == 1
        assert ("fusesnap_snapshot_call_seconds_count", "call=mounts") not in counters


def test_a_reader_in_our_own_namespace_or_gone_is_in_no_container(tmp_path: Path) -> None:
    assert upper_of_reader(os.getpid()) is None
    assert upper_of_reader(2**22 + 1) is None


def test_a_reader_is_in_the_container_whose_overlay_is_its_root(tmp_path: Path) -> None:
    for pid, namespace in (("self", "mnt:[1]"), ("7", "mnt:[2]")):
        (tmp_path / pid / "ns").mkdir(parents=True)
        (tmp_path / pid / "ns/mnt").symlink_to(namespace)
    mounts = tmp_path / "7/mountinfo"
    line = f"21 20 0:30 / / rw - overlay overlay rw,lowerdir=/l,{UPPER},workdir=/w\n"
    mounts.write_text(line + "22 21 0:31 / /proc rw - proc proc rw\n")
    assert upper_of_reader(7, tmp_path) == f"{STATE}/snapshots/3/fs"
    mounts.write_text("21 20 8:1 / / rw - ext4 /dev/sda rw\n")
    assert upper_of_reader(7, tmp_path) is None
