"""Images that store paths are, or that are made of them: found, fetched, verified and opened."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

import trio

from fusesnap.errors import InvalidData, StorageFailure
from fusesnap.fetch.keeping import keeping
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Realiser
from fusesnap.images.digest import Digest
from fusesnap.images.disk import open_regular, refusals
from fusesnap.images.image_files import is_image
from fusesnap.images.opening import OpenImage, open_image
from fusesnap.images.platform import Platform, architecture_of_elf
from fusesnap.images.programs import ProgramFinder, Programs, main_program
from fusesnap.images.reference import NixReference
from fusesnap.images.resolving import resolve
from fusesnap.images.synthesis import synthesise
from fusesnap.nix.elf import HEAD_SIZE, machine_of
from fusesnap.nix.store_path import HashPart, StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import LocalStore


class ImageFetch(Protocol):
    """Who has paths fetched, where it is somebody else than this process."""

    async def expect(self, root: HashPart) -> object:
        """The path with this hash part is wanted, and soon what it references. Does not fail."""
        ...

    async def realise(self, path: StorePath, priority: Priority) -> object:
        """Return when the path is committed. Raises as fetching it fails."""
        ...


class StoreImages:
    """Opens the images of one store, for one platform.

    ``scratch`` is a directory where compressed archives are unfolded while they are open. ``fetch``: who fetches before
    ``realiser`` is asked, which then finds what is there.
    """

    def __init__(
        self,
        store: LocalStore,
        realiser: Realiser,
        platform: Platform,
        scratch: Path,
        fetch: ImageFetch | None = None,
    ) -> None:
        self._store = store
        self._realiser = realiser
        self._platform = platform
        self._scratch = scratch
        self._fetch = fetch

    async def resolve(self, reference: NixReference) -> StorePath:
        """Return the store path that ``reference`` names, see :func:`resolve`."""
        if self._fetch is not None:
            await self._fetch.expect(reference.hash_part)
        return await resolve(self._realiser, reference)

    async def is_image(self, path: StorePath) -> bool:
        """Fetch ``path``, and say whether it is to be read as an image, rather than as a package."""
        tree = await self._tree(path)
        return await trio.to_thread.run_sync(is_image, tree, self._store.location(path))

    @asynccontextmanager
    async def open(self, path: StorePath, digest: Digest | None = None) -> AsyncIterator[OpenImage]:
        """Fetch ``path``, and open it as the image that it is, or make the image of the package that it is.

        Nothing of it is collected while it is open. ``digest`` is what the image's manifest must have.

        Raises what the fetch raises; InvalidData for what is neither, or no image for the platform; ContentMismatch;
        StorageFailure.
        """
        async with keeping(self._store.roots, [path]) as keep:
            tree = await self._tree(path)
            name = self._store.store_dir.format(path)
            location = self._store.location(path)
            with ExitStack() as opened:
                if await trio.to_thread.run_sync(is_image, tree, location):
                    found = open_image(
                        location,
                        name,
                        self._platform,
                        self._scratch,
                        digest=digest,
                        progress=_stop_if_cancelled,
                    )
                    yield await trio.to_thread.run_sync(opened.enter_context, found)
                else:
                    yield _checked(await self._synthesised(path, keep), name, digest)

    async def _synthesised(
        self, path: StorePath, keep: Callable[[Iterable[StorePath]], None]
    ) -> OpenImage:
        store_dir = self._store.store_dir
        closure = await self._realiser.closure(path, keep)
        finder = ProgramFinder(frozenset(closure), self._tree, store_dir)
        programs = await finder.find(path)
        await trio.to_thread.run_sync(self._check_machine, path, programs)
        return synthesise(path, closure, programs, self._platform, store_dir)

    async def _tree(self, path: StorePath) -> Tree:
        # Nobody reads it yet: what it refers to is not wanted on its account.
        if self._fetch is not None:
            await self._fetch.realise(path, Priority.TRACE)
        return await self._realiser.realise(path, priority=Priority.TRACE)

    def _check_machine(self, path: StorePath, programs: Programs) -> None:
        """See that what the image starts is for this platform. What is a script, or elsewhere, may be."""
        name = main_program(path, programs)
        if name is None:
            return
        location = self._store.location(path)
        if programs.directory is not None:
            if (location / "bin").is_symlink():
                return
            location = location / "bin" / name
        try:
            descriptor = open_regular(location, follow=False)
        except (InvalidData, StorageFailure):
            return  # a link
        try:
            with refusals(location):
                machine = machine_of(os.pread(descriptor, HEAD_SIZE, 0))
        finally:
            os.close(descriptor)
        if machine is not None and not self._platform.runs_machine(machine):
            raise InvalidData(
                f"{self._store.store_dir.format(path)}: expected a package for {self._platform}, its program"
                f" {name} is for {architecture_of_elf(machine)}"
            )


def _checked(image: OpenImage, name: str, digest: Digest | None) -> OpenImage:
    made = image.image.manifest.digest
    if digest is not None and made != digest:
        raise InvalidData(f"{name}: expected an image with manifest {digest}, got {made}")
    return image


def _stop_if_cancelled(_: int) -> None:
    trio.from_thread.check_cancelled()
