"""What a person sees of long work on a terminal, and the little that is said elsewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from fusesnap.cli.prefetch import total
from fusesnap.cli.progress import FetchProgress, LiveLine, how_far, line_of
from fusesnap.daemon.prefetch import Prefetched
from fusesnap.daemon.watching import share_of, summary
from fusesnap.fetch.flight import FlightState, Reader
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath

MB = 1_000_000
COMING = FlightState(
    path=StorePath("0" * 32, "glibc-2.40"),
    cache="http://cache",
    received=MB,
    expected=3 * MB,
    seconds=1.0,
    waiting=0,
    readers=(),
    queued=False,
    priority=Priority.PREFETCH,
    paused=False,
    verifying=False,
    idle=0.0,
    rate=0.5 * MB,
)
QUEUED = replace(COMING, queued=True, received=0, cache=None)
ASKING = replace(COMING, received=0, cache=None)
PAUSED = replace(COMING, paused=True)
VERIFYING = replace(COMING, received=3 * MB, verifying=True)
WAITED_FOR = replace(COMING, waiting=2, readers=(Reader(7, "cat"), Reader(8, "wc")))


@pytest.mark.parametrize(
    ("flight", "said"),
    [
        (COMING, "1.0 MB of 3.0 MB, 500.0 kB/s, 4 s left"),
        (replace(COMING, expected=None), "1.0 MB, 500.0 kB/s"),
        (replace(COMING, rate=0.0), "1.0 MB of 3.0 MB, 0 B/s"),
        (QUEUED, "others are before it"),
        (ASKING, "asking caches for it"),
        (PAUSED, "paused for others"),
        (VERIFYING, "verifying"),
    ],
)
def test_how_far_a_path_is(flight: FlightState, said: str) -> None:
    assert how_far(flight) == said


def test_a_line_says_who_waits_for_what_before_anything_else() -> None:
    assert line_of([COMING, WAITED_FOR, QUEUED]) == (
        "cat (7) and wc (8) wait for glibc-2.40: 1.0 MB of 3.0 MB, 500.0 kB/s, 4 s left; 2 more"
    )
    assert line_of([COMING]).startswith("fetching glibc-2.40: ")
    assert line_of([replace(WAITED_FOR, readers=())]).startswith("somebody waits for glibc-2.40")
    assert line_of([COMING] * 5).endswith("; 2 more")
    assert line_of([]) == ""


def test_many_fetches_are_summed_up() -> None:
    flights = [QUEUED, COMING, ASKING, VERIFYING, QUEUED, COMING, PAUSED]
    assert summary(flights) == (
        "2 coming, 1 being verified, 1 being asked for, 2 in line, 1 paused: glibc-2.40"
    )
    assert summary([QUEUED]) == "1 in line"
    assert summary([]) == "looking at what is here"


def test_what_is_partly_here_counts_partly() -> None:
    assert share_of(COMING) == pytest.approx(1 / 3)
    assert share_of(VERIFYING) == 1
    assert share_of(replace(COMING, expected=None)) == 0
    assert share_of(replace(COMING, received=9 * MB)) == 1


def test_the_last_line_has_the_totals() -> None:
    done = Prefetched(34, 48_300_000, 17, received=7_400_000, seconds=3.2)
    assert total(done) == (
        "34 paths, 48.3 MB of NARs; 7.4 MB came in 3.2 s (2.3 MB/s): 17 fetched, the rest was there"
    )
    assert total(Prefetched(1, 5, 0)) == "1 paths, 5 B of NARs: 0 fetched, the rest was there"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_and_nothing_is_said_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for file, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", file)
        with FetchProgress() as bar:
            bar.update("asking for narinfos: 3 so far", 0, 0)
            bar.update("2 coming", 10 * MB, 20 * MB)
        said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
        assert ("2 coming" in said) == drawn
        assert ("10.0/20.0 MB" in said) == drawn
        if not drawn:
            assert said == ""


def test_a_live_line_ends_with_what_came_for_somebody_who_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for file, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", file)
        with LiveLine() as line:
            line.say("mounted")
            line.update([COMING])
            line.end({"http://cache": 5 * MB, "http://other": 0})
        assert ("fetching glibc-2.40" in file.getvalue()) == drawn
        assert ("fetched 5.0 MB from http://cache" in file.getvalue()) == drawn
    assert capsys.readouterr().out == "mounted\nmounted\n"
