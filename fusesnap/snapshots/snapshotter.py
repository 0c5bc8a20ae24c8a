"""The snapshotter: overlayfs as containerd's own has it, with the local store above the layers of Nix images."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import trio

from fusesnap.errors import (
    FailedPrecondition,
    FusesnapError,
    StorageFailure,
    Unavailable,
)
from fusesnap.nix.store_path import StoreDir
from fusesnap.snapshots import overlay
from fusesnap.snapshots.announced import Announced, FindImage
from fusesnap.snapshots.answers import Answers
from fusesnap.snapshots.completion import complete
from fusesnap.snapshots.directories import Directories
from fusesnap.snapshots.farms import Farms, check_store_layer
from fusesnap.snapshots.foresight import Foresight
from fusesnap.snapshots.idmapped import Clones, IdmappedMounts
from fusesnap.snapshots.interface import (
    CommittedStore,
    Info,
    Kind,
    LazyLayer,
    Mount,
    PathSource,
    Snapshots,
    Starts,
    Usage,
)
from fusesnap.snapshots.labels import checked_labels, masked
from fusesnap.snapshots.leftovers import Leftovers
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.mountinfo import OverlayMount, overlay_mounts
from fusesnap.snapshots.nix_layer import NixLayers
from fusesnap.snapshots.overlay import OverlayOptions
from fusesnap.snapshots.owners import Owners, is_shifting
from fusesnap.snapshots.prompt import PromptAnswers, shows_store
from fusesnap.snapshots.records import NOTHING_NIX, Chain, Generation, NixFacts, Snapshot
from fusesnap.snapshots.snapshot_roots import SnapshotRoots
from fusesnap.snapshots.start_hints import StartHints
from fusesnap.snapshots.transaction import Transaction
from fusesnap.snapshots.usage import directories_usage, disk_usage
from fusesnap.snapshots.views import Plan, Views

log = logging.getLogger(__name__)


class Snapshotter(Snapshots):
    """The snapshots of one state directory. For the calls see :class:`Snapshots`."""

    def __init__(
        self,
        root: Path,
        metastore: Metastore,
        store: CommittedStore,
        paths: PathSource,
        farms: Farms,
        lazy: LazyLayer | None,
        *,
        store_dir: StoreDir,
        options: OverlayOptions,
        recognise_by_content: bool,
        clock: Callable[[], float],
        release_readers: Callable[[str], Awaitable[None]] | None = None,
        starts: Starts | None = None,
        find_image: FindImage | None = None,
        nursery: trio.Nursery | None = None,
    ) -> None:
        """Take the collaborators; ``clock`` gives seconds since the epoch.

        ``release_readers`` is given the upper directory of a snapshot that is to be removed and that ``lazy`` may have
        served, to end what its processes wait for. It must not take long, and must not raise. ``starts`` is told of
        containers that ``lazy`` serves. In ``nursery``, if there is one, an image's farms are built as soon as it is
        unpacked, and ``find_image`` is asked what it will show before.

        ``lazy`` serves what is missing; without it everything is realised before a mount is answered. Raises
        ``InvalidConfiguration`` where ``root`` cannot be named in mount options.
        """
        overlay.check_root(root)
        self._metastore = metastore
        self._store = store
        self._farms = farms
        self._store_dir = store_dir
        self._clock = clock
        self._release_readers = release_readers
        self._hints = StartHints(starts)
        self._directories = Directories(root / "snapshots")
        self._idmapped = IdmappedMounts(root)
        self._roots = SnapshotRoots(store.roots, root)
        self._leftovers = Leftovers(
            metastore, self._directories, farms, self._idmapped, self._roots
        )
        self._nix = NixLayers(store, paths, store_dir, by_content=recognise_by_content)
        views = Views(store, paths, self._nix, farms, lazy, store_dir, clock)
        self._answers = Answers(self._directories, farms, store, views, self._idmapped, options)
        self._foresight = Foresight(metastore, views, farms, self._answers.image_layers)
        self._announced = Announced(find_image, self._nix, self._hints, nursery)
        self._nursery = nursery
        self.prompt = PromptAnswers(metastore, farms, self._answers, self._nix, self._insert)

    async def recover(self) -> None:
        """Look at what an earlier life has left. To be called once, before any other call but :meth:`remove_leftovers`.

        Raises ``Unsupported`` where the store layer could let an image reach into store paths.
        """
        await trio.to_thread.run_sync(self._recover)

    async def remove_leftovers(self) -> None:
        """Remove what an earlier life has left half-made or half-removed, and log each.

        It may take long, as a large container's files do: no other call need wait for it.
        """
        await trio.to_thread.run_sync(self._leftovers.remove_if_possible, abandon_on_cancel=True)

    async def files_views(self) -> frozenset[Path]:
        """The views of single files that mounts of existing snapshots were answered with."""

        def read() -> frozenset[Path]:
            with self._metastore.reading() as transaction:
                return frozenset(transaction.files_views())

        return await trio.to_thread.run_sync(read)

    async def uppers(self) -> dict[str, str]:
        """The keys of the active snapshots, by their upper directories."""

        def read() -> dict[str, str]:
            with self._metastore.reading() as transaction:
                return {
                    str(self._directories.fs(snapshot.id)): snapshot.info.name
                    for snapshot in transaction.snapshots()
                    if snapshot.info.kind is Kind.ACTIVE
                }

        return await trio.to_thread.run_sync(read)

    async def stat(self, key: str) -> Info:
        """See :class:`Snapshots`."""
        return (await trio.to_thread.run_sync(self._read, key)).info

    async def update(self, info: Info, fields: Sequence[str] = ()) -> Info:
        """See :class:`Snapshots`."""
        given = checked_labels(info.labels)

        def write() -> Info:
            with self._metastore.writing() as transaction:
                labels = masked(transaction.snapshot(info.name).info.labels, given, fields)
                return transaction.update_labels(info.name, labels, self._now()).info

        return await trio.to_thread.run_sync(write)

    async def usage(self, key: str) -> Usage:
        """See :class:`Snapshots`."""
        snapshot = await trio.to_thread.run_sync(self._read, key)
        if snapshot.info.kind is not Kind.ACTIVE:
            return snapshot.usage
        # Only reads, and may take long: a caller that goes away need not be waited for.
        try:
            return await trio.to_thread.run_sync(
                disk_usage, self._directories.fs(snapshot.id), abandon_on_cancel=True
            )
        except StorageFailure:
            await trio.to_thread.run_sync(self._check_there, snapshot)
            raise

    async def walk(self, matches: Callable[[Info], bool] | None = None) -> Sequence[Info]:
        """See :class:`Snapshots`."""

        def read() -> list[Info]:
            with self._metastore.reading() as transaction:
                infos = [snapshot.info for snapshot in transaction.snapshots()]
            return [info for info in infos if matches is None or matches(info)]

        return await trio.to_thread.run_sync(read)

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """See :class:`Snapshots`.

        Where labels name store paths, they are admitted here already: containerd holds its own database's lock
        during Commit, and an image that cannot be had should fail before its layers are fetched.
        """
        return await self._create(Kind.ACTIVE, key, parent, checked_labels(labels))

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """See :class:`Snapshots`."""
        return await self._create(Kind.VIEW, key, parent, checked_labels(labels))

    async def mounts(self, key: str) -> Sequence[Mount]:
        """See :class:`Snapshots`.

        While a snapshot is mounted the answer is what it is mounted with: whoever mounts it a second time (a diff
        does) must see the same layers under the same upper directory. Otherwise it is the best that there is now, so
        that a container which is started again does without FUSE as soon as its closure is complete. Everything that
        was ever answered stays on disk until Remove: a client mounts later than it asks.
        """

        def read() -> tuple[Snapshot, Chain, Owners, list[Generation]]:
            with self._metastore.reading() as transaction:
                snapshot = transaction.snapshot(key)
                if snapshot.info.kind is Kind.COMMITTED:
                    raise FailedPrecondition(
                        f"snapshot {key!r}: expected an active snapshot or a view, got a committed one"
                    )
                chain = transaction.chain(snapshot.info.parent)
                answered = transaction.generations(snapshot.id)
            return snapshot, chain, self._answers.owners(key, snapshot.info.labels, chain), answered

        snapshot, chain, owners, answered = await trio.to_thread.run_sync(read)
        generation = None
        if shows_store(key, chain):
            generation = await trio.to_thread.run_sync(self._standing, snapshot, answered)
            if generation is not None:
                await trio.to_thread.run_sync(self._idmap, snapshot.id, owners, generation)
            else:
                plan, clones = await self._answers.plan(chain, owners)
                with clones or nullcontext():
                    await trio.to_thread.run_sync(self._answer_with, snapshot, chain, plan, clones)
                generation = plan.generation
                upper, kind = self._directories.fs(snapshot.id), snapshot.info.kind
                self._hints.answered(kind, key, upper, chain, plan)
        return self._answers.mounts(snapshot.id, snapshot.info.kind, chain, generation, owners)

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str], parent: str = ""
    ) -> None:
        """See :class:`Snapshots`."""
        labels = checked_labels(labels)

        def check() -> tuple[Snapshot, Chain]:
            with self._metastore.reading() as transaction:
                active = transaction.check_commit(key, name, parent)
                return active, transaction.chain(active.info.parent)

        active, chain = await trio.to_thread.run_sync(check)
        all_labels = {**active.info.labels, **labels}
        facts = NOTHING_NIX
        try:
            if not is_shifting(key):
                layers = self._answers.image_layers(chain)
                fs = self._directories.fs(active.id)
                add = partial(self._roots.add, active.id)
                root = self._hints.rooting(add, chain, all_labels)
                facts = await self._nix.facts(fs, all_labels, chain.paths, layers, root)
                self._hints.admitted(name, [*chain.paths, *facts.paths])
            await trio.to_thread.run_sync(self._commit, active, chain, key, name, labels, facts)
        except StorageFailure:
            await trio.to_thread.run_sync(self._check_there, active)
            raise
        if facts.paths and self._nursery is not None:
            self._nursery.start_soon(self._foresight.build, name)

    async def remove(self, key: str) -> None:
        """See :class:`Snapshots`."""

        def served() -> Path | None:
            with self._metastore.reading() as transaction:
                snapshot = transaction.snapshot(key)
                answered = transaction.generations(snapshot.id)
            lazy = snapshot.info.kind is Kind.ACTIVE and not all(each.complete for each in answered)
            return self._directories.fs(snapshot.id) if lazy else None

        upper = await trio.to_thread.run_sync(served)
        if upper is not None:
            self._hints.removed(key)
            if self._release_readers is not None:
                await self._release_readers(str(upper))

        def remove() -> None:
            with self._metastore.writing() as transaction:
                transaction.remove(key)
            try:
                self._leftovers.remove()
            except StorageFailure as error:  # the snapshot is gone: cleanup finds what it has left
                log.warning("%s", error)

        await trio.to_thread.run_sync(remove)

    async def cleanup(self) -> None:
        """See :class:`Snapshots`."""
        await trio.to_thread.run_sync(self._leftovers.remove)

    async def _create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]
    ) -> Sequence[Mount]:
        def check() -> tuple[Chain, Owners]:
            with self._metastore.reading() as transaction:
                chain = transaction.chain(parent)
                transaction.check_free(key)
            return chain, self._answers.owners(key, labels, chain)

        chain, owners = await trio.to_thread.run_sync(check)
        if kind is Kind.ACTIVE:
            self._announced.unpacking(key, labels)
            await self._nix.labelled(labels, chain.paths)
        plan, clones = None, None
        if shows_store(key, chain):
            plan, clones = await self._answers.plan(chain, owners)
        with clones or nullcontext():
            id_ = await trio.to_thread.run_sync(
                self._insert, kind, key, parent, labels, chain, owners, plan, clones
            )
        generation = plan.generation if plan is not None else None
        self._hints.answered(kind, key, self._directories.fs(id_), chain, plan)
        return self._answers.mounts(id_, kind, chain, generation, owners)

    def _insert(
        self,
        kind: Kind,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        chain: Chain,
        owners: Owners,
        plan: Plan | None,
        clones: Clones | None,
    ) -> int:
        if plan is not None:
            self._build(plan)  # may take long: not while others wait for their turn to write
        with self._metastore.writing() as transaction:
            id_ = transaction.create(kind, key, parent, labels, self._now()).id
            parent_id = _same_parent(transaction, parent, chain)
            if plan is not None:
                self._record(transaction, id_, parent_id, plan)
            owner = owners.mapping.root if owners.mapping is not None else None
            shifted = is_shifting(key)
            self._directories.create(id_, kind, parent_id, owner=owner, shifted=shifted)
            self._idmapped.remove(id_)  # of a transaction that was rolled back and had this id
            if clones is not None:
                self._idmapped.attach(id_, clones)
        return id_

    def _answer_with(
        self, snapshot: Snapshot, chain: Chain, plan: Plan, clones: Clones | None
    ) -> None:
        self._build(plan)
        with self._metastore.writing() as transaction:
            _check_same(snapshot, transaction.snapshot(snapshot.info.name))
            parent_id = _same_parent(transaction, snapshot.info.parent, chain)
            self._record(transaction, snapshot.id, parent_id, plan)
            if clones is not None:
                self._idmapped.attach(snapshot.id, clones)

    def _idmap(self, id_: int, owners: Owners, generation: Generation) -> None:
        """Have the idmapped mounts that an answer was given with."""
        clones = self._answers.idmap(id_, owners, generation)
        if clones is not None:
            with clones, self._metastore.writing() as transaction:
                if id_ in transaction.ids():
                    self._idmapped.attach(id_, clones)

    def _build(self, plan: Plan) -> None:
        for farm in plan.farms:
            self._farms.ensure(farm)

    def _record(self, transaction: Transaction, id_: int, parent: int | None, plan: Plan) -> None:
        """Refer to a generation, from the snapshot and from its parent: the image's next container finds it there."""
        self._build(
            plan
        )  # between building and this turn another may have removed what nobody referred to
        transaction.add_generation(id_, plan.generation)
        if parent is not None:
            transaction.set_generation(parent, plan.generation)

    def _commit(
        self,
        active: Snapshot,
        chain: Chain,
        key: str,
        name: str,
        labels: Mapping[str, str],
        facts: NixFacts,
    ) -> None:
        id_, parent = active.id, active.info.parent
        usage = disk_usage(self._directories.fs(id_))
        if facts.overridden.completed:
            complete(
                self._directories.base(id_),
                sorted(facts.overridden.completed),
                self._store,
                self._store_dir,
            )
            usage += directories_usage(self._directories.base(id_))
        with self._metastore.writing() as transaction:
            _check_same(active, transaction.check_commit(key, name, parent))
            _same_parent(transaction, parent, chain)
            transaction.commit(
                key, name, parent, labels=labels, usage=usage, nix=facts, now=self._now()
            )
        if facts.paths:
            log.info("snapshot %s stands for %d store paths", name, len(facts.paths))

    def _standing(self, snapshot: Snapshot, answered: list[Generation]) -> Generation | None:
        """The generation to answer with again: what is mounted, or what cannot get better."""
        newest = answered[-1] if answered else None
        if len(answered) != 1 or newest is None or not newest.complete:
            # Only now is it worth looking through all mounts of the node.
            mounted = self._mounted(snapshot, answered)
            if mounted is not None:
                return mounted
        if newest is not None and newest.complete and self._farms.are_there(newest.farms):
            return newest
        return None

    def _mounted(self, snapshot: Snapshot, answered: list[Generation]) -> Generation | None:
        """The generation that the snapshot is mounted with, if it is."""
        mounts = overlay_mounts()
        if snapshot.info.kind is Kind.ACTIVE:
            upper = str(self._directories.fs(snapshot.id))
            mounts = tuple(mount for mount in mounts if mount.upper == upper)
            if mounts and answered:
                return _used(answered, mounts) or answered[-1]
            return None
        # A view has nothing of its own in its mount: another's mount with the same layers counts as its own.
        return _used(answered, mounts)

    def _read(self, key: str) -> Snapshot:
        with self._metastore.reading() as transaction:
            return transaction.snapshot(key)

    def _check_there(self, seen: Snapshot) -> None:
        """Raise if a snapshot was removed meanwhile, which explains why nothing can be read of it."""
        _check_same(seen, self._read(seen.info.name))

    def _recover(self) -> None:
        check_store_layer(self._store.layer)
        for farm in self._farms.remove_unfinished():
            log.warning("removed %s, which was being built", farm)
        with self._metastore.reading() as transaction:
            ids, stated = transaction.ids(), transaction.stated_paths()
        self._roots.recover(stated)
        self._idmap_again()
        for id_ in self._directories.missing(ids):
            log.error("the directory %s of a snapshot is missing", self._directories.fs(id_))

    def _idmap_again(self) -> None:
        """Have the idmapped mounts of what was answered in an earlier life, on the FUSE mount of this one."""
        had = self._idmapped.ids()
        with self._metastore.reading() as transaction:
            answers = [
                (snapshot, transaction.chain(snapshot.info.parent), _most_fuse(generations))
                for snapshot in (transaction.snapshots() if had else ())
                if snapshot.id in had and (generations := transaction.generations(snapshot.id))
            ]
        for snapshot, chain, generation in answers:
            try:
                owners = self._answers.owners(snapshot.info.name, snapshot.info.labels, chain)
                self._idmap(snapshot.id, owners, generation)
            except FusesnapError as error:  # the next call for this snapshot says so again
                log.warning("snapshot %s: %s", snapshot.info.name, error)

    def _now(self) -> int:
        return int(self._clock() * 1_000_000) * 1_000  # a float has no nanoseconds to give


def _check_same(seen: Snapshot, now: Snapshot) -> None:
    """Raise ``Unavailable`` if a key belongs to another snapshot by now."""
    if seen.id != now.id:
        raise Unavailable(f"snapshot {now.info.name!r} was removed and made anew meanwhile")


def _same_parent(transaction: Transaction, parent: str, chain: Chain) -> int | None:
    """The id of ``parent``, the top of ``chain``. Raises ``Unavailable`` if the name is another snapshot's by now."""
    if not parent:
        return None
    found = transaction.parent(parent)
    if found.id != chain.layers[0].id:
        raise Unavailable(f"parent snapshot {parent!r} was removed and made anew meanwhile")
    return found.id


def _most_fuse(answered: Sequence[Generation]) -> Generation:
    """The newest generation with FUSE in it, or the newest of all."""
    return next((each for each in reversed(answered) if not each.complete), answered[-1])


def _used(answered: Sequence[Generation], mounts: Sequence[OverlayMount]) -> Generation | None:
    """The newest generation that one of ``mounts`` has all farms of, those with more farms first."""
    newest_first = list(reversed(answered))
    for generation in sorted(newest_first, key=lambda one: len(one.farms), reverse=True):
        if any(mount.names_all(generation.farms) for mount in mounts):
            return generation
    return None
