from __future__ import annotations

import pytest
from benchmarks.coldstart_goals import PUBLISHED, REALISED, STOCK, TRACED, Bars, Profile, goals

SLOW = Profile("20", 20e6, 0.08)
FAST = Profile("1000", 1e9, 0.001)
BARS = Bars(least=1.0, named=2.0, stargz=4.0, untouched=0.4)


def told(medians: dict[str, float], bars: Bars = BARS, profile: Profile = SLOW) -> list[str]:
    return [str(goal) for goal in goals(medians, bars, profile)]


def test_bytes_cross_after_two_round_trips() -> None:
    assert SLOW.seconds(2_500_000) == pytest.approx(0.16 + 1.0)


def test_a_stock_cache_is_held_against_realising() -> None:
    assert told({STOCK: 4.0, REALISED: 5.0}) == [
        "fusesnap, stock cache / nix-store --realise, bind mounts: 0.800, at most 0.9: met"
    ]
    assert told({STOCK: 5.0, REALISED: 5.0})[0].endswith("1.000, at most 0.9: not met")


def test_it_is_to_take_half_where_half_of_the_bytes_go_untouched() -> None:
    medians = {STOCK: 4.0, REALISED: 5.0}
    assert len(told(medians, Bars(1.0, None, 4.0, 0.49))) == 1
    assert told(medians, Bars(1.0, None, 4.0, 0.5))[1] == (
        "fusesnap, stock cache / nix-store --realise, bind mounts, 50% of the bytes untouched: "
        "0.800, at most 0.5: not met"
    )


def test_a_published_cache_is_held_against_what_an_optimised_estargz_would_take() -> None:
    assert told({PUBLISHED: 6.0}) == [
        "fusesnap, published cache / optimised eStargz, estimated: 1.500, at most 1.5: met"
    ]
    assert told({PUBLISHED: 6.1})[0].endswith("not met")


def test_a_trace_is_held_against_the_least_possible() -> None:
    assert told({TRACED: 1.25}) == [
        "fusesnap, published with trace / the least possible: 1.250, at most 1.3: met"
    ]
    assert told({TRACED: 1.4})[0].endswith("not met")


def test_on_a_fast_link_all_are_held_against_the_quickest_pull() -> None:
    medians = {STOCK: 1.1, REALISED: 1.0, "OCI pull, gzip": 2.0, "OCI pull, zstd": 1.0}
    assert not any("OCI pull" in goal for goal in told(medians))
    assert told(medians, profile=FAST) == [
        "fusesnap, stock cache / quickest OCI pull: 1.100, at most 1: not met"
    ]


def test_sides_that_did_not_run_say_nothing() -> None:
    assert told({REALISED: 5.0, "OCI pull, gzip": 2.0}, profile=FAST) == []
