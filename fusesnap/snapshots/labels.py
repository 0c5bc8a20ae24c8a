"""Labels of snapshots: which can be stored, and what a field mask changes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from fusesnap.errors import InvalidArgument

# containerd's API: "The combined size of a key/value pair cannot exceed 4096 bytes."
MAX_LABEL_SIZE: Final = 4096


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels as they are stored: an empty value is no label, as in containerd. Raises ``InvalidArgument``."""
    for key, value in labels.items():
        if not key:
            raise InvalidArgument(f"the key of the label with the value {value[:64]!r} is empty")
        size = len(key.encode()) + len(value.encode())
        if size > MAX_LABEL_SIZE:
            raise InvalidArgument(
                f"label {key[:64]!r}: expected at most {MAX_LABEL_SIZE} bytes with its value, got {size}"
            )
    return {key: value for key, value in labels.items() if value}


def masked(
    old: Mapping[str, str], new: Mapping[str, str], fields: Sequence[str]
) -> Mapping[str, str]:
    """``old`` labels with the ``fields`` of ``new`` in place. Raises ``InvalidArgument``."""
    labels = dict(old)
    for field in fields or ("labels",):
        name, dot, key = field.partition(".")
        if name != "labels":
            raise InvalidArgument(
                f"cannot update field {field!r} of a snapshot: expected 'labels' or 'labels.<key>'"
            )
        if not dot:
            labels = dict(new)
        elif key in new:
            labels[key] = new[key]
        else:
            labels.pop(key, None)
    return labels
