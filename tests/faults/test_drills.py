"""The drills in their short form: what dies, stops or is replaced under a container that was started cold.

``scripts/drill`` runs the same in the long form, over a slower link.
"""

from __future__ import annotations

import pytest
from testbed import drills
from testbed.drill_bed import FAST, Line, Materials, prepare_materials
from testbed.drill_commits import kill_in_commits
from testbed.drill_link import link_outage
from testbed.drill_metastore import kill_in_transactions
from testbed.drill_outage import outage
from testbed.drill_outcome import Outcome
from testbed.drill_services import kill_services
from testbed.workplace import default_work

SEED = 4
BOTH = pytest.mark.parametrize("relay", ["", "always"], ids=["direct", "relay"])


@pytest.fixture(scope="session")
def materials() -> Materials:
    return prepare_materials(default_work())


def check(outcome: Outcome, events: int) -> None:
    """Nothing was wrong, and what was to happen has happened under readers. The figures are for those who look."""
    print(*outcome.lines(), sep="\n")  # noqa: T201
    assert outcome.wrong == []
    assert outcome.events == events
    assert outcome.accesses > 0


@pytest.mark.parametrize(("relay", "kills"), [("", 60), ("always", 40)], ids=["direct", "relay"])
def test_no_reader_notices_that_the_worker_is_killed(
    materials: Materials, relay: str, kills: int
) -> None:
    check(drills.kill_worker(materials, kills, seed=SEED, line=FAST, relay=relay, pause=0.2), kills)


@BOTH
def test_a_worker_that_hangs_is_replaced(materials: Materials, relay: str) -> None:
    check(drills.stop_worker(materials, 1, seed=SEED, line=FAST, relay=relay), 1)


@BOTH
def test_no_reader_notices_an_upgrade(materials: Materials, relay: str) -> None:
    check(drills.reload(materials, 3, seed=SEED, line=FAST, relay=relay), 3)


def test_killed_in_commits_the_store_is_sound(materials: Materials) -> None:
    check(kill_in_commits(materials, 6, seed=SEED, line=FAST), 6)


def test_no_prepare_is_half_done_when_the_services_are_killed(materials: Materials) -> None:
    check(kill_services(materials, 4, seed=SEED, line=FAST), 4)


def test_killed_in_transactions_snapshots_are_as_acknowledged(materials: Materials) -> None:
    check(kill_in_transactions(materials, 25, seed=SEED), 25)


def test_when_everything_is_killed_only_missing_paths_are_lost_until_the_next_start(
    materials: Materials,
) -> None:
    check(outage(materials, seed=SEED, line=FAST), 1)


def test_a_restart_of_containerd_affects_nothing(materials: Materials) -> None:
    check(drills.restart_containerd(materials, 1, seed=SEED, line=FAST), 1)


def test_who_waits_while_the_link_is_down_goes_on_when_it_is_back(materials: Materials) -> None:
    check(link_outage(materials, [1.0], seed=SEED, line=Line(20e6, 0.02)), 2)
