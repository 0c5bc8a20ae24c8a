"""The spelling of a NAR: what its strings say, in which order, and what a name and a target may be.

Source: see :mod:`fusesnap.nix.nar`, which reads and writes it; :mod:`fusesnap.nix.packed_tree` knows from it where
everything stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

MAX_NAME_LENGTH: Final = 255  # NAME_MAX of Linux
MAX_TARGET_LENGTH: Final = 4095  # PATH_MAX of Linux without the NUL at its end
MAX_FILE_SIZE: Final = 2**63 - 1  # off_t of Linux


@dataclass(frozen=True, slots=True)
class NarLimits:
    """What a NAR from a stranger may ask of us."""

    # A path of Linux has 4095 bytes, so no more than 2,047 names; file trees of real packages stay
    # below 50.
    max_depth: int = 512
    # Each entry costs memory in the tree that is kept; the largest paths of nixpkgs have some
    # 300,000.
    max_entries: int = 4 * 1024 * 1024


DEFAULT_LIMITS: Final = NarLimits()


def spell(data: bytes) -> bytes:
    """Write one string."""
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def spelled_size(length: int) -> int:
    """Return how many bytes a string of ``length`` bytes takes in a NAR."""
    return 8 + length + -length % 8


def spell_all(*items: bytes) -> bytes:
    """Write strings, one after another."""
    return b"".join(map(spell, items))


def _after_padding(literal: bytes) -> tuple[bytes, ...]:
    """Return ``literal`` behind the padding of a string, by the string's length modulo 8."""
    return tuple(bytes(-length % 8) + literal for length in range(8))


MAGIC: Final = spell_all(b"nix-archive-1", b"(", b"type")
REGULAR: Final = spell_all(b"regular", b"contents")
EXECUTABLE: Final = spell_all(b"regular", b"executable", b"", b"contents")
DIRECTORY: Final = spell_all(b"directory")
SYMLINK: Final = spell_all(b"symlink", b"target")
ENTRY: Final = spell_all(b"entry", b"(", b"name")
NODE: Final = spell_all(b"node", b"(", b"type")
CLOSE_ROOT: Final = spell_all(b")")
CLOSE_ENTRY: Final = spell_all(b")", b")")
NAME_NODE: Final = _after_padding(NODE)
END_ROOT: Final = _after_padding(CLOSE_ROOT)
END_ENTRY: Final = _after_padding(CLOSE_ENTRY)


def check_name(name: bytes, previous: bytes) -> None:
    """Check the name of a directory's entry that comes after ``previous`` (empty before the first).

    Raises :class:`InvalidData`, as :func:`check_target` does.
    """
    if not name:
        raise InvalidData("empty name")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidData(f"name of {len(name)} bytes, expected at most {MAX_NAME_LENGTH}")
    if name in (b".", b".."):
        raise InvalidData(f"name {quote(name)} is reserved")
    if b"/" in name or b"\0" in name:
        raise InvalidData(f"name {quote(name)} has a slash or a NUL")
    if name == previous:
        raise InvalidData(f"name {quote(name)} comes twice")
    if name < previous:
        raise InvalidData(f"name {quote(name)} comes after {quote(previous)}: not sorted")


def check_target(target: bytes) -> None:
    """Check what a link points to."""
    if len(target) > MAX_TARGET_LENGTH:
        raise InvalidData(f"target of {len(target)} bytes, expected at most {MAX_TARGET_LENGTH}")
    if not target or b"\0" in target:
        raise InvalidData(f"target {quote(target)} is empty or has a NUL")
