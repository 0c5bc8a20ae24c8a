"""What a drill found, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

FIRST_ACCESS = "first access, with its fetch"
INTERRUPTION = "interruption of committed reads"


@dataclass(slots=True)
class Outcome:
    """What a drill found; ``times`` in seconds, by what they are the times of.

    An interruption is counted for each event: how long the slowest access of committed bytes that met it had to wait
    from then on, 0 when all took less than two milliseconds. ``removed``: what start-up passes found that nobody owned.
    """

    name: str
    seed: int
    events: int = 0
    accesses: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    removed: int | None = None

    def add(self, what: str, times: Iterable[float]) -> None:
        self.times.setdefault(what, []).extend(times)

    def lines(self) -> list[str]:
        """The outcome for people."""
        told = [
            f"{self.name}: {self.events} events (seed {self.seed}), {self.accesses} accesses, {len(self.wrong)} wrong"
        ]
        told += [
            f"  {what:32} {distribution(times)}" for what, times in self.times.items() if times
        ]
        if self.removed is not None:
            told.append(f"  start-up passes removed {self.removed} things that no snapshot owned")
        return told + [f"  WRONG {line}" for line in self.wrong]


def distribution(times: Sequence[float]) -> str:
    """Median, 90th and 99th percentile, and the largest, in milliseconds."""
    ordered = sorted(times)
    named = {
        "median": quantile(ordered, 50),
        "p90": quantile(ordered, 90),
        "p99": quantile(ordered, 99),
        "max": ordered[-1],
    }
    shown = "  ".join(f"{name} {value * 1000:6.0f} ms" for name, value in named.items())
    return f"{shown}  (n = {len(ordered)})"


def quantile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of a hundred of ``ordered`` do not exceed."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
