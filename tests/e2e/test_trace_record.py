"""A start that is recorded by itself is complete, whatever is in the store already."""

from __future__ import annotations

import json
from pathlib import Path

from testbed.binary_cache import HttpCache, SigningKey
from testbed.containerd import mounts_below
from testbed.fusesnap_daemon import PROGRAM, Source, prefetch
from testbed.processes import run, run_unchecked
from testbed.synthetic import SimpleClosure


def test_a_recorded_start_is_complete(
    work: Path, cache: HttpCache, simple: SimpleClosure, key: SigningKey
) -> None:
    source = Source([cache.url], [key.public])
    state: list[str | Path] = ["--state", work / "s"]
    record: list[str | Path] = [PROGRAM, "trace", "record", *state, *source.options, simple.root]
    prefetch(work / "s", [simple.busybox], source=source)
    read = f"cat {simple.tree}/self; tail -c 9 {simple.large}/data >/tmp/x; sleep 1000"
    # It goes on, and is ended when it has read nothing new for a while; in its root it may write.
    done = run_unchecked(
        [
            *record,
            *("--idle", "2", "-o", work / "trace", "--env", f"PATH={simple.root}/bin"),
            *("--", "sh", "-c", read),
        ],
        timeout=60,
        env={"TMPDIR": str(work)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"this path is {simple.tree}\n"
    assert "complete" in done.stderr
    found = json.loads(run([PROGRAM, "trace", "show", "--json", work / "trace"]))
    (listed,) = json.loads(run([PROGRAM, "trace", "list", "--json", *state]))
    assert (listed["complete"], listed["ended"], listed["readahead"]) == (True, "idle", 16 * 1024)
    paths = [f"/nix/store/{each['path']}" for each in found["paths"]]
    assert paths == [simple.root, simple.busybox, simple.tree, simple.large]
    read_of = {
        found["files"][each["file"]]["name"]: (each["offset"], each["length"])
        for each in found["extents"]
    }
    # What the kernel reads ahead as on a node's mount is behind the last block of the large file: nothing.
    assert read_of["data"] == (4_997_120, 2880)
    failed = run_unchecked(
        [*record, "--", "sh", "-c", "exit 3"], timeout=60, env={"TMPDIR": str(work)}
    )
    assert failed.returncode == 1
    assert "ended with status 3: nothing is kept" in failed.stderr
    assert json.loads(run([PROGRAM, "trace", "list", "--json", *state])) == [listed]
    assert mounts_below(work) == []  # nothing of it is left
