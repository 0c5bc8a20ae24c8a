"""Store paths: ``<store directory>/<32 characters of nix32>-<name>``.

Source: Nix manual, "Store path"; ``src/libstore/path.cc`` of Nix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.hash import NIX32_ALPHABET
from fusesnap.nix.quoting import quote

HASH_PART_LENGTH: Final = 32
# Nix's limit: with the hash part and suffixes such as ".lock" and ".drv" a base name still fits
# into the 255 bytes that file systems give a name.
MAX_NAME_LENGTH: Final = 211

_HASH_PART: Final = re.compile(f"[{NIX32_ALPHABET}]{{{HASH_PART_LENGTH}}}", re.ASCII)
_NAME: Final = re.compile(rf"(?!\.\.?(?:-|\Z))[0-9A-Za-z+\-._?=]{{1,{MAX_NAME_LENGTH}}}", re.ASCII)
_STORE_DIR: Final = re.compile(r"(?:/(?!\.\.?(?:/|\Z))[^\x00-\x20/:;,\x7f]+)+")


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A store path without its store directory. The order is that of base names, as Nix sorts.

    Raises :class:`InvalidData` where a part is not what Nix allows, so that every instance is a
    valid path.
    """

    hash_part: str
    name: str

    def __post_init__(self) -> None:
        if not _HASH_PART.fullmatch(self.hash_part):
            raise InvalidData(
                f"hash part {quote(self.hash_part)} of {quote(self.base_name)} is not"
                f" {HASH_PART_LENGTH} characters of {NIX32_ALPHABET}"
            )
        if not _NAME.fullmatch(self.name):
            raise InvalidData(
                f"name of store path {quote(self.base_name)} {_fault_of_name(self.name)}"
            )

    @property
    def base_name(self) -> str:
        """``<hash part>-<name>``, the name of the file in the store directory."""
        return f"{self.hash_part}-{self.name}"

    @classmethod
    def parse_base_name(cls, text: str) -> StorePath:
        """Read ``<hash part>-<name>``; raises :class:`InvalidData`."""
        if len(text) <= HASH_PART_LENGTH or text[HASH_PART_LENGTH] != "-":
            raise InvalidData(
                f"{quote(text)} is not a store path's base name:"
                f" expected {HASH_PART_LENGTH} characters of hash, '-' and a name"
            )
        return cls(text[:HASH_PART_LENGTH], text[HASH_PART_LENGTH + 1 :])

    def __str__(self) -> str:
        return self.base_name


@dataclass(frozen=True, slots=True, order=True)
class HashPart:
    """A store path of which nothing but the hash part is known: whoever finds it says the name.

    Raises :class:`InvalidData` where it is none.
    """

    hash_part: str

    def __post_init__(self) -> None:
        if not _HASH_PART.fullmatch(self.hash_part):
            raise InvalidData(
                f"{quote(self.hash_part)} is not {HASH_PART_LENGTH} characters of {NIX32_ALPHABET}"
            )

    @property
    def base_name(self) -> str:
        """What is known of the path's base name."""
        return self.hash_part

    def is_of(self, path: StorePath) -> bool:
        """Whether ``path`` has this hash part."""
        return path.hash_part == self.hash_part

    def __str__(self) -> str:
        return self.hash_part


def _fault_of_name(name: str) -> str:
    if not name:
        return "is empty"
    if len(name) > MAX_NAME_LENGTH:
        return f"has {len(name)} characters, expected at most {MAX_NAME_LENGTH}"
    wrong = re.search(r"[^0-9A-Za-z+\-._?=]", name)
    if wrong:
        return f"has the character {wrong[0]!r}, expected letters, digits and +-._?= only"
    return "begins with a component '.' or '..', which Nix refuses"


@dataclass(frozen=True, slots=True)
class StoreDir:
    """The directory that store paths of one store are in.

    Absolute, normalised, no slash at its end; :class:`InvalidData` otherwise.
    """

    path: str = "/nix/store"

    def __post_init__(self) -> None:
        if not _STORE_DIR.fullmatch(self.path):
            raise InvalidData(
                f"store directory {quote(self.path)} is not an absolute, normalised path"
                " without spaces, ':', ';' and ','"
            )

    def parse(self, text: str) -> StorePath:
        """Read a full path that is exactly a store path of this directory.

        Nothing above or below one is taken. Raises :class:`InvalidData`.
        """
        directory, separator, base_name = text.rpartition("/")
        if not separator or directory != self.path:
            raise InvalidData(f"{quote(text)} is not a store path in {self.path}")
        return StorePath.parse_base_name(base_name)

    def format(self, path: StorePath | HashPart) -> str:
        """Return the full path of ``path`` in this directory."""
        return f"{self.path}/{path.base_name}"

    def __str__(self) -> str:
        return self.path
