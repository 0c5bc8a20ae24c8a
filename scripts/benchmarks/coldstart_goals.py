"""What is asked of cold starts: ratios of what was measured, and what each may be at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

STOCK = "fusesnap, stock cache"
PUBLISHED = "fusesnap, published cache"
TRACED = "fusesnap, published with trace"
BUNDLED = "fusesnap, published with bundle"
NAMED = "fusesnap, nix:0 with bundle"
UPDATED = "fusesnap, update, with bundle"
REALISED = "nix-store --realise, bind mounts"
PULLED = ("OCI pull, gzip", "OCI pull, zstd")
OURS = (STOCK, PUBLISHED, TRACED, BUNDLED, NAMED, UPDATED)
HALF = 0.5
FAST_RATE, FAST_ROUND_TRIP = 1e9, 0.001  # bits a second, seconds


@dataclass(frozen=True, slots=True)
class Profile:
    """A link: ``rate`` in bits a second each way, ``round_trip`` in seconds."""

    name: str
    rate: float
    round_trip: float

    def seconds(self, size: int) -> float:
        """The least that a start takes which needs ``size`` bytes: they cross, after two round trips."""
        return 2 * self.round_trip + size * 8 / self.rate

    @property
    def fast(self) -> bool:
        """Whether pulling everything first costs next to nothing."""
        return self.rate >= FAST_RATE and self.round_trip <= FAST_ROUND_TRIP


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio that was measured, and what it may be at most."""

    name: str
    ratio: float
    most: float

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.ratio <= self.most

    def __str__(self) -> str:
        word = "met" if self.met else "not met"
        return f"{self.name}: {self.ratio:.3f}, at most {self.most:g}: {word}"


@dataclass(frozen=True, slots=True)
class Bars:
    """What starts over one link are held against, in seconds.

    ``least``: two round trips, the touched pages as a bundle rounds them, the warm start. ``named``, where that was
    measured: the same for an image that is pulled by its store path, rather than from a registry. ``stargz``: an
    optimised eStargz, which fetches the files that the start opens whole, and before it: two round trips, these files,
    the warm start. ``untouched``: the share of the closure's bytes in the stock cache that belong to store paths of
    which the start reads no page.
    """

    least: float
    named: float | None
    stargz: float
    untouched: float


def goals(medians: Mapping[str, float], bars: Bars, profile: Profile) -> list[Goal]:
    """What the sides of a run can say; ``medians`` in seconds by side.

    Over a link that carries everything in a moment they are held against that, over others against the link.
    """
    if profile.fast:
        return list(_pulled(medians))
    return [*_stock(medians, bars), *_published(medians, bars)]


def _stock(medians: Mapping[str, float], bars: Bars) -> Iterator[Goal]:
    if {STOCK, REALISED} <= medians.keys():
        ratio = medians[STOCK] / medians[REALISED]
        yield Goal(f"{STOCK} / {REALISED}", ratio, 0.9)
        if bars.untouched >= HALF:
            share = f"{bars.untouched:.0%} of the bytes untouched"
            yield Goal(f"{STOCK} / {REALISED}, {share}", ratio, 0.5)


def _published(medians: Mapping[str, float], bars: Bars) -> Iterator[Goal]:
    if PUBLISHED in medians:
        yield Goal(
            f"{PUBLISHED} / optimised eStargz, estimated", medians[PUBLISHED] / bars.stargz, 1.5
        )
    for side in (TRACED, BUNDLED):
        if side in medians:
            yield Goal(f"{side} / the least possible", medians[side] / bars.least, 1.3)
    if NAMED in medians and bars.named is not None:
        yield Goal(f"{NAMED} / the least possible so", medians[NAMED] / bars.named, 1.3)


def _pulled(medians: Mapping[str, float]) -> Iterator[Goal]:
    pulled = [medians[side] for side in PULLED if side in medians]
    if pulled:
        for side in OURS:
            if side in medians:
                yield Goal(f"{side} / quickest OCI pull", medians[side] / min(pulled), 1.0)
