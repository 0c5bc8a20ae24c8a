"""A process is killed between every two steps of a call; what it leaves is the state before or after."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .kill_points import CALLS, furnish

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

REPOSITORY = Path(__file__).parents[2]
NEVER = 10**9  # no call has as many steps

Infos = dict[str, tuple[object, ...]]


class Doomed:
    """Carries calls out on ``state``, in processes that are killed."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._saved = state.with_name("saved")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.snapshots.kill_points", str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def save(self) -> None:
        """Take the state as it is for that from which calls begin."""
        self._copy(self._state, self._saved)

    def run(self, call: str, step: int) -> int:
        """Carry the call out, from the saved state, until before that step; returns how its process ended."""
        self._copy(self._saved, self._state)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(call, step, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _copy(self, source: Path, target: Path) -> None:
        if target.exists():
            shutil.rmtree(target)
        subprocess.run(["cp", "-a", source, target], check=True)  # with attributes and devices


@pytest.fixture
def doomed(bench: Bench) -> Iterator[Doomed]:
    made = Doomed(bench.state)
    yield made
    made.close()


async def begin(bench: Bench, call: str) -> None:
    """An image with a store path, what was written on it, and a container with farms that it alone uses in the end."""
    there, missing = furnish(bench)
    await bench.nix_layer("image", "", there, missing)
    await bench.snapshotter.prepare("written", "image", {"old": "label"})
    written = bench.state / "snapshots/2/fs"
    bench.plant(written, {"nix": {"store": {there.base_name: {"added": b"added"}}}})
    await bench.snapshotter.prepare("other", "image", {})
    bench.store.commit(missing, bench.source.contents[missing])
    if call == "remove":
        await bench.snapshotter.prepare("later", "image", {})


async def reopened(bench: Bench) -> Infos:
    """Start again on what there is; what is known of each snapshot then."""
    bench.open()
    await bench.snapshotter.recover()
    await bench.snapshotter.remove_leftovers()
    return await known(bench)


async def known(bench: Bench) -> Infos:
    return {
        info.name: (info.parent, info.kind, info.labels) for info in await bench.snapshotter.walk()
    }


def on_disk(bench: Bench) -> list[str]:
    """The names of all that belongs to snapshots."""
    return sorted(
        str(entry.relative_to(bench.state))
        for top in ("snapshots", "farms")
        for entry in (bench.state / top).rglob("*")
    )


@pytest.mark.parametrize("call", CALLS)
async def test_killed_anywhere_a_call_is_done_or_not(
    bench: Bench, doomed: Doomed, call: str
) -> None:
    await begin(bench, call)
    before = await known(bench)
    bench.close()
    doomed.save()
    assert doomed.run(call, NEVER) == 0
    after, disk_after = await reopened(bench), on_disk(bench)
    bench.close()
    assert after != before
    done: list[bool] = []
    while True:
        status = doomed.run(call, len(done) + 1)
        assert status in (0, -9)
        infos = await reopened(bench)
        assert infos in (before, after)
        done.append(infos == after)
        if infos == before:
            await CALLS[call](bench.snapshotter)
        assert (await known(bench), on_disk(bench)) == (after, disk_after)
        bench.close()
        if status == 0:
            break
    # There is one step that makes it done.
    assert done == sorted(done)
    assert (done[0], done[-1]) == (False, True)
    print(f"{call}: {len(done)} steps, done after {done.index(True)}")  # noqa: T201
