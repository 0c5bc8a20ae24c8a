"""The status as a person reads it."""

from __future__ import annotations

from typing import Any

import click
import pytest

from fusesnap.cli.status import lines, size, table

PATH = "/nix/store/" + "0" * 32 + "-jdk"


def wait(seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "operation": "lookup",
        "path": PATH,
        "file": "bin",
        "probable_readers": [{"pid": 42, "command": "java"}],
        "asked": True,
        "seconds": seconds,
        "for": "transfer",
        "cache": "http://cache",
        "received": 1_200_000,
        "expected": 30_000_000,
        "rate": 20_000.0,
        "idle": 12.0,
        "gives_up_in": 108.0,
        "snapshots": ["default/3/one"],
    } | changes


def answer(**changes: Any) -> dict[str, Any]:
    return {
        "state": "/var/lib/fusesnap",
        "address": "/var/lib/fusesnap/fusesnap.sock",
        "fuse_mount": "/var/lib/fusesnap/lazy",
        "stall_timeout": 120.0,
        "paths": {"valid": 1, "committed": 2, "missing": 3},
        "caches": [
            {
                "url": "http://cache",
                "narinfos": 5,
                "bytes": 1_200_000,
                "last_error": None,
                "breaker": "closed",
                "retry_in": 0.0,
                "avoided_for": 0.0,
            }
        ],
        "store": {
            "size": 3_000_000,
            "paths": 2,
            "collectable_size": 1_000_000,
            "collectable_paths": 1,
            "max_size": 50_000_000_000,
            "min_free": 0,
            "free": 7_000_000_000,
            "over": 0,
        },
        "fetching": [],
        "requested": {},
        "link": None,
        "waiting": [],
        "errors": [],
        "depend_on_fuse": [],
        "worker": {"pid": 11},
        "services": {"pid": 12},
        "supervisor": {"pid": 10},
    } | changes


def shown(**changes: Any) -> list[str]:
    return [click.unstyle(line) for line in lines(answer(**changes))]


def test_the_longest_wait_comes_first_and_all_of_it_is_there() -> None:
    waits = [wait(3.0, probable_readers=[], snapshots=[]), wait(75.5, idle=1.0)]
    said = shown(waiting=waits)
    assert "waiting    2, an error after 120 s without progress" in said
    first, second = said[-2:]
    for part in (
        "75.5 s",
        "java (42) in default/3/one",
        "lookup",
        "1.2 MB of 30.0 MB",
        "20.0 kB/s",
    ):
        assert part in first
    assert first.endswith(f"{PATH}/bin")
    assert "unknown" in second
    assert first.index(PATH) == second.index(PATH)


def test_a_reader_that_is_only_probable_is_marked() -> None:
    assert "java? (42)" in shown(waiting=[wait(1.0, asked=False)])[-1]


def test_what_has_not_begun_shows_no_bytes() -> None:
    line = shown(waiting=[wait(1.0, **{"for": "narinfo", "cache": None})])[-1]
    assert "narinfo" in line
    assert "MB" not in line


def test_without_waits_it_says_so() -> None:
    assert shown()[-1] == "waiting    nobody"


def test_a_worker_that_is_away_is_named() -> None:
    said = shown(worker={"pid": None, "error": "no answer within 3 s"})
    assert any("no worker answers: no answer within 3 s" in line for line in said)


def test_errors_and_dependents_are_listed() -> None:
    error = {
        "kind": "deadline",
        "cache": "http://cache",
        "count": 3,
        "last": f"{PATH}: no progress",
    }
    said = shown(errors=[error], depend_on_fuse=["default/3/one", "default/4/two"])
    assert f"errors     3  deadline  http://cache  last: {PATH}: no progress" in said
    assert "on fuse    default/3/one" in said
    assert "           default/4/two" in said


def test_how_urgent_a_path_is_and_what_comes_later_are_shown() -> None:
    flight = wait(1.0, priority="completion", received=1_200_000, waiting=0, **{"for": "pause"})
    del flight["operation"]
    measured = {"rate": 2_500_000.0, "round_trips": {"http://cache": 0.08, "http://other": 0}}
    said = shown(fetching=[flight], link=measured, requested={"completion": 7, "prefetch": 1})
    (line,) = [each for each in said if each.startswith("fetching")]
    assert "completion  1.2 MB of 30.0 MB, paused" in line
    assert "link       carried up to 2.5 MB/s; round trips: http://cache 80 ms" in said
    assert "           later: 7 for completion, 1 for prefetch" in said


def test_columns_are_aligned_whatever_their_colour() -> None:
    rows = [["a", click.style("bb", fg="red"), "c"], ["aaa", "b", "c"]]
    assert [click.unstyle(line) for line in table(rows)] == ["a    bb  c", "aaa  b   c"]
    assert table([]) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "?"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2 * 10**12, "2000.0 GB")],
)
def test_sizes_have_units(count: int | None, text: str) -> None:
    assert size(count) == text


def test_a_cache_that_is_not_asked_says_so_and_when_it_will_be() -> None:
    down = {
        "breaker": "open",
        "retry_in": 7.25,
        "last_error": "http://cache: no connection: Connection refused",
    }
    bad = {"avoided_for": 41.0, "last_error": "http://cache: hash is wrong"}
    shown = []
    for changes in ({}, down, {"breaker": "half-open"}, {"retry_in": 12.0}, bad):
        caches = [answer()["caches"][0] | changes]
        line = next(line for line in lines(answer(caches=caches)) if line.startswith("cache"))
        shown.append(click.unstyle(line).partition("1.2 MB  ")[2])
    assert shown == [
        "closed  ok",
        "open, tried in 7.2 s  last error: http://cache: no connection: Connection refused",
        "half-open  ok",
        "silent for 12 s  ok",
        "closed  avoided for 41 s, last error: http://cache: hash is wrong",
    ]


def test_a_store_beyond_its_limits_says_what_to_do() -> None:
    store = answer()["store"]
    for over, said in (
        (0, "7.0 GB free on the disk"),
        (900_000, "; 900.0 kB beyond its limits, to be removed"),
        (2_000_000, "; 2.0 MB BEYOND ITS LIMITS, and too much is in use: delete images"),
    ):
        (line,) = (
            each for each in shown(store=store | {"over": over}) if each.startswith("store ")
        )
        assert line.endswith(said)
