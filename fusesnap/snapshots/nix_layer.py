"""Finds out at Commit which store paths a layer stands for, and makes sure that they can be had.

A pull must fail, with the reason, where a container could later miss a file. So nothing is a Nix layer before every
path of its closure is committed, or admitted by whoever fetches.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from fusesnap.errors import (
    ClosureUnavailable,
    FusesnapError,
    InvalidArgument,
    InvalidData,
)
from fusesnap.fetch.keeping import keeping
from fusesnap.nix.closure_labels import (
    CLOSURE_LABEL,
    MAX_STORE_PATHS_SIZE,
    STORE_PATHS_FILE,
    ClosureLabel,
    parse_nix_labels,
    parse_store_paths,
)
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.snapshots.admissions import Admissions
from fusesnap.snapshots.interface import CommittedStore, PathSource
from fusesnap.snapshots.layer_content import Found, LayerContent, read_layer
from fusesnap.snapshots.recognition import recognise
from fusesnap.snapshots.records import NixFacts, Overridden, PathKind
from fusesnap.store.storage_errors import storage

# Fetching has its own limits; this one only bounds how many tasks wait for it.
CONCURRENT_REALISATIONS: Final = 64

# The NAR of a link: six words of its grammar in 112 bytes, and a target of at most 4,095 bytes, padded (Dolstra 2006,
# "The purely functional software deployment model", figure 5.2).
MAX_LINK_NAR: Final = 112 + 4096

_OWN: Final = {Found.DIRECTORY, Found.OPAQUE_DIRECTORY, Found.FILE}
_NO_SUCH_FILE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class NixLayers:
    """Recognises Nix layers for one store directory. ``by_content``: also those that come without labels."""

    def __init__(
        self,
        store: CommittedStore,
        paths: PathSource,
        store_dir: StoreDir,
        *,
        by_content: bool,
    ) -> None:
        self._store = store
        self._source = paths
        self._admissions = Admissions(paths)
        self._store_dir = store_dir
        self._by_content = by_content

    async def labelled(
        self, labels: Mapping[str, str], below: Collection[StorePath] = ()
    ) -> tuple[StorePath, ...]:
        """The store paths that labels name, all of them sure to be had; none if the labels name none.

        ``below`` are those of the chain below. Raises ``InvalidArgument`` for labels that cannot be used, and as
        ``PathSource.admit`` and ``realise`` do.
        """
        paths = await self.named(labels)
        await self.ensure_admitted(paths, below)
        return paths

    async def facts(
        self,
        layer: Path,
        labels: Mapping[str, str],
        below: Mapping[StorePath, PathKind],
        lowers: Sequence[Path],
        root: Callable[[Iterable[StorePath]], None],
    ) -> NixFacts:
        """What the layer in the directory ``layer``, with ``labels``, means above a chain with the paths ``below``.

        ``lowers`` are the directories of the chain's layers, topmost first. ``root`` is called, in a thread, with the
        paths that it stands for, before it is looked what of them is there: from then on nothing of them is collected.

        Every path that it stands for can be had then, and every path that it adds to is committed. Raises as
        :meth:`labelled`.
        """
        named = await self.named(labels)
        content = await trio.to_thread.run_sync(read_layer, layer, self._store_dir)
        by_content = self._by_content and not await trio.to_thread.run_sync(
            self._replaces, content, lowers, below
        )
        found = recognise(content, named, _as_placed(below), by_content=by_content)
        if found.paths:
            await trio.to_thread.run_sync(root, found.paths)
        sizes = await self.ensure_admitted(found.paths, below)
        await self.realise_all(found.added_to)
        completed = await trio.to_thread.run_sync(self._directories, found.added_to)
        hidden = found.hidden | (found.added_to - completed)
        return NixFacts(_with_doubts(found.paths, sizes), Overridden(hidden, completed))

    def is_silent(self, labels: Mapping[str, str]) -> bool:
        """Whether labels name no store paths. Raises ``InvalidData`` for labels that cannot be used."""
        return parse_nix_labels(labels, self._store_dir) is None

    async def ensure_admitted(
        self, paths: Collection[StorePath], below: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        """Have every path admitted that is not committed; returns their NARs' sizes.

        ``below`` are those of the chain below. Raises as ``PathSource.admit``.
        """
        missing = await self.missing(paths)
        return await self._admissions.admit(missing, {*below, *paths}) if missing else {}

    async def realise_all(self, paths: Iterable[StorePath]) -> None:
        """Have every path committed. Raises ``ClosureUnavailable`` with what failed."""
        failures: list[FusesnapError] = []
        limit = trio.CapacityLimiter(CONCURRENT_REALISATIONS)

        async def realise(path: StorePath) -> None:
            async with limit:
                try:
                    await self._source.realise(path)
                except FusesnapError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for path in await self.missing(paths):
                nursery.start_soon(realise, path)
        if failures:
            raise ClosureUnavailable(failures)

    async def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Those of ``paths`` that are not committed, sorted."""
        wanted = sorted(paths)
        if not wanted:
            return []
        committed = await trio.to_thread.run_sync(self._store.committed_among, wanted)
        return [path for path in wanted if path not in committed]

    async def named(self, labels: Mapping[str, str]) -> tuple[StorePath, ...]:
        """The store paths that labels name, whether they can be had or not. Raises as :meth:`labelled`."""
        try:
            said = parse_nix_labels(labels, self._store_dir)
        except InvalidData as error:
            raise InvalidArgument(str(error)) from error
        if said is None:
            return ()
        if not isinstance(said, ClosureLabel):
            return said.paths
        async with keeping(self._store.roots, [said.path]):
            if await self.missing([said.path]):
                await self._source.expect(said.path)
                await self._source.realise(said.path)
            return await trio.to_thread.run_sync(self._listed_in, said.path)

    def _listed_in(self, closure: StorePath) -> tuple[StorePath, ...]:
        where = f"label {CLOSURE_LABEL}: {self._store_dir.format(closure)}"
        data = _read_list(self._store.location(closure), where)
        try:
            paths = parse_store_paths(data, self._store_dir)
        except InvalidData as error:
            raise InvalidArgument(f"{where}: {error}") from error
        if not paths:
            raise InvalidArgument(f"{where}: its file {STORE_PATHS_FILE} lists no store path")
        return paths

    def _replaces(
        self, content: LayerContent, lowers: Sequence[Path], below: Mapping[StorePath, PathKind]
    ) -> bool:
        """Whether a lower layer has, as its own, what this one seems to stand for.

        Then this is an ordinary layer that empties it, or changes its mode, of an image that carries its store paths.
        """
        stated = {path.base_name for path in below}
        names = content.entries.keys() - stated
        return bool(names) and any(
            found in _OWN
            for lower in lowers
            for name, found in read_layer(lower, self._store_dir).entries.items()
            if name in names
        )

    def _directories(self, paths: frozenset[StorePath]) -> frozenset[StorePath]:
        with storage("look at", self._store.layer):
            return frozenset(
                path for path in paths if stat.S_ISDIR(self._store.location(path).lstat().st_mode)
            )


def _as_placed(below: Mapping[StorePath, PathKind]) -> Mapping[StorePath, PathKind]:
    """The kinds that placeholders have."""
    return {
        path: PathKind.DIRECTORY if kind is PathKind.DIRECTORY_OR_LINK else kind
        for path, kind in below.items()
    }


def _with_doubts(
    paths: Mapping[StorePath, PathKind], sizes: Mapping[StorePath, int]
) -> Mapping[StorePath, PathKind]:
    """``paths`` with those marked that may be links although they have directories as placeholders."""
    return {
        path: PathKind.DIRECTORY_OR_LINK
        if kind is PathKind.DIRECTORY and sizes.get(path, MAX_LINK_NAR + 1) <= MAX_LINK_NAR
        else kind
        for path, kind in paths.items()
    }


def _read_list(closure: Path, where: str) -> bytes:
    """The closure's list. The content is verified, but its maker may be the image's: no link is followed."""
    path = closure / STORE_PATHS_FILE
    with storage("read", path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NO_SUCH_FILE:
                raise
            raise InvalidArgument(
                f"{where}: expected a file {STORE_PATHS_FILE} in it: {error.strerror}"
            ) from error
        try:
            _check_list(os.fstat(descriptor), where)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_STORE_PATHS_SIZE + 1)
        finally:
            os.close(descriptor)


def _check_list(status: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(f"{where}: its {STORE_PATHS_FILE} is not a regular file")
    if status.st_size > MAX_STORE_PATHS_SIZE:
        raise InvalidArgument(
            f"{where}: its {STORE_PATHS_FILE} has {status.st_size} bytes,"
            f" expected at most {MAX_STORE_PATHS_SIZE}"
        )
