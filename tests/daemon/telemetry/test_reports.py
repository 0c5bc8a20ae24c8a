"""How a person names a start, and how it is found on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from pydantic import TypeAdapter

from fusesnap.daemon.telemetry.counting import Counters, Counting
from fusesnap.daemon.telemetry.journal import Batch, Journal
from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.recorder import Recorder
from fusesnap.daemon.telemetry.reports import StartReports, find, report
from fusesnap.daemon.telemetry.spans import NoSpans
from fusesnap.daemon.telemetry.start import QUIET, Start
from fusesnap.errors import InvalidArgument, NotFound

from ...cli.waterfall.samples import BEGAN, CHAIN, FETCHES, RECORD, WAITS, sample, wait

ID = "0123456789abcdef"
OTHER = replace(RECORD, key="default/13/redis", upper="/s/8/fs")
LATER = replace(RECORD, key="k8s.io/14/redis", upper="/s/9/fs")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path)
    late = wait(9, FETCHES[0].path, 10 + QUIET, 11 + QUIET)
    opened.write(Batch(FETCHES, [*WAITS, late], [OTHER, RECORD], {RECORD.parent: CHAIN}))
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "target", [RECORD.key, ID, f"containerd://{ID}", ID[:8], f"12/{ID}", "0123"]
)
def test_a_container_is_named_by_its_id_or_its_snapshots_key(target: str) -> None:
    assert find(target, [OTHER, RECORD]) == RECORD


def test_of_several_starts_of_one_key_the_newest_is_meant() -> None:
    newest = replace(RECORD, began=BEGAN + 100)
    assert find(ID, [newest, RECORD]) == newest


def test_a_name_that_is_several_is_refused_with_all_of_them() -> None:
    with pytest.raises(InvalidArgument, match=r"default/13/redis, k8s\.io/14/redis"):
        find("redis", [LATER, OTHER, RECORD])
    assert find("k8s.io/14/redis", [LATER, OTHER]) == LATER


@pytest.mark.parametrize("target", ["", "012", "edis", "unknown", "/", "containerd://"])
def test_a_name_that_is_none_is_refused_with_what_there_is(target: str) -> None:
    with pytest.raises(NotFound, match=f"known are, the newest first: {OTHER.key}, {RECORD.key}"):
        find(target, [OTHER, RECORD])


def test_many_are_not_all_listed() -> None:
    many = [replace(RECORD, key=f"default/{number}/x{number}") for number in range(12)]
    with pytest.raises(NotFound, match="default/9/x9 and 2 more"):
        find("redis", many)


def test_without_any_start_it_says_that() -> None:
    with pytest.raises(NotFound, match="none is: nothing was started with fusesnap within 7 days"):
        find("redis", [])


def test_a_report_is_what_the_journal_holds_of_one_start(journal: Journal) -> None:
    start, count = report(journal, RECORD, 1)
    assert (start, count) == (replace(sample(), later=1), 2)
    second, _ = report(journal, RECORD, 2)
    assert (second.prepared, second.began) == (None, BEGAN + 10 + QUIET)
    assert [row.path for row in second.rows] == [FETCHES[0].path]


def test_a_start_that_is_not_over_goes_on_until_now(journal: Journal) -> None:
    waiting = replace(wait(1, FETCHES[0].path, 1, None), session="lives")
    dead = replace(wait(1, FETCHES[1].path, 2, None), session="dead")
    journal.write(Batch(waits=[replace(each, upper=OTHER.upper) for each in (waiting, dead)]))
    start, _ = report(journal, OTHER, 1, "lives", BEGAN + 20)
    assert start.seconds == pytest.approx(20)
    (row,) = [row for row in start.rows if row.on_chain]
    assert [(each.begin, each.error) for each in row.waits] == [(1, "it still waits")]
    over, _ = report(journal, OTHER, 1, None, BEGAN + 20)
    assert over.seconds == pytest.approx(2)


def test_a_container_that_never_waited_has_one_start(journal: Journal) -> None:
    start, count = report(journal, OTHER, 1)
    assert (start.key, start.chain_waits, count) == (OTHER.key, 0, 1)


@pytest.mark.parametrize("number", [0, 3])
def test_a_start_that_there_is_not_is_refused(journal: Journal, number: int) -> None:
    with pytest.raises(InvalidArgument, match=f"start {number} was asked for; it waited in 2"):
        report(journal, RECORD, number)


async def test_answers_are_json_and_the_newest_is_in_them(tmp_path: Path, journal: Journal) -> None:
    flushed = []

    async def flush() -> str | None:
        flushed.append(True)
        return "two"

    recorder = Recorder("two", lambda: BEGAN, lambda pid: None)
    counting = Counting(Counters(), trio.current_time)
    kept = Telemetry(tmp_path, recorder, counting, lambda: BEGAN, NoSpans())
    async with kept.running() as telemetry:
        reports = StartReports(telemetry, flush, lambda: BEGAN + 9)
        telemetry.started(LATER)
        listed = await reports.starts({})
        assert [each["key"] for each in listed["starts"]] == [
            LATER.key,
            RECORD.key,
            OTHER.key,
        ]
        answer = await reports.report({"target": ID, "number": 1})
        with pytest.raises(NotFound):
            await reports.report({})
    assert flushed
    assert TypeAdapter(Start).validate_python(answer["start"]) == replace(sample(), later=1)
