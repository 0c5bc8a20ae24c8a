"""Where a narinfo says that the index of its NAR is.

The field ``NarIndex`` of a narinfo, unknown to Nix, which leaves such fields alone: ``<URL> <bytes> <key name>``. A
reader learns from it that there is an index without asking for it, how much is to be fetched, and whether the key is
one that it trusts. Nothing rests on it: the index itself is signed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self

from fusesnap.errors import InvalidData
from fusesnap.nix.narinfo import NarInfo, parse_size, parse_url
from fusesnap.nix.quoting import quote

FIELD: Final = "NarIndex"


@dataclass(frozen=True, slots=True)
class IndexReference:
    """``url`` is relative to the cache, or absolute; ``size`` in bytes; ``key_name`` of the key that signed."""

    url: str
    size: int
    key_name: str

    @classmethod
    def of(cls, info: NarInfo) -> Self | None:
        """Read it, if ``info`` has one; raises :class:`InvalidData` where it cannot be read."""
        values = [value for name, value in info.unknown if name == FIELD]
        if not values:
            return None
        if len(values) > 1:
            raise InvalidData(f"narinfo: field {FIELD} comes twice")
        words = values[0].split(" ")
        if len(words) != 3:  # noqa: PLR2004 - as above
            raise InvalidData(
                f"narinfo: field {FIELD} is {quote(values[0])}, expected '<URL> <bytes> <key name>'"
            )
        try:
            return cls(parse_url(words[0]), parse_size(words[1]), words[2])
        except InvalidData as error:
            raise InvalidData(f"narinfo: field {FIELD}: {error}") from None

    def added_to(self, info: NarInfo) -> NarInfo:
        """Return ``info`` with this in the place of what it had."""
        others = tuple(field for field in info.unknown if field[0] != FIELD)
        return replace(info, unknown=(*others, (FIELD, str(self))))

    def __str__(self) -> str:
        return f"{self.url} {self.size} {self.key_name}"
