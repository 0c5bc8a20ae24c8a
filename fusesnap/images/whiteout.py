"""Whiteouts: entries of a layer that hide what lower layers have.

Source: OCI image specification, ``layer.md``, "Whiteouts".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

PREFIX: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
# What AUFS keeps for itself at the root of a layer (.wh..wh.aufs, .wh..wh.plnk, .wh..wh.orph); the
# first Docker images have it, and containerd passes over it too.
_AUFS_PREFIX: Final = b".wh..wh."


@dataclass(frozen=True, slots=True)
class Whiteout:
    """Hides ``name`` in ``directory``; everything in it where ``name`` is None (opaque)."""

    directory: bytes
    name: bytes | None


class NotAWhiteout(Enum):
    """What else an entry may be."""

    ORDINARY = auto()
    IGNORED = auto()


def parse_whiteout(path: bytes, where: str) -> Whiteout | NotAWhiteout:
    """Say what the entry of the normalised ``path`` is; ``where`` names its layer in messages.

    Raises InvalidData for a whiteout that hides nothing that could have a name, and for an entry
    inside a whiteout.
    """
    if PREFIX not in path:
        return NotAWhiteout.ORDINARY
    parts = path.split(b"/")
    if parts[0].startswith(_AUFS_PREFIX) and parts[0] != _OPAQUE:
        return NotAWhiteout.IGNORED
    if any(part.startswith(PREFIX) for part in parts[:-1]):
        raise InvalidData(f"{where}: entry {quote(path)} is in a whiteout, which holds nothing")
    if not parts[-1].startswith(PREFIX):
        return NotAWhiteout.ORDINARY
    directory = b"/".join(parts[:-1])
    if parts[-1] == _OPAQUE:
        return Whiteout(directory, None)
    name = parts[-1][len(PREFIX) :]
    if name in (b"", b".", b".."):
        raise InvalidData(f"{where}: whiteout {quote(path)}: expected the name that it hides")
    return Whiteout(directory, name)
