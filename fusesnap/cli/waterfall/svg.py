"""A start as SVG: one file that needs no other, in the colours that its reader prefers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import pairwise
from typing import Final

from fusesnap.cli.waterfall.chart import WORDS, Chart, ChartRow, seconds
from fusesnap.daemon.telemetry.records import Phase
from fusesnap.daemon.telemetry.start import Wait

WIDTH: Final = 1180
MARGIN: Final = 28
LEFT: Final = 318  # of the bars
RIGHT: Final = 1030
ROW: Final = 34
BAR: Final = 13
LINK_HEIGHT: Final = 46
LONGEST_LABEL: Final = 40
# Where the rows begin, below the head: title, verdict, facts, legend, use of the link, axis.
TOP: Final = 332
FACT_WIDTH: Final = 180
PREPARE_SHOWN: Final = 4
PREPARE_LABEL: Final = 50
LEGEND_GAP: Final = 38
CHARACTER: Final = 6.4  # of the legend's text, about

STYLE: Final = """
.fusesnap { --paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --rule: #d9dfe5; --tint: #fdf1f0;
  --queued: #c3cad1; --asking: #e9a115; --transfer: #2f7de1; --paused: #58b7c4; --verify: #1f9d57; --disk: #8c6bd6;
  --others: #b9c1c9; --chain: #cf222e;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 12px; }
@media (prefers-color-scheme: dark) { .fusesnap { --paper: #0f141a; --ink: #e6edf3; --quiet: #9aa5b1;
  --rule: #2b333d; --tint: #2a1719; --queued: #57616c; --asking: #e3b341; --transfer: #58a0f7;
  --paused: #2f7d88; --verify: #46c07a; --disk: #a98df0; --others: #4a545f; --chain: #ff7b72; } }
.fusesnap text { fill: var(--ink); }
.fusesnap .paper { fill: var(--paper); }
.fusesnap .quiet { fill: var(--quiet); }
.fusesnap .title { font-size: 22px; font-weight: 650; }
.fusesnap .verdict { font-size: 14px; }
.fusesnap .value { font-size: 19px; font-weight: 650; }
.fusesnap .name { font-size: 12.5px; }
.fusesnap .small { font-size: 11px; }
.fusesnap .strong { font-weight: 700; }
.fusesnap .end { text-anchor: end; }
.fusesnap .middle { text-anchor: middle; }
.fusesnap .rule { stroke: var(--rule); stroke-width: 1; }
.fusesnap .tint { fill: var(--tint); }
.fusesnap .queued { fill: var(--queued); } .fusesnap .asking { fill: var(--asking); }
.fusesnap .transfer { fill: var(--transfer); } .fusesnap .paused { fill: var(--paused); }
.fusesnap .verify { fill: var(--verify); }
.fusesnap .disk { fill: var(--disk); } .fusesnap .others { fill: var(--others); }
.fusesnap .wait { stroke: var(--quiet); stroke-width: 2.5; stroke-linecap: round; }
.fusesnap .chain { stroke: var(--chain); stroke-width: 4; stroke-linecap: round; }
.fusesnap .step { stroke: var(--chain); stroke-width: 1.2; stroke-dasharray: 2 3; fill: none; }
.fusesnap .prepared { stroke: var(--quiet); stroke-width: 1.2; stroke-dasharray: 2 3; }
.fusesnap .served { fill: var(--paper); stroke: var(--quiet); stroke-width: 2; }
.fusesnap .served.on { stroke: var(--chain); }
.fusesnap .failed { fill: var(--chain); }
"""


def svg(chart: Chart) -> str:
    """The whole picture."""
    height = TOP + ROW * max(1, len(chart.rows)) + (30 if chart.folded else 10) + MARGIN
    body = "\n".join(
        [
            f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
            *_head(chart),
            *_legend(),
            *_link(chart),
            *_axis(chart, height),
            *_rows(chart),
            *_chain(chart),
            *_foot(chart, height),
        ]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fusesnap" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{escape(chart.title)}: {escape(chart.verdict)} {escape(chart.why)}">\n'
        f"<title>{escape(chart.title)}: what its start waited for</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _x(chart: Chart, moment: float) -> float:
    share = min(1.0, max(0.0, moment / chart.seconds))
    return round(LEFT + share * (RIGHT - LEFT), 1)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def _head(chart: Chart) -> Iterator[str]:
    yield _text(MARGIN, 46, chart.title, "title")
    yield _text(MARGIN, 67, chart.subtitle, "quiet")
    yield _text(MARGIN, 96, chart.verdict, "verdict")
    yield _text(MARGIN, 116, chart.why, "verdict")
    for number, fact in enumerate(chart.facts):
        x = MARGIN + number * FACT_WIDTH
        yield _text(x, 156, fact.value, "value")
        yield _text(x, 173, fact.label, "quiet small")


def _legend() -> Iterator[str]:
    x, y = float(MARGIN), 206
    for phase in Phase:
        yield f'<rect x="{x:g}" y="{y - 10}" width="14" height="11" rx="2" class="{phase.value}"/>'
        yield _text(x + 20, y, WORDS[phase])
        x += LEGEND_GAP + len(WORDS[phase]) * CHARACTER
    x, y = float(MARGIN), y + 21
    for kind, words in (("wait", "a reader is blocked"), ("chain", "the longest chain")):
        yield f'<line x1="{x:g}" x2="{x + 16:g}" y1="{y - 4}" y2="{y - 4}" class="{kind}"/>'
        yield _text(x + 24, y, words)
        x += LEGEND_GAP + 2 + len(words) * CHARACTER
    yield f'<circle cx="{x + 5:g}" cy="{y - 4}" r="3.6" class="served"/>'
    yield _text(x + 15, y, "served")


def _link(chart: Chart) -> Iterator[str]:
    """How the link was used: bytes a second, those of others on top."""
    bottom = 250 + LINK_HEIGHT
    rates = [
        (link, 8 * (link.mine + link.others) / link.seconds / 1e6) for link in chart.start.links
    ]
    most = max([rate for _, rate in rates], default=0.0)
    yield _text(MARGIN, bottom - 22, "bytes over the link", "name")
    if most <= 0:
        yield _text(MARGIN, bottom - 6, "none came", "quiet small")
        return
    foreign = chart.start.bytes_of_others > 0
    words = f"up to {most:.1f} Mbit/s" + ("; grey: for others" if foreign else "")
    yield _text(MARGIN, bottom - 6, words, "quiet small")
    for link, _ in rates:
        x, end = _x(chart, link.begin), _x(chart, link.begin + link.seconds)
        y = float(bottom)
        for kind, came in (("transfer", link.mine), ("others", link.others)):
            tall = LINK_HEIGHT * 8 * came / link.seconds / 1e6 / most
            if tall > 0:
                y -= tall
                yield (
                    f'<rect x="{x:g}" y="{y:.1f}" width="{end - x:.1f}" height="{tall:.1f}" class="{kind}"/>'
                )


def _axis(chart: Chart, height: int) -> Iterator[str]:
    bottom = height - MARGIN - (20 if chart.folded else 0)
    for tick in chart.ticks:
        x = _x(chart, tick)
        yield f'<line x1="{x:g}" x2="{x:g}" y1="250" y2="{bottom}" class="rule"/>'
        yield _text(x, TOP - 14, f"{tick:g} s", "quiet small middle")
    prepared = chart.start.prepared
    if prepared is not None and _x(chart, prepared) - LEFT > PREPARE_SHOWN:
        x = _x(chart, prepared)
        yield f'<line x1="{x:g}" x2="{x:g}" y1="{TOP - 8}" y2="{bottom}" class="prepared"/>'
        if x - LEFT > PREPARE_LABEL:  # otherwise the number at 0 has its place
            yield _text(x, TOP - 14, "prepared", "quiet small middle")


def _rows(chart: Chart) -> Iterator[str]:
    for number, row in enumerate(chart.rows):
        yield from _row(chart, row, TOP + ROW * number)


def _row(chart: Chart, shown: ChartRow, top: int) -> Iterator[str]:
    row = shown.row
    yield f"<g><title>{escape(_hint(shown))}</title>"
    if row.on_chain:
        yield (
            f'<rect class="tint" x="{MARGIN - 10}" y="{top}" width="{WIDTH - 2 * MARGIN + 20}" '
            f'height="{ROW - 2}" rx="5"/>'
        )
    strong = " strong" if row.on_chain else ""
    yield _text(MARGIN, top + 14, _cut(shown.label), "name" + strong)
    yield _text(MARGIN, top + 27, _cut(shown.by, LONGEST_LABEL + 6), "quiet small")
    for segment in row.segments:
        x, end = _x(chart, segment.begin), _x(chart, segment.end)
        yield (
            f'<rect x="{x:g}" y="{top + 6}" width="{max(0.8, end - x):.1f}" height="{BAR}" '
            f'class="{segment.phase.value}"/>'
        )
    for wait in sorted(row.waits, key=lambda wait: wait.on_chain):
        yield from _wait(chart, wait, top)
    kind = "small end" + (" failed" if row.error else "")
    yield _text(WIDTH - MARGIN, top + 17, "failed" if row.error else shown.measure, kind + strong)
    yield "</g>"


def _wait(chart: Chart, wait: Wait, top: int) -> Iterator[str]:
    y = top + 25
    x, end = _x(chart, wait.begin), _x(chart, wait.end)
    kind = "chain" if wait.on_chain else "wait"
    yield f'<line x1="{x:g}" x2="{end:g}" y1="{y}" y2="{y}" class="{kind}"/>'
    if wait.error is not None:
        return  # it was not served
    yield (
        f'<circle cx="{end:g}" cy="{y}" r="3.6" class="served{" on" if wait.on_chain else ""}"/>'
    )


def _chain(chart: Chart) -> Iterator[str]:
    """From the end of each wait of the chain to the beginning of the next."""
    waits = sorted(
        (wait.begin, wait.end, TOP + ROW * number + 25)
        for number, shown in enumerate(chart.rows)
        for wait in shown.row.waits
        if wait.on_chain
    )
    for (_, end, y), (begin, _, below) in pairwise(waits):
        if y != below:
            yield (
                f'<path class="step" d="M{_x(chart, end):g} {y} V{(y + below) / 2:g} '
                f'H{_x(chart, begin):g} V{below}"/>'
            )


def _foot(chart: Chart, height: int) -> Iterable[str]:
    if not chart.rows:
        yield _text(MARGIN, TOP + 20, "no store path was waited for or fetched", "quiet")
    if chart.folded:
        yield _text(MARGIN, height - MARGIN, chart.folded, "quiet small")


def _hint(shown: ChartRow) -> str:
    """What a pointer on a row shows."""
    row = shown.row
    lines = [row.path, f"{shown.by}; {shown.measure}", *(f"from {cache}" for cache in row.caches)]
    lines += [
        f"{WORDS[segment.phase]}: {seconds(segment.end - segment.begin)}"
        for segment in row.segments
    ]
    if row.retries:
        lines.append(f"its transfer began again {row.retries} times")
    if row.error:
        lines.append(row.error)
    return "\n".join(lines)


def _cut(words: str, length: int = LONGEST_LABEL) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"
