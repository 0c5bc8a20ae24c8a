"""Bar charts as SVG files that need nothing else, legible on light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 760, 210, 70
BAR, GAP, GROUP, LINE = 16, 5, 34, 15  # heights
FONT = "font-family: system-ui, sans-serif; font-size: 12px"
STYLE = f"""
text {{ {FONT}; fill: #24292f }} .title {{ font-weight: 600; font-size: 14px }}
.small {{ font-size: 11px; fill: #57606a }}
.ours {{ fill: #1a7f64 }} .other {{ fill: #8c959f }} .range {{ stroke: #24292f; stroke-width: 1.2 }}
.limit {{ stroke: #cf222e; stroke-width: 1.6; stroke-dasharray: 4 3 }} .grid {{ stroke: #d0d7de; stroke-width: 0.6 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .small {{ fill: #9198a1 }} .range {{ stroke: #e6edf3 }} .grid {{ stroke: #3d444d }}
.ours {{ fill: #3fb98f }} .other {{ fill: #656c76 }} .limit {{ stroke: #ff7b72 }} }}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One side: seconds of its rounds, and whether it is ours."""

    label: str
    seconds: Sequence[float]
    median: float
    ours: bool


@dataclass(frozen=True, slots=True)
class Group:
    """The sides of one workload; ``limit`` in seconds is drawn across them."""

    title: str
    bars: Sequence[Bar]
    limit: float


def bar_chart(title: str, groups: Sequence[Group], footer: str) -> str:
    """A chart of all groups on one scale from zero, and the lines of ``footer`` below."""
    most = max(max(bar.seconds) for group in groups for bar in group.bars)
    step = next(step for step in _steps() if most / step <= 8)
    scale = (WIDTH - LEFT - RIGHT) / most
    bottom = 58 + sum(GROUP + len(group.bars) * (BAR + GAP) for group in groups) + 30
    parts = [f'<text class="title" x="12" y="22">{escape(title)}</text>']
    parts += _grid(most, step, scale, bottom)
    top = 40
    for group in groups:
        parts += _group(group, top, scale)
        top += GROUP + len(group.bars) * (BAR + GAP)
    lines = footer.splitlines()
    parts += [
        f'<text class="small" x="12" y="{bottom - 10 + number * LINE}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    height = bottom + (len(lines) - 1) * LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'width="{WIDTH}" height="{height}"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>\n{chr(10).join(parts)}\n</svg>\n"
    )


def _steps() -> Iterator[float]:
    """Distances of grid lines: 0.1, 0.2, 0.5, 1, 2, 5 … seconds."""
    unit = 0.1
    while True:
        yield from (unit, 2 * unit, 5 * unit)
        unit *= 10


def _grid(most: float, step: float, scale: float, height: int) -> Iterator[str]:
    for number in range(int(most / step) + 1):
        x = LEFT + number * step * scale
        yield f'<line class="grid" x1="{x:.1f}" y1="34" x2="{x:.1f}" y2="{height - 40}"/>'
        yield (
            f'<text class="small" x="{x:.1f}" y="{height - 27}" text-anchor="middle">'
            f"{number * step:g} s</text>"
        )


def _group(group: Group, top: int, scale: float) -> Iterator[str]:
    yield f'<text x="12" y="{top + 14}" font-weight="600">{escape(group.title)}</text>'
    y = top + 22
    for bar in group.bars:
        middle = y + BAR / 2
        width = bar.median * scale
        kind = "ours" if bar.ours else "other"
        yield f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>'
        yield f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>'
        ends = [LEFT + seconds * scale for seconds in (min(bar.seconds), max(bar.seconds))]
        yield (
            f'<line class="range" x1="{ends[0]:.1f}" y1="{middle}" x2="{ends[1]:.1f}" y2="{middle}"/>'
        )
        yield f'<text x="{ends[1] + 6:.1f}" y="{y + 12}">{bar.median:.2f} s</text>'
        y += BAR + GAP
    x = LEFT + group.limit * scale
    yield f'<line class="limit" x1="{x:.1f}" y1="{top + 18}" x2="{x:.1f}" y2="{y}"/>'


def sides_of(
    starts: Mapping[str, Sequence[float]], medians: Mapping[str, float], ours: str
) -> list[Bar]:
    """The bars of sides by name; those whose name begins with ``ours`` are ours."""
    return [
        Bar(name, seconds, medians[name], name.startswith(ours)) for name, seconds in starts.items()
    ]
