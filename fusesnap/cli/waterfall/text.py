"""A start as text: coloured bars on a terminal, characters that differ elsewhere."""

from __future__ import annotations

from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fusesnap.cli.status import size
from fusesnap.cli.waterfall.chart import WORDS, Chart, ChartRow, seconds
from fusesnap.daemon.telemetry.records import Phase
from fusesnap.daemon.telemetry.start import QUIET, Row

STYLES: Final = {
    Phase.QUEUED: "bright_black",
    Phase.ASKING: "yellow",
    Phase.TRANSFER: "blue",
    Phase.PAUSED: "cyan",
    Phase.VERIFY: "green",
    Phase.DISK: "magenta",
}
# Without colours each phase has a character of its own.
LETTERS: Final = {
    Phase.QUEUED: ".",
    Phase.ASKING: "-",
    Phase.TRANSFER: "=",
    Phase.PAUSED: ":",
    Phase.VERIFY: "#",
    Phase.DISK: "~",
}
BLOCKED, UNSEEN = "█", "▂"  # somebody waits meanwhile, or nobody
CHAIN: Final = "▶"
PIPED_WIDTH: Final = 120
NARROWEST_BAR, WIDEST_BAR = 20, 100
OTHER_COLUMNS: Final = 70
LABEL: Final = 30


def text(chart: Chart, *, coloured: bool, width: int) -> RenderableType:
    """The whole picture, ``width`` columns wide."""
    bar = min(WIDEST_BAR, max(NARROWEST_BAR, width - OTHER_COLUMNS))
    parts: list[RenderableType] = [
        Text.assemble((chart.title, "bold"), "  ", (chart.subtitle, "dim")),
        Text(f"{chart.verdict} {chart.why}".rstrip()),
        Text(""),
    ]
    if chart.rows:
        parts += [_rows(chart, bar, coloured=coloured)]
    if chart.folded:
        parts += [Text(chart.folded, "dim")]
    if chart.rows:
        parts += [Text(""), _legend(coloured=coloured)]
    return Group(*parts, _totals(chart))


def show(chart: Chart, console: Console) -> None:
    """Print it where ``console`` goes: as wide as a terminal is, and legible in a file."""
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(text(chart, coloured=console.is_terminal, width=console.width))


def _rows(chart: Chart, bar: int, *, coloured: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    table.add_column("  PATH", max_width=LABEL, no_wrap=True, overflow="ellipsis")
    table.add_column(_axis(chart, bar), no_wrap=True, min_width=bar)
    table.add_column("ASKED BY", no_wrap=True, max_width=22, overflow="ellipsis")
    table.add_column("", justify="right", no_wrap=True)
    for shown in chart.rows:
        table.add_row(
            _label(shown),
            _bar(chart, shown, bar, coloured=coloured),
            Text(shown.by, "dim"),
            Text("failed", "red") if shown.row.error else Text(shown.measure),
        )
    return table


def _label(shown: ChartRow) -> Text:
    if shown.row.on_chain:
        return Text.assemble((CHAIN, "bold red"), (f" {shown.label}", "bold"))
    return Text(f"  {shown.label}")


def _axis(chart: Chart, bar: int) -> Text:
    cells = [" "] * bar
    for tick in chart.ticks:
        words = f"|{tick:g} s"
        place = int(tick / chart.seconds * bar)
        if place + len(words) <= bar and all(
            cell == " " for cell in cells[place : place + len(words)]
        ):
            cells[place : place + len(words)] = words
    return Text("".join(cells))


def _bar(chart: Chart, shown: ChartRow, bar: int, *, coloured: bool) -> Text:
    line = Text()
    step = chart.seconds / bar
    for number in range(bar):
        phase = _phase(shown.row, number * step, (number + 1) * step)
        if phase is None:
            line.append(" ")
        elif coloured:
            blocked = _blocked(shown.row, number * step, (number + 1) * step)
            line.append(BLOCKED if blocked else UNSEEN, STYLES[phase])
        else:
            line.append(LETTERS[phase])
    return line


def _phase(row: Row, begin: float, end: float) -> Phase | None:
    """What most of a cell is."""
    shared = [
        (min(end, segment.end) - max(begin, segment.begin), segment.phase)
        for segment in row.segments
    ]
    found = max(shared, key=lambda each: each[0], default=None)
    return found[1] if found is not None and found[0] > 0 else None


def _blocked(row: Row, begin: float, end: float) -> bool:
    return any(wait.begin < end and wait.end > begin for wait in row.waits)


def _legend(*, coloured: bool) -> Text:
    line = Text()
    for phase in Phase:
        mark = (BLOCKED, STYLES[phase]) if coloured else (LETTERS[phase], "")
        line.append_text(Text.assemble(mark, f" {WORDS[phase]}   "))
    if coloured:
        line.append(f"{UNSEEN} nobody waits   ")
    line.append(CHAIN, "bold red")
    line.append(" the longest chain")
    return line


def _totals(chart: Chart) -> Text:
    start = chart.start
    lines = ["; ".join(f"{fact.label}: {fact.value}" for fact in chart.facts)]
    if start.chain_phases:
        went = (f"{WORDS[phase]} {seconds(took)}" for phase, took in start.chain_phases.items())
        lines.append(f"the longest chain: {', '.join(went)}")
    lines += [f"{size(count)} from {cache}" for cache, count in start.bytes_by_cache.items()]
    if start.later:
        lines.append(f"{start.later} waits more came after {QUIET:g} s of quiet: see --number")
    return Text("\n".join(lines))
