"""Digests as OCI spells them: ``<algorithm>:<lower-case hexadecimal>``.

Source: OCI image specification, ``descriptor.md``, "Digests" and "Registered Algorithms".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.hash import HashAlgorithm
from fusesnap.nix.quoting import quote

# Registered algorithms that a hash function of this library can check. Of what names another
# algorithm nothing could be verified, so it is refused.
_ALGORITHMS: Final = {"sha256": HashAlgorithm.SHA256, "sha512": HashAlgorithm.SHA512}
_HEX: Final = re.compile("[0-9a-f]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Digest:
    """A checked digest. ``hexadecimal`` has exactly the digits that ``algorithm`` makes."""

    algorithm: HashAlgorithm
    hexadecimal: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``sha256:...`` or ``sha512:...``; raises InvalidData."""
        name, _, hexadecimal = text.partition(":")
        algorithm = _ALGORITHMS.get(name)
        if algorithm is None:
            raise InvalidData(f"digest {quote(text)}: expected sha256:... or sha512:...")
        digits = 2 * algorithm.digest_size
        if len(hexadecimal) != digits or not _HEX.fullmatch(hexadecimal):
            raise InvalidData(
                f"digest {quote(text, 160)}: expected {digits} lower-case hexadecimal digits after"
                f" '{name}:'"
            )
        return cls(algorithm, hexadecimal)

    @property
    def file_name(self) -> str:
        """The digest as a file name that needs no quoting anywhere."""
        return f"{self.algorithm}-{self.hexadecimal}"

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hexadecimal}"
