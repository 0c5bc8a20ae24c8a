"""A snapshotter on a real file system with real mounts; store, caches and lazy layer are plain directories.

Trees are written down as values. Of a store path or a layer: bytes are a file, a string is a link, a dictionary is a
directory. Of a layer also: ``None`` is a whiteout, a list of one dictionary is an opaque directory.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import settings

from fusesnap.errors import ClosureUnavailable, FusesnapError, PathNotFound
from fusesnap.nix.hash import nix32_encode
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.snapshots.announced import FindImage
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.interface import Info, Mount
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.overlay import OverlayOptions
from fusesnap.snapshots.snapshotter import Snapshotter
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.roots import Roots
from fusesnap.store.temporary_roots import TemporaryRoots

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")

T = TypeVar("T")
Tree = Any  # recursive, see above

NOW = 1_700_000_000.0
OPAQUE = "trusted.overlay.opaque"


def path_named(name: str) -> StorePath:
    return StorePath(nix32_encode(hashlib.sha256(name.encode()).digest()[:20]), name)


def plant(path: Path, tree: Tree) -> None:
    """Write a tree down on disk; what is there of a directory stays."""
    match tree:
        case bytes():
            path.write_bytes(tree)
        case str():
            path.symlink_to(tree)
        case None:
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        case _:
            path.mkdir(exist_ok=True)
            if isinstance(tree, list):
                os.setxattr(path, OPAQUE, b"y")
                (tree,) = tree
            for name, child in tree.items():
                plant(path / name, child)


def canonicalise(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            canonicalise(entry)
        path.chmod(0o555)
    elif not path.is_symlink():
        path.chmod(0o444)
    os.utime(path, ns=(STORE_MTIME_NS, STORE_MTIME_NS), follow_symlinks=False)


def is_directory(path: str) -> bool:
    return Path(path).is_dir()


def look(path: Path) -> Tree:
    """The tree at ``path``, as :func:`plant` takes it (of a mount: nothing but files, links and directories)."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return str(path.readlink())
    if stat.S_ISDIR(status.st_mode):
        return {entry.name: look(entry) for entry in sorted(path.iterdir())}
    assert stat.S_ISREG(status.st_mode), path
    return path.read_bytes()


class DirectoryStore:
    """The committed local store, as plain directories."""

    def __init__(self, state: Path) -> None:
        self.layer = state / "layer"
        self.real = self.layer / ".fusesnap-store"
        self.real.mkdir(parents=True, exist_ok=True)
        os.setxattr(self.real, OPAQUE, b"y")
        (state / "nix" / "temproots").mkdir(parents=True, exist_ok=True)
        self.let_go: list[str] = []
        lock = CollectorLock(state / "nix")
        self.temporary = TemporaryRoots(state / "nix", StoreDir(), lock)
        self.roots = Roots(state / "nix", self.temporary, self.let_go.extend)

    def commit(self, path: StorePath, tree: Tree) -> None:
        if not self.location(path).exists():
            plant(self.location(path), tree)
            canonicalise(self.location(path))

    def committed_among(self, paths: Sequence[StorePath]) -> set[StorePath]:
        return {path for path in paths if os.path.lexists(self.location(path))}

    def location(self, path: StorePath) -> Path:
        return self.real / path.base_name


@dataclass
class MemoryPaths:
    """A source of paths: ``contents`` can be had, ``failures`` fail, all else is in no cache."""

    store: DirectoryStore
    contents: dict[StorePath, Tree] = field(default_factory=dict)
    failures: dict[StorePath, FusesnapError] = field(default_factory=dict)
    admitted: list[StorePath] = field(default_factory=list)
    realised: list[StorePath] = field(default_factory=list)
    prefetched: list[StorePath] = field(default_factory=list)
    expected: list[StorePath] = field(default_factory=list)
    shown: list[frozenset[StorePath]] = field(default_factory=list)
    nar_sizes: dict[StorePath, int] = field(default_factory=dict)

    async def expect(self, root: StorePath) -> None:
        self.expected.append(root)

    async def admit(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        self.shown.append(frozenset(shown))
        if failures := [failure for path in paths if (failure := self._failure(path))]:
            raise ClosureUnavailable(failures)
        self.admitted.extend(paths)
        return {path: self.nar_sizes.get(path, 1 << 20) for path in paths}

    async def realise(self, path: StorePath) -> None:
        if failure := self._failure(path):
            raise failure
        self.realised.append(path)
        self.store.commit(path, self.contents[path])

    def prefetch(self, paths: Sequence[StorePath]) -> None:
        self.prefetched.extend(paths)

    def _failure(self, path: StorePath) -> FusesnapError | None:
        if path in self.failures:
            return self.failures[path]
        return None if path in self.contents else PathNotFound(f"{path}: no cache has it")


class DirectoryLazyLayer:
    """What FUSE would serve, as plain directories: to overlayfs there is no difference."""

    def __init__(self, state: Path, source: MemoryPaths) -> None:
        self.layer = state / "lazy" / "layer"
        self.lazy = self.layer / ".fusesnap-lazy"
        self.lazy.mkdir(parents=True, exist_ok=True)
        os.setxattr(self.lazy, OPAQUE, b"y")
        self._views = state / "lazy" / "views"
        self._views.mkdir(exist_ok=True)
        self._source = source
        self._known: dict[frozenset[StorePath], Path] = {}

    def offer(self, path: StorePath) -> None:
        """Show a path as missing directories are shown."""
        plant(self.lazy / path.base_name, self._source.contents[path])
        canonicalise(self.lazy / path.base_name)

    async def view(self, paths: frozenset[StorePath]) -> Path:
        if paths not in self._known:
            view = self._views / str(len(self._known) + 1)
            plant(view, {"nix": {"store": {p.base_name: self._source.contents[p] for p in paths}}})
            self._known[paths] = view
        return self._known[paths]


class Mounts:
    """Mounts what a snapshotter says, as containerd would, and unmounts it in the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def mount(self, mounts: Sequence[Mount]) -> Path:
        (mount,) = mounts
        self._count += 1
        target = self._directory / str(self._count)
        target.mkdir(parents=True)
        self.mount_at(mount, target)
        return target

    def mount_at(self, mount: Mount, target: Path) -> None:
        kind = [] if mount.type == "bind" else ["-t", mount.type]
        options = ",".join(mount.options)
        subprocess.run(["mount", *kind, "-o", options, mount.source, str(target)], check=True)

    def unmount(self, target: Path) -> None:
        subprocess.run(["umount", str(target)], check=True)

    def close(self) -> None:
        """Unmount everything below the test's directory, under whatever name it is now."""
        lines = Path("/proc/self/mounts").read_text().splitlines()
        for target in reversed([line.split()[1] for line in lines]):
            if Path(target).is_relative_to(self._directory.parent):
                self.unmount(Path(target))


class HeardStarts:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def begins(
        self, key: str, upper: Path, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> None:
        self.heard.append(("begins", key, upper, paths, lazy))

    def foreseen(self, paths: frozenset[StorePath], labels: Mapping[str, str]) -> None:
        self.heard.append(("foreseen", paths, dict(labels)))

    def admitted(self, name: str, paths: frozenset[StorePath]) -> None:
        self.heard.append(("admitted", name, paths))

    def ended(self, key: str) -> None:
        self.heard.append(("ended", key))


class PromptFirst(Snapshotter):
    """Asks for prompt answers first, as the service does."""

    async def stat(self, key: str) -> Info:
        return await self._ask(self.prompt.stat, key) or await super().stat(key)

    async def mounts(self, key: str) -> Sequence[Mount]:
        return await self._ask(self.prompt.mounts, key) or await super().mounts(key)

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        prompt = await self._ask(self.prompt.prepare, key, parent, labels)
        return prompt or await super().prepare(key, parent, labels)

    async def _ask(self, call: Callable[..., T | None], *arguments: object) -> T | None:
        try:
            return await trio.to_thread.run_sync(call, *arguments)
        except FusesnapError:
            return None


class Bench:
    """A snapshotter with all that belongs to it."""

    def __init__(self, state: Path, mounts: Mounts) -> None:
        self.state = state
        self.store = DirectoryStore(state)
        self.source = MemoryPaths(self.store)
        self.lazy = DirectoryLazyLayer(state, self.source)
        self.mounts = mounts
        self.now = NOW
        self.released: list[str] = []
        self.starts = HeardStarts()
        self.kind: type[Snapshotter] = Snapshotter
        self.snapshotter = self.open()

    def open(
        self,
        *,
        lazy: bool = True,
        by_content: bool = True,
        find_image: FindImage | None = None,
        nursery: trio.Nursery | None = None,
    ) -> Snapshotter:
        """A snapshotter on this state, as after a restart."""
        self.metastore = Metastore(self.state / "snapshots.sqlite")
        self.snapshotter = self.kind(
            self.state,
            self.metastore,
            self.store,
            self.source,
            Farms(self.state / "farms"),
            self.lazy if lazy else None,
            store_dir=StoreDir(),
            options=OverlayOptions.of_kernel(),
            recognise_by_content=by_content,
            clock=lambda: self.now,
            release_readers=self.release,
            starts=self.starts,
            find_image=find_image,
            nursery=nursery,
        )
        return self.snapshotter

    async def release(self, upper: str) -> None:
        """End what waits in a snapshot: here it is only noted, and must come while the snapshot is there."""
        assert is_directory(upper)
        self.released.append(upper)

    def path(self, name: str, tree: Tree, *, committed: bool = False) -> StorePath:
        """A store path that can be had, or is there already."""
        path = path_named(name)
        self.source.contents[path] = tree
        if committed:
            self.store.commit(path, tree)
        elif isinstance(tree, dict):
            self.lazy.offer(path)
        return path

    async def layer(
        self,
        name: str,
        parent: str,
        tree: Tree,
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> str:
        """Unpack and commit a layer as containerd does: its applier writes into the upper directory itself."""
        key = key or f"k8s.io/1/extract-1-x {name}"
        mounts = await self.snapshotter.prepare(key, parent, labels or {})
        plant(upper_of(mounts), tree)
        await self.snapshotter.commit(name, key, labels or {})
        return name

    async def nix_layer(self, name: str, parent: str, *paths: StorePath) -> str:
        """A layer of placeholders, without labels."""
        return await self.layer(name, parent, self.placeholders(*paths))

    def placeholders(self, *paths: StorePath) -> Tree:
        """What nix-snapshotter puts into a layer."""
        return {
            "nix": {
                "store": {
                    path.base_name: {} if isinstance(self.source.contents[path], dict) else b""
                    for path in paths
                }
            }
        }

    async def run(self, key: str, parent: str) -> Path:
        """Prepare a container's snapshot and mount it."""
        return self.mounts.mount(await self.snapshotter.prepare(key, parent, {}))

    async def show(self, key: str, parent: str) -> Path:
        """Make a view and mount it."""
        return self.mounts.mount(await self.snapshotter.view(key, parent, {}))

    def close(self) -> None:
        self.metastore.close()
        self.store.temporary.close()

    plant = staticmethod(plant)
    look = staticmethod(look)


def upper_of(mounts: Sequence[Mount]) -> Path:
    (mount,) = mounts
    if mount.type == "bind":
        return Path(mount.source)
    (upper,) = [word for word in mount.options if word.startswith("upperdir=")]
    return Path(upper.removeprefix("upperdir="))


def lowers_of(mounts: Sequence[Mount]) -> list[Path]:
    (mount,) = mounts
    (lower,) = [word for word in mount.options if word.startswith("lowerdir=")]
    return [Path(directory) for directory in lower.removeprefix("lowerdir=").split(":")]


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path / "mnt")
    yield mounts
    mounts.close()


@pytest.fixture
def bench(tmp_path: Path, mounting: Mounts) -> Iterator[Bench]:
    made = Bench(tmp_path / "state", mounting)
    yield made
    made.close()


@pytest.fixture
def prompt_bench(bench: Bench) -> Bench:
    """One that is asked for prompt answers first."""
    bench.close()
    bench.kind = PromptFirst
    bench.open()
    return bench


@pytest.fixture
def lowers() -> Callable[[Sequence[Mount]], list[Path]]:
    return lowers_of


@pytest.fixture
def upper() -> Callable[[Sequence[Mount]], Path]:
    return upper_of
