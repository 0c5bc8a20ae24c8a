"""Which closures get a bundle: those that a node may ask for when it sees an image of what is published."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.references import reached
from fusesnap.nix.startup_bundle import file_name, root_file_name
from fusesnap.nix.store_path import StoreDir, StorePath


@dataclass(frozen=True, slots=True)
class BundledClosure:
    """A closure by its narinfos, sorted by path; ``root`` is the path whose closure it is, if it is one path's.

    ``shown``: what is left of that without the root, which is what containers show if the root is an image.
    """

    digest: ClosureDigest
    narinfos: tuple[NarInfo, ...]
    root: StorePath | None
    shown: ClosureDigest | None

    @classmethod
    def of(
        cls, narinfos: Iterable[NarInfo], store_dir: StoreDir, root: StorePath | None = None
    ) -> Self:
        """The closure that consists of the paths of ``narinfos``."""
        ordered = tuple(sorted(narinfos, key=lambda info: info.store_path))
        paths = [info.store_path for info in ordered]
        digest = ClosureDigest.of(paths, store_dir)
        rest = [path for path in paths if path != root]
        shown = None if root is None else ClosureDigest.of(rest, store_dir)
        return cls(digest, ordered, root, shown)

    @property
    def traceable(self) -> tuple[ClosureDigest, ...]:
        """The closures whose traces may be its own."""
        return (self.digest,) if self.shown is None else (self.digest, self.shown)

    @property
    def file_names(self) -> tuple[str, ...]:
        """Under which names its bundle is in a cache."""
        by_root = () if self.root is None else (root_file_name(self.root),)
        return (file_name(self.digest), *by_root)


def closures_of(
    roots: Sequence[StorePath],
    narinfos: Mapping[StorePath, NarInfo],
    traced: Container[ClosureDigest],
    store_dir: StoreDir,
) -> list[BundledClosure]:
    """Those of each of ``roots`` and, if there are several, of all together.

    An image in an archive, and a list as nixpkgs' ``closureInfo`` writes it, show what they reference and not
    themselves: what is left without the root is one more, if it is ``traced``. Every path must be in ``narinfos``.
    """
    found: dict[ClosureDigest, BundledClosure] = {}
    for closure in _candidates(roots, narinfos, traced, store_dir):
        known = found.get(closure.digest)
        if known is None or known.root is None:
            found[closure.digest] = closure
    return list(found.values())


def _candidates(
    roots: Sequence[StorePath],
    narinfos: Mapping[StorePath, NarInfo],
    traced: Container[ClosureDigest],
    store_dir: StoreDir,
) -> Iterator[BundledClosure]:
    for root in dict.fromkeys(roots):
        paths = reached([root], narinfos)
        yield BundledClosure.of((narinfos[path] for path in paths), store_dir, root)
        shown = BundledClosure.of((narinfos[path] for path in paths - {root}), store_dir)
        if shown.digest in traced:
            yield shown
    if roots:
        yield BundledClosure.of((narinfos[path] for path in reached(roots, narinfos)), store_dir)
