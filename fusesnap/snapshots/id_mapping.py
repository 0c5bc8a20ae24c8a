"""Which user and group ids of the host a container's ids are: the mapping of its user namespace (user_namespaces(7)).

containerd says it by two labels of the snapshot, ``<in the container>:<on the host>:<how many>`` with commas between
(``Marshal`` in its ``internal/userns/idmap.go``). What is written here is made anew from numbers, so that no label
becomes an option of a mount as it came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidArgument

UID_LABEL: Final = "containerd.io/snapshot/uidmapping"
GID_LABEL: Final = "containerd.io/snapshot/gidmapping"

NO_ID: Final = 2**32 - 1  # the kernel's "no such id"
OVERFLOW_ID: Final = 65_534  # what the kernel shows of ids without a mapping
USUAL_LENGTH: Final = 65_536  # ids of 16 bits, as everybody maps them

_RANGE: Final = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})")


@dataclass(frozen=True, slots=True)
class IdRange:
    """``length`` ids, from ``inside`` on in the container, from ``outside`` on on the host."""

    inside: int
    outside: int
    length: int

    def __str__(self) -> str:
        return f"{self.inside}:{self.outside}:{self.length}"


@dataclass(frozen=True, slots=True)
class IdMapping:
    """The ranges of user ids and of group ids. Both map id 0, which owns the root of a container."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]

    @classmethod
    def of_labels(cls, labels: Mapping[str, str]) -> IdMapping | None:
        """What labels say; ``None`` if they say nothing. Raises ``InvalidArgument``."""
        if not (labels.get(UID_LABEL) or labels.get(GID_LABEL)):
            return None
        return cls(_ranges(labels, UID_LABEL), _ranges(labels, GID_LABEL))

    @classmethod
    def from_root(cls, uid: int, gid: int) -> IdMapping:
        """That of a container whose root is ``uid`` and ``gid``, where no more is known."""
        return cls(
            (IdRange(0, uid, min(USUAL_LENGTH, NO_ID - uid)),),
            (IdRange(0, gid, min(USUAL_LENGTH, NO_ID - gid)),),
        )

    @property
    def root(self) -> tuple[int, int]:
        """User and group of the host that the container's root is."""
        return _outside_of_root(self.uids), _outside_of_root(self.gids)

    def inside(self, uid: int, gid: int) -> tuple[int, int]:
        """User and group as the container sees them."""
        return _inside(self.uids, uid), _inside(self.gids, gid)

    @property
    def options(self) -> tuple[str, str]:
        """As containerd 2 wants it said in a mount: it maps the layers of the overlay before it mounts it."""
        return f"uidmap={_written(self.uids)}", f"gidmap={_written(self.gids)}"


def _ranges(labels: Mapping[str, str], label: str) -> tuple[IdRange, ...]:
    ranges = tuple(_range(label, text) for text in labels.get(label, "").split(","))
    if not any(each.inside == 0 for each in ranges):
        raise InvalidArgument(f"label {label}: expected a range for the container's id 0")
    return ranges


def _range(label: str, text: str) -> IdRange:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise InvalidArgument(
            f"label {label}: expected <id in the container>:<id on the host>:<length>, got {text!r}"
        )
    found = IdRange(*map(int, match.groups()))
    if not found.length or max(found.inside, found.outside) + found.length > NO_ID:
        raise InvalidArgument(f"label {label}: {text!r} is not a range of ids below {NO_ID}")
    return found


def _outside_of_root(ranges: tuple[IdRange, ...]) -> int:
    return next(each.outside for each in ranges if each.inside == 0)


def _inside(ranges: tuple[IdRange, ...], outside: int) -> int:
    for each in ranges:
        if 0 <= outside - each.outside < each.length:
            return outside - each.outside + each.inside
    return OVERFLOW_ID


def _written(ranges: tuple[IdRange, ...]) -> str:
    return ",".join(map(str, ranges))
