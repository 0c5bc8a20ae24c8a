"""The name of a closure: what belongs to an image, whatever it is called, is found by what is in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir, StorePath

_HEX: Final = re.compile("[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class ClosureDigest:
    """SHA-256 of a closure's sorted full store paths, one a line, each line with a line feed at its end.

    It is what ``LC_ALL=C sort -u store-paths | sha256sum`` prints for the list that nixpkgs' ``closureInfo`` writes.
    """

    hex: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.hex):
            raise InvalidData(
                f"digest of a closure is {quote(self.hex)}, expected 64 hexadecimal digits"
            )

    @classmethod
    def of(cls, paths: Iterable[StorePath], store_dir: StoreDir) -> Self:
        """The name of the closure that consists of ``paths``."""
        lines = sorted({f"{store_dir.path}/{path.base_name}\n" for path in paths})
        return cls(hashlib.sha256("".join(lines).encode("ascii", "surrogateescape")).hexdigest())

    def __str__(self) -> str:
        return self.hex
