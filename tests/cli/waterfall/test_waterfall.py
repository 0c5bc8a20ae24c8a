"""A start as SVG, as a page, and as text: all of it is there, and nothing that a stranger wrote is markup."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fusesnap.cli.waterfall.chart import MOST_ROWS, TICKS, chart, seconds, ticks
from fusesnap.cli.waterfall.page import page
from fusesnap.cli.waterfall.svg import WIDTH, svg
from fusesnap.cli.waterfall.text import LETTERS, show
from fusesnap.daemon.telemetry.records import Phase
from fusesnap.daemon.telemetry.start import Start, start_of

from .samples import RECORD, WHOLE, base, fetch, nothing, sample, wait

SVG = "{http://www.w3.org/2000/svg}"


def many(count: int) -> Start:
    """A start of more paths than can be drawn, of which it waited for the last."""
    fetches = [fetch(n % 10, f"path-{n}", (0.1, 0.2, 0.3, 0.4, 0.5)) for n in range(count)]
    chain = frozenset(each.path for each in fetches)
    return start_of([wait(1, fetches[-1].path, 0.1, 0.5)], fetches, RECORD, chain)


def text_of(start: Start, *, terminal: bool = False, width: int = 140) -> str:
    out = io.StringIO()
    show(chart(start), Console(file=out, force_terminal=terminal, width=width, highlight=False))
    return out.getvalue()


def test_the_longest_chain_and_its_reason_are_said() -> None:
    shown = chart(sample())
    assert shown.verdict == (
        "The longest chain is 3 waits, one after another: 2.61 s, 95 % of the start."
    )
    assert shown.why == "Most of it (63 %) was the link: bytes came as fast as they could."
    assert [fact.value for fact in shown.facts] == [
        "2.74 s",
        "2.61 s",
        "3 of 4",
        "5.6 MB",
        "23.0 Mbit/s",
        "58 %",
    ]


@pytest.mark.parametrize("phase", Phase)
def test_each_phase_has_its_reason(phase: Phase) -> None:
    shown = chart(replace(sample(), chain_phases={phase: 2.61}))
    assert shown.why.startswith("Most of it (100 %) was ")


def test_the_picture_is_well_formed_and_within_its_frame() -> None:
    for start in (sample(), nothing(), many(100)):
        root = ET.fromstring(svg(chart(start)))  # noqa: S314
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        assert width == WIDTH
        for node in root.iter():
            right = float(node.get("x", 0)) + float(node.get("width", 0))
            bottom = float(node.get("y", 0)) + float(node.get("height", 0))
            assert right <= width + 0.1
            assert bottom <= height


def test_every_phase_of_every_row_is_drawn_and_the_chain_is_joined() -> None:
    root = ET.fromstring(svg(chart(sample())))  # noqa: S314
    groups = root.findall(f"{SVG}g")
    assert len(groups) == 5
    kinds = [[rect.get("class") for rect in group.findall(f"{SVG}rect")] for group in groups]
    assert kinds[0] == ["tint", "asking", "transfer", "verify"]
    assert kinds[3] == ["queued", "asking", "transfer", "verify"]
    assert kinds[4] == ["tint", "disk"]
    chains = [line for line in root.iter(f"{SVG}line") if line.get("class") == "chain"]
    assert len(chains) == 4  # one is the legend's
    assert len([path for path in root.iter(f"{SVG}path") if path.get("class") == "step"]) == 2


def test_a_picture_needs_no_other_file_and_runs_nothing() -> None:
    for text in (svg(chart(sample())), page(chart(sample()))):
        assert "<script" not in text
        for word in ("href=", "src=", "url(", "@import"):
            assert word not in text
        assert "prefers-color-scheme: dark" in text


@given(st.text(min_size=1, max_size=60))
def test_what_strangers_wrote_is_never_markup(words: str) -> None:
    odd = replace(fetch(1, "x", (0, 0, 1, 2, 3)), path=base(1, words), error=words)
    waits = [replace(wait(1, odd.path, 0, 3), command=words, file=words)]
    start = start_of(waits, [odd], RECORD, frozenset([odd.path]))
    shown = chart(replace(start, key=words, bytes_by_cache={words: 1}))
    root = ET.fromstring(svg(shown))  # noqa: S314
    assert len(root.findall(f"{SVG}g")) == 1
    tags: set[str] = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            tags.add(tag)

    Tags().feed(page(shown))
    assert tags <= {
        *("html", "head", "meta", "title", "style", "body", "svg", "rect", "text", "line"),
        *("circle", "path", "g", "h2", "div", "table", "tr", "th", "td"),
    }


def test_no_name_moves_a_terminals_cursor() -> None:
    odd = fetch(1, "\x1b[2Jx\r", (0, 0, 1, 2, 3))
    waits = [replace(wait(1, odd.path, 0, 3), command="\x1b]0;title\x07")]
    start = start_of(waits, [odd], RECORD, frozenset([odd.path]))
    assert "\x1b" not in text_of(replace(start, key="\x9b1m"))
    assert "\x9b" not in text_of(replace(start, key="\x9b1m"))


def test_more_rows_than_anybody_reads_are_folded_and_the_chain_stays() -> None:
    shown = chart(many(MOST_ROWS + 30))
    assert len(shown.rows) == MOST_ROWS
    assert shown.rows[-1].row.on_chain
    assert shown.folded == "and 30 more paths of this container, 30.0 MB"


def test_paths_of_the_same_name_are_told_apart() -> None:
    fetches = [fetch(digit, "same", (0, 0, 1, 2, 3)) for digit in (1, 2)]
    chain = frozenset(each.path for each in fetches)
    labels = [row.label for row in chart(start_of([], fetches, RECORD, chain)).rows]
    assert labels == ["same (111111)", "same (222222)"]


def test_a_failure_is_shown_with_its_reason() -> None:
    failed = replace(fetch(1, "x", (0, 0, 1, 2, 3)), error="HTTP 500 from a cache")
    start = start_of([wait(1, failed.path, 0, 3)], [failed], RECORD, frozenset([failed.path]))
    for text in (svg(chart(start)), page(chart(start))):
        assert "HTTP 500 from a cache" in text
    assert "failed" in text_of(start)


def test_text_in_a_file_has_no_colours_and_a_letter_for_each_phase() -> None:
    text = text_of(sample())
    assert "\x1b" not in text
    lines = text.splitlines()
    (glibc,) = [line for line in lines if "glibc" in line]
    assert glibc.startswith("▶ glibc-2.40-66")
    bar = glibc.split("glibc-2.40-66")[1].split("redis-server")[0].strip()
    assert list(dict.fromkeys(bar)) == [LETTERS[phase] for phase in WHOLE]
    assert max(map(len, lines)) <= 120
    assert "3.0 MB from https://cache.example.org" in lines
    assert "2 waits more came after 30 s of quiet: see --number" in lines


def test_text_on_a_terminal_fits_it() -> None:
    for width in (100, 200):
        text = text_of(sample(), terminal=True, width=width)
        assert "\x1b[" in text
        assert "█" in text


def test_nothing_to_wait_for_is_good_news() -> None:
    assert "Everything was here before it started" in text_of(nothing())
    cold = replace(nothing(), fuse=True)
    assert "Nothing in this container has waited" in text_of(cold)


@given(st.floats(min_value=1e-3, max_value=1e5))
def test_an_axis_has_some_round_numbers(length: float) -> None:
    found = ticks(length)
    assert found[0] == 0
    assert found[-1] <= length
    assert 3 <= len(found) <= TICKS + 1


@pytest.mark.parametrize(("count", "said"), [(0.0314, "31 ms"), (1, "1.00 s"), (75.5, "75.50 s")])
def test_seconds_have_units(count: float, said: str) -> None:
    assert seconds(count) == said
