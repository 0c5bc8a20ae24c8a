"""A start as a page: the picture, and all of it in tables. One file, without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from fusesnap.cli.status import size
from fusesnap.cli.waterfall.chart import WORDS, Chart, asked_by, seconds
from fusesnap.cli.waterfall.svg import svg
from fusesnap.daemon.telemetry.start import Row

STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 1240px; padding: 0 1rem; line-height: 1.45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg { width: 100%; height: auto; border: 1px solid color-mix(in srgb, currentColor 18%, transparent);
  border-radius: 8px; }
h2 { margin-top: 2.2rem; font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid color-mix(in srgb, currentColor 35%, transparent); }
td { border-bottom: 1px solid color-mix(in srgb, currentColor 12%, transparent); }
td.number, th.number { text-align: right; }
tr.chain td:first-child { font-weight: 700; }
"""


def page(chart: Chart) -> str:
    """The whole page."""
    body = "\n".join(
        [
            svg(chart),
            "<h2>Where the longest chain went</h2>",
            _table(
                ("what", "time"),
                [(WORDS[phase], seconds(took)) for phase, took in chart.start.chain_phases.items()],
            ),
            "<h2>Bytes</h2>",
            _table(("cache", "bytes"), list(_bytes(chart))),
            "<h2>Every path</h2>",
            _table(
                ("path", "asked", "by", "for", "blocked", "fetched", "from", ""),
                [_row(row) for row in chart.start.rows],
                marked=[row.on_chain for row in chart.start.rows],
            ),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(chart.title)}: what its start waited for</title>\n<style>{STYLE}</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _bytes(chart: Chart) -> Iterator[tuple[str, str]]:
    for cache, count in chart.start.bytes_by_cache.items():
        yield cache, size(count)
    if chart.start.bytes_of_others:
        yield "for others meanwhile", size(chart.start.bytes_of_others)


def _row(row: Row) -> tuple[str, ...]:
    blocked = sum(wait.end - wait.begin for wait in row.waits)
    return (
        row.path,
        seconds(row.asked),
        asked_by(row),
        row.reason if row.mine else f"{row.reason}, another's",
        seconds(blocked) if row.waits else "",
        size(row.received) if row.received else "",
        ", ".join(row.caches),
        row.error or (f"began again {row.retries} times" if row.retries else ""),
    )


def _table(
    heads: tuple[str, ...], rows: list[tuple[str, ...]], marked: list[bool] | None = None
) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    marks = marked or [False] * len(rows)
    lines = [
        ('<tr class="chain">' if mark else "<tr>")
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    ]
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
