"""Which overlay mounts there are, as ``/proc/self/mountinfo`` says (proc(5)).

Only the mounts of our own mount namespace are seen. Everything that is decided from this errs on the side of "in use".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusesnap.store.storage_errors import storage

MOUNTINFO: Final = Path("/proc/self/mountinfo")
# In the state directory: what is below is the state directory, or a mount in it, as user namespaces see it.
IDMAPPED_NAME: Final = "idmapped"

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")  # the kernel's: space, comma, backslash and more
_MARK: Final = b"upperdir="
_LOWER: Final = "lowerdir="


@dataclass(frozen=True, slots=True)
class OverlayMount:
    """One overlay mount. ``options`` are as given to mount(2): relative lower directories stay relative."""

    options: str
    upper: str | None

    def names_all(self, names: tuple[str, ...]) -> bool:
        """Whether all of these strings occur in its options."""
        return all(name in self.options for name in names)

    @property
    def lowers(self) -> tuple[str, ...]:
        """The lower directories, topmost first."""
        words = self.options.split(",")
        lists = [word[len(_LOWER) :] for word in words if word.startswith(_LOWER)]
        return tuple(lists[0].split(":")) if lists else ()

    def has_layer_below(self, directory: Path) -> bool:
        """Whether a lower directory is in ``directory``, a mount in the state directory, or in an idmapped clone of it.

        Where options are longer than a page, containerd makes lower directories relative to what they have in common
        (``mount_linux.go`` in its ``mount`` package).
        """
        top, name = re.escape(str(directory.parent)), re.escape(directory.name)
        inside = re.compile(rf"({top}/)?({IDMAPPED_NAME}/\d+/)?{name}/")
        return any(inside.match(lower) for lower in self.lowers)


def devices(path: Path = MOUNTINFO) -> dict[Path, str]:
    """Where something is mounted, and the device number of what is on top there. Raises ``StorageFailure``."""
    with storage("read", path):
        lines = path.read_bytes().splitlines()
    words = (line.split(b" ", 5) for line in lines)
    return {Path(_unescape(point)): device.decode() for _, _, device, _, point, *_ in words}


def overlay_mounts(path: Path = MOUNTINFO) -> tuple[OverlayMount, ...]:
    """The overlay mounts that there are now. Raises ``StorageFailure``."""
    with storage("read", path):
        return parse(path.read_bytes())


def parse(text: bytes) -> tuple[OverlayMount, ...]:
    """The overlay mounts in the text of a mountinfo file."""
    mounts = []
    for line in text.splitlines():
        _, _, rest = line.partition(b" - ")
        kind, _, source_and_options = rest.partition(b" ")
        if kind == b"overlay":
            mounts.append(_overlay(source_and_options.partition(b" ")[2]))
    return tuple(mounts)


def root_upper(path: Path) -> str | None:
    """The upper directory of the overlay that is the root of the process whose mountinfo ``path`` is.

    ``None`` if its root is something else. Raises ``StorageFailure``, also when the process is gone.
    """
    with storage("read", path):
        lines = path.read_bytes().splitlines()
    roots = [line for line in lines if line.split(b" ", 5)[4:5] == [b"/"]]
    mounts = parse(roots[-1]) if roots else ()
    return mounts[0].upper if mounts else None


def _overlay(options: bytes) -> OverlayMount:
    uppers = [word[len(_MARK) :] for word in options.split(b",") if word.startswith(_MARK)]
    return OverlayMount(_unescape(options), _unescape(uppers[0]) if uppers else None)


def _unescape(text: bytes) -> str:
    plain = _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), text)
    return plain.decode(errors="surrogateescape")
