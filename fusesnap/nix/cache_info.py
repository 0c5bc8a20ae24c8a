"""``nix-cache-info``: what a binary cache says of itself.

Source: ``src/libstore/binary-cache-store.cc`` of Nix. Lines of ``Name: value``; lines without a
colon and unknown names are ignored, as Nix does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

# Three short lines; a page of some portal in between is larger, and not worth reading to its end.
MAX_CACHE_INFO_SIZE: Final = 64 * 1024

_PRIORITY: Final = re.compile(r"-?[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What a cache says of itself.

    Its store directory, whether it likes to be asked for many paths, and its priority (lower comes
    first).
    """

    store_dir: str
    want_mass_query: bool
    priority: int | None


def parse_cache_info(data: bytes) -> CacheInfo:
    """Read a ``nix-cache-info``; raises :class:`InvalidData`."""
    fields = _fields(data)
    if not fields.get("StoreDir"):
        raise InvalidData(f"nix-cache-info: field StoreDir missing; it begins {quote(data, 40)}")
    priority = fields.get("Priority")
    if priority is not None and not _PRIORITY.fullmatch(priority):
        raise InvalidData(f"nix-cache-info: Priority is {quote(priority)}, expected a number")
    return CacheInfo(
        store_dir=fields["StoreDir"],
        want_mass_query=fields.get("WantMassQuery") == "1",
        priority=None if priority is None else int(priority),
    )


def _fields(data: bytes) -> dict[str, str]:
    if len(data) > MAX_CACHE_INFO_SIZE:
        raise InvalidData(
            f"nix-cache-info: {len(data)} bytes, expected at most {MAX_CACHE_INFO_SIZE}"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData(f"nix-cache-info: binary, byte {error.start} is not UTF-8") from None
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, separator, value = line.partition(":")
        if not separator:
            continue
        if name in fields:
            raise InvalidData(f"nix-cache-info: field {quote(name)} comes twice")
        fields[name] = value.strip()
    return fields
