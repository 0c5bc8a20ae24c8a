"""A worker that is killed while it commits: what it leaves is a store that real Nix finds clean."""

from __future__ import annotations

import random
from pathlib import Path

from testbed.drill_bed import DrillBed, Line, Materials, Readers, wait_for
from testbed.drill_closure import DrillClosure
from testbed.drill_outcome import Outcome
from testbed.drills import Kills, wait_for_recovery
from testbed.nix_store import CONFIGURATION, NixStore
from testbed.processes import run_unchecked

PAUSE = 0.3  # seconds; many paths of 20 KB are committed in it


def kill_in_commits(materials: Materials, kills: int, *, seed: int, line: Line) -> Outcome:
    """SIGKILL to the worker while it commits many small paths: each path is whole or absent, and Nix agrees."""
    outcome = Outcome("kill -9 of the worker in commits", seed)
    tiny = materials.tiny

    def after(bed: DrillBed, group: Readers) -> None:
        outcome.wrong += unsound(bed, tiny)
        wait_for_recovery(group)

    def finish(bed: DrillBed, group: Readers) -> list[str]:
        wait_for(lambda: group.through, "the end of all first accesses")
        return unsound(bed, tiny) + not_valid(bed, tiny)

    chance = random.Random(seed)  # noqa: S311
    Kills(outcome, materials, tiny, chance, PAUSE, after, finish).run(kills, line)
    return outcome


def store_url(state: Path) -> str:
    """The URL by which real Nix opens our store."""
    real = state.resolve()
    return (
        f"local?store=/nix/store&real={real}/layer/.fusesnap-store&state={real}/nix&log={real}/log"
    )


def nix_store(bed: DrillBed, *words: str) -> tuple[int, str]:
    """Status and words of real ``nix-store`` on our store."""
    command = ["nix-store", "--store", store_url(bed.daemon.state), *words]
    done = run_unchecked(command, env=CONFIGURATION, timeout=120)
    return done.returncode, done.stdout + done.stderr


def unsound(bed: DrillBed, closure: DrillClosure) -> list[str]:
    """What is wrong with the store at this moment: what Nix says, and committed paths that are not whole."""
    status, said = nix_store(bed, "--verify", "--check-contents")
    progress = ("reading the Nix store...", "checking ")
    complaints = [line for line in said.splitlines() if not line.startswith(progress)]
    wrong = [f"nix-store --verify: {line}" for line in complaints]
    if status:
        wrong.append(f"nix-store --verify ended with {status}")
    real = bed.daemon.state / "layer/.fusesnap-store"
    for path in closure.closure.paths:
        committed = real / Path(path).name
        if committed.exists() and not same(committed, bed.materials.store, path):
            wrong.append(f"{path} is committed and not whole")
    return wrong


def same(committed: Path, store: NixStore, path: str) -> bool:
    """Whether two trees have the same names and contents."""
    return tree(committed) == tree(store.real(path))


def tree(top: Path) -> dict[str, bytes | str]:
    """Everything below ``top``: links by their target, files by their bytes."""
    return {
        str(file.relative_to(top)): str(file.readlink())
        if file.is_symlink()
        else (file.read_bytes() if file.is_file() else "directory")
        for file in [top, *top.rglob("*")]
    }


def not_valid(bed: DrillBed, closure: DrillClosure) -> list[str]:
    """Paths that Nix does not find valid when all but the closure's root were read, so that nothing is missing."""
    paths = list(closure.paths.values())
    status, said = nix_store(bed, "--check-validity", *paths)
    return [f"not valid in the end: {said}"] if status else []
