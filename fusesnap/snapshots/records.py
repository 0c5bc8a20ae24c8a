"""What the metastore holds, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Info, Usage


class PathKind(Enum):
    """What a store path is at its root. ``FILE`` is a single file or link; a narinfo does not say: ``UNKNOWN``.

    ``DIRECTORY_OR_LINK``: the placeholder is a directory, and the NAR so small that it may hold a link. nix-snapshotter
    follows links where it makes placeholders (``os.Stat`` in ``pkg/nix2container/generate.go`` there).
    """

    DIRECTORY = "directory"
    DIRECTORY_OR_LINK = "directory or link"
    FILE = "file"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as it is stored. ``id`` names its directory."""

    id: int
    info: Info
    usage: Usage


@dataclass(frozen=True, slots=True)
class Layer:
    """One committed snapshot of a chain.

    ``completed``: store paths of the layers below that it adds to are whole in a directory beside its own.
    """

    id: int
    completed: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """The layers of a chain, topmost first, and the store paths that stand in it for the local store's, sorted.

    Paths that a layer above their own replaces, whites out or adds to are not among them.
    """

    layers: tuple[Layer, ...]
    paths: Mapping[StorePath, PathKind]

    @property
    def id(self) -> int:
        """The id of its topmost snapshot, which is never another's and has always the same chain; 0 if it is empty."""
        return self.layers[0].id if self.layers else 0


NO_CHAIN = Chain((), MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Overridden:
    """What a layer changes of the layers below it: paths that it hides, and paths that it adds to."""

    hidden: frozenset[StorePath] = frozenset()
    completed: frozenset[StorePath] = frozenset()


@dataclass(frozen=True, slots=True)
class NixFacts:
    """What Commit finds out of a layer: the store paths that it stands for, and what it changes of those below."""

    paths: Mapping[StorePath, PathKind]
    overridden: Overridden


NOTHING_NIX = NixFacts(MappingProxyType({}), Overridden())


@dataclass(frozen=True, slots=True)
class Generation:
    """The layers of ours in the mounts of a snapshot: which farms, by key, and what FUSE serves, if anything.

    ``files_view`` shows missing paths that are no directories, or may be none; ``lazy_layer`` is there if directories
    are missing. A generation with neither has no FUSE in it.
    """

    closure_farm: str
    lazy_farm: str | None
    files_view: Path | None
    lazy_layer: Path | None

    @property
    def complete(self) -> bool:
        """Whether nothing is missing in it, so that no later one can be better."""
        return self.files_view is None and self.lazy_layer is None

    @property
    def farms(self) -> tuple[str, ...]:
        """The keys of its farms."""
        return (
            (self.closure_farm,) if self.lazy_farm is None else (self.closure_farm, self.lazy_farm)
        )
