"""One transaction on the metastore: the rules of keys, names, kinds and parents are here, and nowhere else.

The errors are those of containerd's ``core/snapshots/storage/bolt.go``, found in the same order.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fusesnap.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Info, Kind, Usage
from fusesnap.snapshots.records import (
    NO_CHAIN,
    Chain,
    Generation,
    Layer,
    NixFacts,
    PathKind,
    Snapshot,
)

_SELECT: Final = (
    "SELECT s.id, s.key, coalesce(p.key, ''), s.kind, s.created, s.updated, s.labels, s.size, s.inodes"
    " FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent"
)
_CHAIN: Final = (
    "WITH RECURSIVE chain (id, parent, depth) AS ("
    " SELECT id, parent, 0 FROM snapshots WHERE id = ?"
    " UNION ALL"
    " SELECT s.id, s.parent, depth + 1 FROM snapshots AS s JOIN chain ON s.id = chain.parent) "
)
_CHAIN_IDS: Final = _CHAIN + "SELECT id FROM chain ORDER BY depth"  # noqa: S608  # constants only
# A chain with the store paths of a large closure takes some 500 KiB; few images are started at the same time.
MAX_CHAINS: Final = 32
_KINDS: Final = {kind.value: kind for kind in PathKind}


class Transaction:
    """Reads and changes of one transaction. See :class:`fusesnap.snapshots.metastore.Metastore`."""

    def __init__(self, connection: sqlite3.Connection, chains: dict[int, Chain]) -> None:
        """``chains`` keeps those of committed snapshots, by id, from one transaction to the next."""
        self._connection = connection
        self._chains = chains

    # Reading

    def snapshot(self, key: str) -> Snapshot:
        """The snapshot of that key or name. Raises ``NotFound``."""
        found = self._find(key)
        if found is None:
            raise NotFound(f"snapshot {key!r} does not exist")
        return found

    def snapshots(self) -> Iterator[Snapshot]:
        """All snapshots, oldest first."""
        for row in self._connection.execute(f"{_SELECT} ORDER BY s.id"):
            yield _snapshot(row)

    def ids(self) -> set[int]:
        """The ids of all snapshots."""
        return {row[0] for row in self._connection.execute("SELECT id FROM snapshots")}

    def check_free(self, key: str) -> None:
        """Raise ``AlreadyExists`` if a snapshot has that key or name, ``InvalidArgument`` if it is none."""
        if not key:
            raise InvalidArgument("the key or name of a snapshot is empty")
        if (found := self._find(key)) is not None:
            raise AlreadyExists(f"snapshot {key!r} exists already, {found.info.kind.value}")

    def parent(self, name: str) -> Snapshot:
        """The committed snapshot ``name``. Raises ``NotFound``, and ``InvalidArgument`` if it is not committed."""
        found = self._find(name)
        if found is None:
            raise NotFound(f"parent snapshot {name!r} does not exist")
        if found.info.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"parent {name!r}: expected a committed snapshot, got kind {found.info.kind.value}"
            )
        return found

    def active(self, key: str) -> Snapshot:
        """The active snapshot ``key``. Raises ``NotFound``, and ``FailedPrecondition`` for another kind."""
        found = self.snapshot(key)
        if found.info.kind is not Kind.ACTIVE:
            raise FailedPrecondition(
                f"snapshot {key!r}: expected an active snapshot, got kind {found.info.kind.value}"
            )
        return found

    def chain(self, name: str) -> Chain:
        """The chain that ``name`` is the top of; an empty one for ``""``. Raises as :meth:`parent`."""
        if not name:
            return NO_CHAIN
        top = self.parent(name).id
        chain = self._chains.get(top)
        if chain is None:
            if len(self._chains) >= MAX_CHAINS:
                self._chains.clear()
            chain = self._chains[top] = self._read_chain(top)
        return chain

    def _read_chain(self, top: int) -> Chain:
        ids = [row[0] for row in self._run(_CHAIN_IDS, top)]
        listed = self._of_chain("SELECT snapshot, base_name, kind FROM nix_paths", top)
        overridden = self._of_chain("SELECT snapshot, base_name, completed FROM overridden", top)
        completed = {id_ for id_, rows in overridden.items() if any(whole for _, whole in rows)}
        layers = tuple(Layer(id_, id_ in completed) for id_ in ids)
        return Chain(layers, _merge(ids, listed, overridden))

    def child(self, id_: int) -> str | None:
        """The key or name of a snapshot that has snapshot ``id_`` as its parent."""
        row = self._run("SELECT key FROM snapshots WHERE parent = ? LIMIT 1", id_).fetchone()
        return None if row is None else str(row[0])

    def generations(self, id_: int) -> list[Generation]:
        """What mounts of snapshot ``id_`` were answered with, oldest first."""
        rows = self._run(
            "SELECT closure_farm, lazy_farm, files_view, lazy_layer FROM generations"
            " WHERE snapshot = ? ORDER BY id",
            id_,
        )
        return [
            Generation(
                closure,
                lazy or None,
                Path(view) if view else None,
                Path(layer) if layer else None,
            )
            for closure, lazy, view, layer in rows
        ]

    def active_parents(self) -> list[str]:
        """The names of all snapshots that an active one lies on."""
        rows = self._run(
            "SELECT DISTINCT below.key FROM snapshots AS above"
            " JOIN snapshots AS below ON above.parent = below.id WHERE above.kind = 'active'"
        )
        return [str(row[0]) for row in rows]

    def stated_paths(self) -> dict[int, list[StorePath]]:
        """The store paths that each committed snapshot, being a Nix layer, stands for."""
        stated: dict[int, list[StorePath]] = {}
        for id_, base_name in self._run("SELECT snapshot, base_name FROM nix_paths"):
            stated.setdefault(id_, []).append(StorePath.parse_base_name(base_name))
        return stated

    def farms(self) -> set[str]:
        """The keys of all farms that some snapshot refers to."""
        rows = self._run(
            "SELECT closure_farm FROM generations UNION"
            " SELECT lazy_farm FROM generations WHERE lazy_farm != ''"
        )
        return {row[0] for row in rows}

    def files_views(self) -> set[Path]:
        """All views of single files that some snapshot refers to."""
        rows = self._run("SELECT DISTINCT files_view FROM generations WHERE files_view != ''")
        return {Path(row[0]) for row in rows}

    # Changing

    def create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str], now: int
    ) -> Snapshot:
        """Add an active snapshot or a view. Raises as ``Snapshots.prepare``."""
        parent_id = self.parent(parent).id if parent else None
        self.check_free(key)
        cursor = self._run(
            "INSERT INTO snapshots (key, parent, kind, labels, created, updated)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            key,
            parent_id,
            kind.value,
            json.dumps(labels),
            now,
            now,
        )
        id_ = cursor.lastrowid
        assert id_ is not None  # noqa: S101  # an INSERT always sets it
        return Snapshot(id_, Info(key, parent, kind, now, now, labels), Usage(0, 0))

    def commit(
        self,
        key: str,
        name: str,
        parent: str,
        *,
        labels: Mapping[str, str],
        usage: Usage,
        nix: NixFacts,
        now: int,
    ) -> int:
        """Turn the active snapshot ``key`` into the committed ``name``; returns its id. See ``Snapshots.commit``."""
        active = self.check_commit(key, name, parent)
        id_ = active.id
        parent_id = self.parent(active.info.parent).id if active.info.parent else None
        self._run(
            "UPDATE snapshots SET key = ?, parent = ?, kind = 'committed', labels = ?,"
            " created = ?, updated = ?, size = ?, inodes = ? WHERE id = ?",
            name,
            parent_id,
            json.dumps(labels),
            now,
            now,
            usage.size,
            usage.inodes,
            id_,
        )
        self._forget_generations(id_)
        # With a layer above it, it is no image, or not the newest: its view need not stand ready.
        if parent_id is not None:
            self._forget_generations(parent_id)
        self._connection.executemany(
            "INSERT INTO nix_paths (snapshot, base_name, kind) VALUES (?, ?, ?)",
            [(id_, path.base_name, kind.value) for path, kind in nix.paths.items()],
        )
        self._connection.executemany(
            "INSERT INTO overridden (snapshot, base_name, completed) VALUES (?, ?, ?)",
            [(id_, path.base_name, 0) for path in nix.overridden.hidden]
            + [(id_, path.base_name, 1) for path in nix.overridden.completed],
        )
        return id_

    def check_commit(self, key: str, name: str, parent: str) -> Snapshot:
        """Raise what a Commit would raise now; returns the snapshot, with the parent that it will have."""
        self.snapshot(key)
        self.check_free(name)
        found = self.active(key)
        if parent in ("", found.info.parent):
            return found
        if found.info.parent:
            raise InvalidArgument(
                f"snapshot {key!r} has the parent {found.info.parent!r}:"
                f" Commit cannot change it to {parent!r}"
            )
        self._check_rebase(key, parent)
        return replace(found, info=replace(found.info, parent=parent))

    def update_labels(self, key: str, labels: Mapping[str, str], now: int) -> Snapshot:
        """Replace the labels of the snapshot of that key or name. Raises ``NotFound``."""
        found = self.snapshot(key)
        self._run(
            "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
            json.dumps(labels),
            max(now, found.info.updated),  # a clock that was set back changes no order
            found.id,
        )
        return self.snapshot(key)

    def remove(self, key: str) -> int:
        """Remove the row of that key or name; returns its id. See ``Snapshots.remove``."""
        found = self.snapshot(key)
        if (child := self.child(found.id)) is not None:
            raise FailedPrecondition(
                f"cannot remove snapshot {key!r}: it is the parent of {child!r}"
            )
        self._run("DELETE FROM snapshots WHERE id = ?", found.id)
        return found.id

    def add_generation(self, id_: int, generation: Generation) -> None:
        """Note that mounts of snapshot ``id_`` are answered with ``generation``; it is the newest then."""
        values = (
            id_,
            generation.closure_farm,
            generation.lazy_farm or "",
            str(generation.files_view or ""),
            str(generation.lazy_layer or ""),
        )
        self._run(
            "DELETE FROM generations WHERE snapshot = ? AND closure_farm = ? AND lazy_farm = ?"
            " AND files_view = ? AND lazy_layer = ?",
            *values,
        )
        self._run(
            "INSERT INTO generations (snapshot, closure_farm, lazy_farm, files_view, lazy_layer)"
            " VALUES (?, ?, ?, ?, ?)",
            *values,
        )

    def set_generation(self, id_: int, generation: Generation) -> None:
        """As :meth:`add_generation`, and forget all others of that snapshot."""
        if self.generations(id_) == [generation]:
            return
        self._forget_generations(id_)
        self.add_generation(id_, generation)

    def _forget_generations(self, id_: int) -> None:
        self._run("DELETE FROM generations WHERE snapshot = ?", id_)

    def _check_rebase(self, key: str, parent: str) -> None:
        found = self._find(parent)
        if found is None:
            raise NotFound(f"parent snapshot {parent!r} of snapshot {key!r} does not exist")
        if found.info.kind is not Kind.COMMITTED:
            raise FailedPrecondition(
                f"parent {parent!r} of snapshot {key!r}: expected a committed snapshot,"
                f" got kind {found.info.kind.value}"
            )

    def _find(self, key: str) -> Snapshot | None:
        row = self._run(f"{_SELECT} WHERE s.key = ?", key).fetchone()
        return _snapshot(row) if row is not None else None

    def _of_chain(self, select: str, top: int) -> dict[int, list[tuple[str, Any]]]:
        """The facts of each layer: base name and what is said of it, by the layer's id."""
        facts: dict[int, list[tuple[str, Any]]] = {}
        in_chain = " WHERE snapshot IN (SELECT id FROM chain)"
        for id_, base_name, fact in self._run(_CHAIN + select + in_chain, top):
            facts.setdefault(id_, []).append((base_name, fact))
        return facts

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)


def _snapshot(row: tuple[Any, ...]) -> Snapshot:
    id_, key, parent, kind, created, updated, labels, size, inodes = row
    info = Info(key, parent, Kind(kind), created, updated, json.loads(labels))
    return Snapshot(id_, info, Usage(size, inodes))


def _merge(
    ids: list[int],
    listed: Mapping[int, list[tuple[str, Any]]],
    overridden: Mapping[int, list[tuple[str, Any]]],
) -> Mapping[StorePath, PathKind]:
    """Apply the layers from the bottom up: each takes away what it overrides, then adds what it stands for."""
    state: dict[str, PathKind] = {}
    for id_ in reversed(ids):
        for base_name, _ in overridden.get(id_, ()):
            state.pop(base_name, None)
        for base_name, kind in listed.get(id_, ()):
            if kind != PathKind.UNKNOWN.value or base_name not in state:
                state[base_name] = _KINDS[kind]
    return MappingProxyType(
        {StorePath.parse_base_name(base_name): kind for base_name, kind in sorted(state.items())}
    )
