"""Which layers a snapshot's mount has, and how they are written as options of mount(2).

Topmost first:

====================  =============================================================================
upper                 what is written (active snapshots)
lazy farm             redirects into the lazy layer, a directory for each that is missing
files view            FUSE: missing single files, links, and paths of unknown kind
closure farm          redirects into the store layer; single files and links
store layer           the committed local store
lazy layer            FUSE: every path that may be fetched
image layers          as they were unpacked, topmost first
====================  =============================================================================

What is not needed is left out; where nothing is missing there is no FUSE. The files view is below the lazy farm, which
is there for its sake even if it is empty, because overlayfs shows a merged directory with the metadata of its topmost
layer, and ours are local. Our layers are above all of the image's, so that no redirect of an image reaches the store.

It is always one mount: containerd 1.6 knows no target for a second, and the newest opens only the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidConfiguration
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.interface import Mount
from fusesnap.snapshots.records import Generation

KERNEL_PARAMETERS: Final = Path("/sys/module/overlay/parameters")
# They separate options, or layers, or begin an escape, in the one string that mount(2) takes.
_NOT_IN_PATHS: Final = ",:\\"


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """Options of every overlay mount, beside its layers."""

    common: tuple[str, ...] = ()

    @classmethod
    def of_kernel(cls, parameters: Path = KERNEL_PARAMETERS) -> OverlayOptions:
        """Those that containerd's overlayfs snapshotter uses with this kernel.

        ``index=off``, where the kernel knows it: the same upper directory may be mounted again while it still is.
        """
        return cls(("index=off",) if (parameters / "index").exists() else ())


def check_root(root: Path) -> None:
    """Raise ``InvalidConfiguration`` for a state directory that cannot be named in mount options."""
    wrong = [character for character in _NOT_IN_PATHS if character in str(root)]
    if wrong or not root.is_absolute():
        raise InvalidConfiguration(
            f"state directory {str(root)!r}: expected an absolute path without the characters"
            f" {' '.join(_NOT_IN_PATHS)}, which overlay mounts cannot name"
        )


def view_layers(generation: Generation, farms: Farms, store_layer: Path) -> tuple[Path, ...]:
    """Our layers in a mount, topmost first."""
    lazy_farm = generation.lazy_farm
    layers = (
        farms.path(lazy_farm) if lazy_farm is not None else None,
        generation.files_view,
        farms.path(generation.closure_farm),
        store_layer,
        generation.lazy_layer,
    )
    return tuple(layer for layer in layers if layer is not None)


def bind(directory: Path, *, writable: bool, mapped: Sequence[str] = ()) -> Mount:
    """Show one directory as it is. ``mapped`` as in :func:`overlay`."""
    return Mount("bind", str(directory), (*mapped, "rw" if writable else "ro", "rbind"))


def overlay(
    lowers: Sequence[Path],
    options: OverlayOptions,
    *,
    upper: tuple[Path, Path] | None,
    redirects: bool,
    mapped: Sequence[str] = (),
) -> Mount:
    """Show ``lowers``, topmost first, with ``upper`` (and its work directory) for what is written.

    ``redirects``: farms are among the lowers. ``mapped``: options that have containerd idmap the lowers, by a clone of
    the directory that they have in common. Mounts below it are not in the clone, so none of the lowers may be in one.
    """
    words = list(mapped)
    if upper is not None:
        words += [f"workdir={upper[1]}", f"upperdir={upper[0]}"]
    words.append("lowerdir=" + ":".join(map(str, lowers)))
    words.extend(options.common)
    if redirects:
        words.append("redirect_dir=follow")
    return Mount("overlay", "overlay", tuple(words))
