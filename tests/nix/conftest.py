"""What the tests of the formats share: real Nix with a store of its own, and trees to archive."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    RegularFile,
    Symlink,
)

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")

NIX_CONFIG = """
sandbox = false
build-users-group =
substituters =
experimental-features = nix-command
"""


@dataclass(frozen=True)
class RealNix:
    """The Nix that is installed, working on a store below ``directory``."""

    directory: Path

    @property
    def root(self) -> Path:
        """What the store takes for the root of the file system."""
        return self.directory / "root"

    def run(self, *command: str | Path, stdin: bytes = b"") -> bytes:
        """Run a command that must succeed; returns what it printed."""
        done = self._start(command, stdin)
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        return done.stdout

    def refuse(self, *command: str | Path, stdin: bytes = b"") -> str:
        """Run a command that must fail; returns what it said."""
        done = self._start(command, stdin)
        assert done.returncode != 0
        return done.stderr.decode("utf-8", "replace")

    def text(self, *command: str | Path) -> str:
        """Run a command that must succeed; returns the line that it printed."""
        return self.run(*command).decode().strip()

    def _start(
        self, command: tuple[str | Path, ...], stdin: bytes
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory / "home"),
            "NIX_REMOTE": f"local?root={self.root}",
            "NIX_CONF_DIR": str(self.directory / "conf"),
            "NIX_CONFIG": NIX_CONFIG,
        }
        return subprocess.run(
            command, input=stdin, env=environment, capture_output=True, timeout=60, check=False
        )


@pytest.fixture
def nix(tmp_path: Path) -> RealNix:
    directory = tmp_path / "nix"
    directory.mkdir()
    return RealNix(directory)


def walk_directory(path: Path) -> Iterator[NarEvent]:
    """Give the events of the NAR of what is at ``path``."""
    yield from _walk(path, b"")
    yield NarEnd()


def _walk(path: Path, name: bytes) -> Iterator[NarEvent]:
    if path.is_symlink():
        yield Symlink(name, os.fsencode(path.readlink()))
    elif path.is_dir():
        yield DirectoryStart(name)
        for child in sorted(os.fsencode(child.name) for child in path.iterdir()):
            yield from _walk(path / os.fsdecode(child), child)
        yield DirectoryEnd()
    else:
        data = path.read_bytes()
        yield RegularFile(name, len(data), bool(path.stat().st_mode & 0o100), 0)
        if data:
            yield FileData(data)
        yield FileEnd()


@pytest.fixture(scope="session")
def walk() -> Callable[[Path], Iterator[NarEvent]]:
    return walk_directory


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A directory with everything that a NAR can hold, and names that sort in surprising ways."""
    package = tmp_path / "package"
    (package / "bin").mkdir(parents=True)
    (package / "bin" / "tool").write_bytes(b"#!/bin/sh\n")
    (package / "bin" / "tool").chmod(0o755)
    (package / "empty").mkdir()
    (package / "share").mkdir()
    (package / "share.d").mkdir()
    for size in (0, 1, 7, 8, 9, 4096, 300_001):
        (package / "share" / f"{size}").write_bytes(bytes(i % 251 for i in range(size)))
    (package / "share" / "0").chmod(0o755)
    for name in ("a", "B", "a-b", "a.b", "a+b", "\u00fc", "~", "x" * 255):
        (package / "share.d" / name).write_bytes(name.encode())
    (package / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"")
    (package / "link").symlink_to("share/8")
    (package / "dangling").symlink_to("/no/where" + "/x" * 500)
    return package


@dataclass(frozen=True)
class _File:
    data: bytes
    executable: bool


_Node = dict[bytes, "_Node"] | _File | bytes

_names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"0"))
    .filter(lambda name: name not in (b".", b".."))
)
_files = st.builds(_File, st.binary(max_size=70), st.booleans())
_targets = st.binary(min_size=1, max_size=30).map(lambda target: target.replace(b"\0", b"0"))
_nodes: st.SearchStrategy[_Node] = st.recursive(
    _files | _targets, lambda nodes: st.dictionaries(_names, nodes, max_size=5), max_leaves=12
)


def _events(node: _Node, name: bytes) -> Iterable[NarEvent]:
    match node:
        case bytes(target):
            yield Symlink(name, target)
        case _File(data, executable):
            yield RegularFile(name, len(data), executable, 0)
            if data:
                yield FileData(data)
            yield FileEnd()
        case dict(children):
            yield DirectoryStart(name)
            for child in sorted(children):
                yield from _events(children[child], child)
            yield DirectoryEnd()


@pytest.fixture(scope="session")
def nar_events() -> st.SearchStrategy[list[NarEvent]]:
    """Events of NARs of all shapes; offsets are 0."""
    return _nodes.map(lambda node: [*_events(node, b""), NarEnd()])
