"""Every check of containerd's suite for snapshotters, each on a daemon and a state directory of its own.

And the same calls, two thousand of them, on containerd's own overlayfs snapshotter and on ours.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from testbed.conformance import Suite, built_suite
from testbed.containerd import mounts_below
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.workplace import default_work, run_directory

# The first test may have to wait for the compiler.
pytestmark = pytest.mark.timeout(900)
# In the suite's own spelling.
SUBTESTS = (
    "Basic",
    "StatActive",
    "StatComitted",
    "TransitivityTest",
    "PreareViewFailingtest",
    "Update",
    "Remove",
    "Walk",
    "LayerFileupdate",
    "RemoveDirectoryInLowerLayer",
    "Chown",
    "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot",
    "DeletedFilesInChildSnapshot",
    "MoveFileFromLowerLayer",
    "ViewReadonly",
    "StatInWalk",
    "CloseTwice",
    "RootPermission",
    "Rename",
    "128LayersMount",
)
VERDICT = re.compile(r"^ +--- (PASS|FAIL|SKIP): TestSnapshotter/(\S+) \(", re.MULTILINE)
# Nothing is fetched here, and a start is the faster the less starts.
CONFIGURATION = "spare-worker = false\n[fetch]\nunpackers = 1\n"
KEY = f"nobody-1:{'A' * 43}="


@pytest.fixture(scope="session")
def suite() -> Suite:
    return built_suite(default_work())


@pytest.fixture
def daemon() -> Iterator[FusesnapDaemon]:
    """A new daemon with an empty state directory; its only cache has nothing, and is never asked."""
    with run_directory("fs-") as work:
        (work / "cache").mkdir()
        (work / "fusesnap.toml").write_text(CONFIGURATION)
        source = Source([f"file://{work}/cache"], [KEY])
        options = ["--config", str(work / "fusesnap.toml")]
        with fusesnap_daemon(work / "s", source=source, options=options) as running:
            yield running


def verdicts(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    """What the suite says of each subtest that it ran: verdict and name."""
    return VERDICT.findall(done.stdout)


def test_these_are_all_subtests_of_the_suite(suite: Suite) -> None:
    """Without a snapshotter each of them begins, and fails for that."""
    done = suite.run("^TestSnapshotter$")
    assert done.stdout.count("FUSESNAP_ADDRESS is not set") == len(SUBTESTS)
    assert sorted(verdicts(done)) == sorted(("FAIL", name) for name in SUBTESTS)


@pytest.mark.parametrize("name", SUBTESTS)
def test_containerd(suite: Suite, daemon: FusesnapDaemon, name: str) -> None:
    done = suite.run(f"^TestSnapshotter$/^{name}$", daemon)
    assert (done.returncode, verdicts(done)) == (0, [("PASS", name)]), done.stdout + done.stderr
    assert mounts_below(daemon.state) == [str(daemon.state / "lazy")]
    assert daemon.service.alive


def test_every_answer_is_that_of_overlayfs(suite: Suite, daemon: FusesnapDaemon) -> None:
    done = suite.run("^TestSameAsOverlayfs$", daemon)
    assert "--- PASS: TestSameAsOverlayfs" in done.stdout, done.stdout + done.stderr
