"""A command brings what no cache has, here with real Nix; what it leaves is believed only for a reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from fusesnap.errors import (
    ClosureUnavailable,
    ContentMismatch,
    DeadlineExceeded,
    FusesnapError,
    PathNotFound,
    Unavailable,
    UntrustedPath,
)
from fusesnap.fetch.builder import CommandBuilder
from fusesnap.fetch.realiser import Realiser
from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.memory import MemorySubstituter

from ..store import conftest as made
from ..substituter.samples import CACHE_INFO, KEY, TRUSTED
from .conftest import MakeRealiser

COPY = 'nix copy --from "file://{cache}" --to "$FUSESNAP_STORE" --no-check-sigs "$1"'
Build = Callable[..., Realiser]

pytestmark = pytest.mark.parametrize("unpackers", ["threads"], indirect=True)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, StorePath]:
    """A binary cache that only the command knows: ``lib`` and ``tool``, which refers to it, signed by KEY."""
    directory = tmp_path / "cache"
    (directory / "nar").mkdir(parents=True)
    (directory / "nix-cache-info").write_bytes(CACHE_INFO)
    found = {}
    for name, references in (("lib", ()), ("tool", ("lib",))):
        info, events = made.make_path(name, {"file": name.encode()}, references)
        signed = replace(info, signatures=(KEY.sign(info.fingerprint()),))
        (directory / f"{info.store_path.hash_part}.narinfo").write_text(signed.to_text())
        (directory / info.url).write_bytes(b"".join(nar_bytes(events)))
        found[name] = info.store_path
    return found


@pytest.fixture
def build(make_realiser: MakeRealiser, store: LocalStore, tmp_path: Path) -> Build:
    """A realiser whose only cache is empty, with a shell script as builder."""

    def make(script: str, *, keys: TrustedKeys = TRUSTED, seconds: float = 60.0) -> Realiser:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "NIX_REMOTE": "local",
            "NIX_CONFIG": made.NIX_CONFIG,
        }
        text = script.format(cache=tmp_path / "cache", directory=tmp_path)
        command = ["/bin/sh", "-ec", text, "builder"]
        builder = CommandBuilder(command, seconds, store, keys, environment)
        return make_realiser(MemorySubstituter(), builder=builder)

    return make


async def refused(
    realiser: Realiser, path: StorePath, store: LocalStore, kind: type[FusesnapError]
) -> str:
    with pytest.raises(kind) as caught:
        await realiser.realise(path)
    assert not store.is_committed(path)
    said = str(caught.value)
    assert said.startswith(f"/nix/store/{path}: no substituter has it: memory://cache: ")
    return said


async def test_what_it_leaves_signed_is_there(
    build: Build, paths: dict[str, StorePath], store: LocalStore, tmp_path: Path
) -> None:
    realiser = build(COPY + "; echo >>{directory}/runs")
    assert await realiser.closure(paths["tool"]) == [paths["tool"], paths["lib"]]
    tree = await realiser.realise(paths["tool"])
    assert [entry.name for entry in tree.entries] == [b"", b"file"]
    assert store.is_committed(paths["lib"])
    assert (tmp_path / "runs").read_text().count("\n") == 1


async def test_without_a_trusted_signature_it_is_removed_again(
    build: Build, paths: dict[str, StorePath], store: LocalStore
) -> None:
    said = await refused(build(COPY, keys=TrustedKeys(())), paths["tool"], store, UntrustedPath)
    assert "is not trusted" in said
    assert "key-1" in said


async def test_what_nix_says_was_built_here_needs_none(
    build: Build, paths: dict[str, StorePath], store: LocalStore
) -> None:
    mark = (
        "python3 -c 'import sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
        ' c.execute("UPDATE ValidPaths SET ultimate = 1, sigs = NULL"); c.commit()\''
        ' "$(echo "$FUSESNAP_STORE" | sed "s/.*state=//; s/&.*//")/db/db.sqlite"'
    )
    realiser = build(f"{COPY}; {mark}", keys=TrustedKeys(()))
    await realiser.realise(paths["tool"])
    assert store.is_committed(paths["tool"])


async def test_content_addressed_paths_need_none(
    build: Build, store: LocalStore, tmp_path: Path, paths: dict[str, StorePath]
) -> None:
    (tmp_path / "data").write_text("content")
    add = 'nix-store --store "$FUSESNAP_STORE" --add {directory}/data'
    # Which path that is, Nix says; it is there from then on.
    with pytest.raises(PathNotFound):
        await build(add + " >{directory}/path").realise(paths["lib"])
    path = store.store_dir.parse((tmp_path / "path").read_text().strip())
    store.discard(path)
    assert not store.is_committed(path)
    await build(add, keys=TrustedKeys(())).realise(path)
    assert store.is_committed(path)


async def test_files_that_are_not_what_the_database_says(
    build: Build, paths: dict[str, StorePath], store: LocalStore
) -> None:
    spoil = '; real="$(echo "$FUSESNAP_STORE" | sed "s/.*real=//; s/&.*//")"; echo x >"$real/${{1##*/}}/file"'
    said = await refused(build(COPY + spoil), paths["lib"], store, ContentMismatch)
    assert "as its builder says, got sha256:" in said


@pytest.mark.parametrize(
    ("script", "kind", "reason"),
    [
        (
            "echo first; echo no such derivation >&2; exit 3",
            Unavailable,
            "status 3: first / no such",
        ),
        ("true", PathNotFound, "succeeded, but left no such valid path in local?store="),
        ("kill -9 $$", Unavailable, "status -9"),
    ],
)
async def test_a_command_that_does_not_bring_it(
    build: Build,
    paths: dict[str, StorePath],
    store: LocalStore,
    script: str,
    kind: type[FusesnapError],
    reason: str,
) -> None:
    assert reason in await refused(build(script), paths["lib"], store, kind)


async def test_its_time_is_limited_and_nothing_of_it_is_left(
    build: Build, paths: dict[str, StorePath], store: LocalStore, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        script = "exec 3>{directory}/fifo; sleep 1000 & sleep 1000"
        said = await refused(build(script, seconds=0.5), paths["lib"], store, DeadlineExceeded)
        assert "not done within 0.5 s" in said
        # As soon as nobody has it open for writing, it is at its end.
        os.set_blocking(descriptor, True)
        assert await trio.to_thread.run_sync(os.read, descriptor, 1) == b""
    finally:
        os.close(descriptor)


async def test_a_program_that_is_not_there(
    make_realiser: MakeRealiser, store: LocalStore, paths: dict[str, StorePath]
) -> None:
    builder = CommandBuilder(["/absent"], 60.0, store, TRUSTED, {})
    realiser = make_realiser(MemorySubstituter(), builder=builder)
    said = await refused(realiser, paths["lib"], store, Unavailable)
    assert "/absent" in said
    assert "No such file" in said


async def test_a_pull_asks_it_too_and_says_all(
    build: Build, paths: dict[str, StorePath], store: LocalStore
) -> None:
    with pytest.raises(ClosureUnavailable, match="status 1: broken"):
        await build("echo broken; exit 1").admit(paths.values())
    assert await build(COPY).admit(paths.values()) == []
    assert all(store.is_committed(path) for path in paths.values())


async def test_what_a_cache_has_or_may_have_is_not_built(
    make_realiser: MakeRealiser, store: LocalStore, paths: dict[str, StorePath]
) -> None:
    class Never:
        async def build(self, path: StorePath, absence: PathNotFound) -> None:
            pytest.fail("it was asked")

    class Broken(MemorySubstituter):
        async def narinfo(self, path: Any) -> Any:
            await trio.lowlevel.checkpoint()
            raise Unavailable(f"{self.url}: down")

    realiser = make_realiser(Broken(), builder=Never())
    with pytest.raises(Unavailable, match="down"):
        await realiser.realise(paths["lib"])
