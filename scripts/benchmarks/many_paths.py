"""A closure of thousands of small store paths, of the kinds that real ones have, and images of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from testbed.images import Directory, Entry, File, Layer, ordinary_layer

from fusesnap.nix.hash import compress_digest, nix32_encode
from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    RegularFile,
)
from fusesnap.nix.store_path import StoreDir, StorePath

SIZE = 8 * 1024
SMALL_SIZE = 64


class Shape(Enum):
    """What a path is. A ``SMALL_DIRECTORY`` has so short a NAR that, before it is there, it might be a link."""

    DIRECTORY = 0
    SMALL_DIRECTORY = 1
    FILE = 2


@dataclass(frozen=True, slots=True)
class SmallPath:
    """One store path: a file, or a directory with one."""

    number: int
    shape: Shape
    references: tuple[StorePath, ...] = ()

    @property
    def store_path(self) -> StorePath:
        """Its name, as long as names usually are."""
        digest = hashlib.sha256(f"path {self.number}".encode()).digest()
        return StorePath(nix32_encode(compress_digest(digest, 20)), f"package-{self.number}-1.2.3")

    @property
    def data(self) -> bytes:
        """What its file holds."""
        size = SMALL_SIZE if self.shape is Shape.SMALL_DIRECTORY else SIZE
        return hashlib.shake_128(f"contents {self.number}".encode()).digest(size)

    def events(self) -> Iterator[NarEvent]:
        """Its NAR."""
        directory = self.shape is not Shape.FILE
        if directory:
            yield DirectoryStart(b"")
        yield RegularFile(b"data" if directory else b"", len(self.data), executable=False, offset=0)
        yield FileData(self.data)
        yield FileEnd()
        if directory:
            yield DirectoryEnd()
        yield NarEnd()


def small_paths(count: int) -> list[SmallPath]:
    """``count`` paths: of ten, eight are directories, one is a small one, one is a single file."""
    shapes = (*[Shape.DIRECTORY] * 8, Shape.SMALL_DIRECTORY, Shape.FILE)
    return [SmallPath(number, shapes[number % len(shapes)]) for number in range(count)]


def nix_image(paths: Sequence[SmallPath], store_dir: StoreDir) -> list[Layer]:
    """An image that names the paths: its topmost layer has a placeholder for each."""
    entries: dict[str, Entry | bytes | str] = {
        store_dir.format(path.store_path).lstrip("/"): File(mode=0o555)
        if path.shape is Shape.FILE
        else Directory()
        for path in paths
    }
    return [*_base("nix"), ordinary_layer(entries)]


def ordinary_image(paths: Sequence[SmallPath], store_dir: StoreDir) -> list[Layer]:
    """An image with as many layers that carries the paths."""
    entries: dict[str, Entry | bytes | str] = {}
    for path in paths:
        name = store_dir.format(path.store_path).lstrip("/")
        entries[name if path.shape is Shape.FILE else f"{name}/data"] = path.data
    return [*_base("ordinary"), ordinary_layer(entries)]


def chain_id(layers: Sequence[Layer]) -> str:
    """The name of an image's topmost snapshot (OCI image specification, "Layer ChainID")."""
    chain = ""
    for layer in layers:
        digest = f"sha256:{hashlib.sha256(layer.tar).hexdigest()}"
        chain = (
            f"sha256:{hashlib.sha256(f'{chain} {digest}'.encode()).hexdigest()}"
            if chain
            else digest
        )
    return chain


def _base(name: str) -> list[Layer]:
    return [
        ordinary_layer({"etc/hostname": b"bench\n", "tmp/.keep": b""}),
        ordinary_layer({"etc/os-release": f"ID={name}\n".encode()}),
    ]
