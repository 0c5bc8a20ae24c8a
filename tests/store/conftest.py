"""What the tests of the local store share: made-up store paths, and real Nix."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from fusesnap.nix.hash import Hash, HashAlgorithm, nix32_encode
from fusesnap.nix.nar import (
    NEED_DATA,
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    NarParser,
    NeedData,
    RegularFile,
    Symlink,
    nar_bytes,
)
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.local_store import LocalStore, StagedPath

NOW = 1_700_000_000

# A tree: bytes are a file, a tuple of bytes an executable file, a string a link, a dictionary a directory.
Tree = bytes | tuple[bytes] | str | dict[str, "Tree"]
MadePath = tuple[NarInfo, list[NarEvent]]

NIX_CONFIG = """
sandbox = false
build-users-group =
substituters =
experimental-features = nix-command
"""
# What nix-store --verify says of a store with which it is content.
CONTENT = {
    "reading the Nix store...",
    "checking path existence...",
    "checking link hashes...",
    "checking store hashes...",
}


def path_named(name: str) -> StorePath:
    return StorePath(nix32_encode(hashlib.sha256(name.encode()).digest()[:20]), name)


def tree_events(tree: Tree, name: bytes = b"") -> Iterator[NarEvent]:
    match tree:
        case str(target):
            yield Symlink(name, os.fsencode(target))
        case bytes(data) | (bytes(data),):
            yield RegularFile(name, len(data), isinstance(tree, tuple), 0)
            if data:
                yield FileData(data)
            yield FileEnd()
        case dict(children):
            yield DirectoryStart(name)
            for child in sorted(os.fsencode(child) for child in children):
                yield from tree_events(children[os.fsdecode(child)], child)
            yield DirectoryEnd()


def parse_nar(nar: bytes) -> list[NarEvent]:
    parser = NarParser()
    parser.receive_data(nar)
    events = []
    while not isinstance(event := parser.next_event(), NeedData):
        events.append(event)
    assert event is NEED_DATA
    parser.close()
    return events


def make_path_from(name: str, events: Iterable[NarEvent], references: Iterable[str]) -> MadePath:
    nar = b"".join(nar_bytes(events))
    info = NarInfo(
        store_path=path_named(name),
        url=f"nar/{name}.nar",
        compression="none",
        file_hash=None,
        file_size=None,
        nar_hash=Hash(HashAlgorithm.SHA256, hashlib.sha256(nar).digest()),
        nar_size=len(nar),
        references=tuple(sorted(path_named(reference) for reference in references)),
        deriver=None,
        system=None,
        signatures=(),
        ca=None,
        unknown=(),
        store_dir=StoreDir(),
    )
    return info, parse_nar(nar)


def make_path(name: str, tree: Tree | None = None, references: Iterable[str] = ()) -> MadePath:
    content: Tree = name.encode() if tree is None else tree
    return make_path_from(name, [*tree_events(content), NarEnd()], references)


def commit_path(store: LocalStore, made: MadePath) -> StorePath:
    info, events = made
    with store.stage(store.pin(info)) as staged:
        for event in events:
            staged.receive(event)
        staged.commit()
    return info.store_path


@contextmanager
def stage_paths(store: LocalStore, *made: MadePath) -> Iterator[list[StagedPath]]:
    with ExitStack() as stack:
        staged = []
        for info, events in made:
            path = stack.enter_context(store.stage(store.pin(info)))
            for event in events:
                path.receive(event)
            staged.append(path)
        yield staged


def run_nix(
    *command: str | Path,
    home: Path,
    user: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, str, str]:
    """Run a command of Nix's; give its exit code, and what it wrote to stdout and stderr."""
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "NIX_REMOTE": "local",
        "NIX_CONF_DIR": str(home),
        "NIX_CONFIG": NIX_CONFIG,
        **environment,
    }
    done = subprocess.run(
        command, env=variables, capture_output=True, timeout=60, check=False, text=True, user=user
    )
    return done.returncode, done.stdout, done.stderr


def assert_content(store_url: str, home: Path, user: int | None = None) -> None:
    """Check that real Nix verifies the store and has nothing to complain of."""
    verify = ("nix-store", "--store", store_url, "--verify", "--check-contents")
    code, _, said = run_nix(*verify, home=home, user=user)
    assert set(said.splitlines()) <= CONTENT, said
    assert code == 0


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], LocalStore]]:
    """Open the store of one state directory, as often as wanted; each closes at the end."""
    stores: list[LocalStore] = []

    def open_store() -> LocalStore:
        stores.append(LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: NOW))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], LocalStore]) -> LocalStore:
    return opened()


@pytest.fixture(scope="session")
def make() -> Callable[..., MadePath]:
    return make_path


@pytest.fixture(scope="session")
def make_from() -> Callable[..., MadePath]:
    return make_path_from


@pytest.fixture(scope="session")
def events_of() -> Callable[..., Iterator[NarEvent]]:
    return tree_events


@pytest.fixture(scope="session")
def commit() -> Callable[[LocalStore, MadePath], StorePath]:
    return commit_path


@pytest.fixture(scope="session")
def staged() -> Callable[..., AbstractContextManager[list[StagedPath]]]:
    """Unpack paths, not committed yet."""
    return stage_paths


@pytest.fixture(scope="session")
def parse() -> Callable[[bytes], list[NarEvent]]:
    return parse_nar


@pytest.fixture
def verify_clean(tmp_path: Path) -> Callable[[LocalStore], None]:
    """Check with real Nix that a store is clean."""
    return lambda store: assert_content(store.nix_url, tmp_path)


@pytest.fixture(scope="session")
def nix() -> Callable[..., tuple[int, str, str]]:
    return run_nix


@pytest.fixture(scope="session")
def content() -> Callable[..., None]:
    return assert_content
