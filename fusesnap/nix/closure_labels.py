"""How an image layer says which store paths it stands for.

Two schemes are in use, both nix-snapshotter's (``docs/architecture.md`` and ``pkg/nix2container``
there). They are annotations of the layer's descriptor in the image manifest, and containerd hands
those with the prefix ``containerd.io/snapshot/`` to a snapshotter as labels (DESIGN, section 11):

* ``containerd.io/snapshot/nix-closure`` names one store path. In it, the file ``store-paths`` (as
  nixpkgs' ``closureInfo`` writes it) lists the closure, one full store path a line.
* Older: ``containerd.io/snapshot/nix-layer`` is ``true``, and each
  ``containerd.io/snapshot/nix-store-path.<N>`` is the full store path of one member.

Where both are there, the first wins, as in nix-snapshotter. Labels come from whoever made the
image, so nothing is taken that is not exactly a path of our store directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir, StorePath

LABEL_PREFIX = "containerd.io/snapshot/"
CLOSURE_LABEL = LABEL_PREFIX + "nix-closure"
LAYER_LABEL = LABEL_PREFIX + "nix-layer"
STORE_PATH_LABEL_PREFIX = LABEL_PREFIX + "nix-store-path."
STORE_PATHS_FILE = "store-paths"

# The closure of a whole desktop system has some 10,000 paths. Each path costs a narinfo request and
# an entry of a directory, so a list without end is an attack, not a closure.
MAX_CLOSURE_PATHS = 65_536
# A line is at most 255 bytes of base name, the store directory and a newline.
MAX_STORE_PATHS_SIZE = MAX_CLOSURE_PATHS * 512


@dataclass(frozen=True, slots=True)
class ClosureLabel:
    """The layer's store paths are listed in the file ``store-paths`` of ``path``.

    ``path`` itself belongs to the closure only if the list says so.
    """

    path: StorePath


@dataclass(frozen=True, slots=True)
class PathLabels:
    """The layer's store paths, in the order of their labels' numbers, without duplicates."""

    paths: tuple[StorePath, ...]


def parse_nix_labels(
    labels: Mapping[str, str], store_dir: StoreDir
) -> ClosureLabel | PathLabels | None:
    """Read what the labels (or annotations) of one layer say; None for an ordinary layer.

    Raises InvalidData, naming label and value, where a value is not exactly a store path of
    ``store_dir``, a number is none, ``nix-layer`` is not ``true``, or there are too many paths.
    """
    closure = labels.get(CLOSURE_LABEL)
    if closure is not None:
        return ClosureLabel(_parse_path(f"label {CLOSURE_LABEL}", closure, store_dir))
    marker = labels.get(LAYER_LABEL)
    if marker is None:
        return None
    if marker != "true":
        raise InvalidData(f"label {LAYER_LABEL}: expected 'true', got {quote(marker)}")
    return PathLabels(_numbered_paths(labels, store_dir))


def parse_store_paths(data: bytes, store_dir: StoreDir) -> tuple[StorePath, ...]:
    """Read the contents of a closure's file ``store-paths``, in its order, without duplicates.

    Raises InvalidData, naming the line, for a line that is not exactly a store path of
    ``store_dir``, and for a file or a list that is too long.
    """
    if len(data) > MAX_STORE_PATHS_SIZE:
        raise InvalidData(
            f"{STORE_PATHS_FILE}: expected at most {MAX_STORE_PATHS_SIZE} bytes, got {len(data)}"
        )
    lines = data.split(b"\n")
    if lines[-1] == b"":  # after the final newline
        lines.pop()
    _check_count(STORE_PATHS_FILE, len(lines))
    paths = (
        _parse_path(
            f"{STORE_PATHS_FILE} line {number}", line.decode(errors="backslashreplace"), store_dir
        )
        for number, line in enumerate(lines, start=1)
    )
    return tuple(dict.fromkeys(paths))


def _numbered_paths(labels: Mapping[str, str], store_dir: StoreDir) -> tuple[StorePath, ...]:
    keys = [key for key in labels if key.startswith(STORE_PATH_LABEL_PREFIX)]
    _check_count(f"labels {STORE_PATH_LABEL_PREFIX}<N>", len(keys))
    keys.sort(key=lambda key: (_number(key, labels[key]), key))
    return tuple(dict.fromkeys(_parse_path(f"label {key}", labels[key], store_dir) for key in keys))


def _number(key: str, value: str) -> int:
    digits = key.removeprefix(STORE_PATH_LABEL_PREFIX)
    # Nine digits number more labels than we take, and keep int() linear.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):  # noqa: PLR2004
        raise InvalidData(
            f"label {quote(key)} = {quote(value)}: expected a decimal number after "
            f"{STORE_PATH_LABEL_PREFIX}"
        )
    return int(digits)


def _parse_path(where: str, text: str, store_dir: StoreDir) -> StorePath:
    try:
        return store_dir.parse(text)
    except InvalidData as error:
        raise InvalidData(
            f"{where}: expected a store path in {store_dir}, got {quote(text)}: {error}"
        ) from error


def _check_count(what: str, count: int) -> None:
    if count > MAX_CLOSURE_PATHS:
        raise InvalidData(f"{what}: expected at most {MAX_CLOSURE_PATHS} store paths, got {count}")
