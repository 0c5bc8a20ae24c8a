"""Images for many containers at once: some store paths are every image's, the others are one image's own."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from testbed.closure import fetch_archives
from testbed.images import Directory, Entry, File, Layer, ordinary_layer
from testbed.processes import run

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

SHELL = "busybox"


@dataclass(frozen=True, slots=True)
class HerdPath:
    """A store path: a directory with one file, of ``size`` bytes that do not compress, or ``program``."""

    name: str
    size: int
    program: bytes = b""
    references: tuple[StorePath, ...] = ()

    @property
    def store_path(self) -> StorePath:
        """Its name."""
        digest = hashlib.sha256(f"herd {self.name} {self.size}".encode()).digest()
        return StorePath(nix32_encode(compress_digest(digest, 20)), self.name)

    @property
    def file(self) -> str:
        """The name of what it holds."""
        return SHELL if self.program else "data"

    @property
    def data(self) -> bytes:
        """What the file holds."""
        return self.program or hashlib.shake_128(self.name.encode()).digest(self.size)

    def events(self) -> Iterator[NarEvent]:
        """Its NAR."""
        yield DirectoryStart(b"")
        yield RegularFile(
            self.file.encode(), len(self.data), executable=bool(self.program), offset=0
        )
        yield FileData(self.data)
        yield FileEnd()
        yield DirectoryEnd()
        yield NarEnd()


@dataclass(frozen=True, slots=True)
class HerdImage:
    """The closure of one image in the order in which it is read, the shell's path first."""

    number: int
    paths: tuple[HerdPath, ...]
    store_dir: StoreDir

    @property
    def command(self) -> list[str]:
        """Reads every file of the closure, says so, and stays."""
        shell, *others = (self._name(path) for path in self.paths)
        read = f"{shell} cat {' '.join(others)} | {shell} wc -c"
        return [shell, "sh", "-c", f"{read}; exec {shell} sleep 10000"]

    @property
    def says(self) -> str:
        """What the command prints when it has read all."""
        return f"{sum(path.size for path in self.paths[1:])}\n"

    def nix_layers(self) -> list[Layer]:
        """An image that names the paths."""
        names = (self.store_dir.format(path.store_path).lstrip("/") for path in self.paths)
        return [self._base(), ordinary_layer({name: Directory() for name in names})]

    def ordinary_layers(self) -> list[Layer]:
        """An image that carries them."""
        entries: dict[str, Entry | bytes | str] = {
            self._name(path).lstrip("/"): File(data=path.data, mode=0o555) for path in self.paths
        }
        return [self._base(), ordinary_layer(entries)]

    def _name(self, path: HerdPath) -> str:
        return f"{self.store_dir.format(path.store_path)}/{path.file}"

    def _base(self) -> Layer:
        return ordinary_layer({"etc/hostname": f"image-{self.number}\n".encode()})


def herd_images(
    images: int, *, shared: Sequence[int], own: Sequence[int], shell: bytes, store_dir: StoreDir
) -> list[HerdImage]:
    """``images`` images with paths of ``shared`` sizes in common, and paths of ``own`` sizes each."""
    common = [HerdPath(f"shared-{number}", size) for number, size in enumerate(shared)]
    program = HerdPath("shell", len(shell), shell)

    def image(number: int) -> HerdImage:
        first, *rest = (HerdPath(f"own-{number}-{each}", size) for each, size in enumerate(own))
        others = (program, *common, *rest)
        # What an image is made for refers to all the rest, and is read first.
        first = replace(first, references=tuple(sorted(path.store_path for path in others)))
        return HerdImage(number, (program, first, *common, *rest), store_dir)

    return [image(number) for number in range(images)]


def busybox(directory: Path) -> bytes:
    """The static busybox of the Debian package, which is kept in ``directory``."""
    archive = fetch_archives(["busybox-static"], directory)["busybox-static"]
    unpacked = directory / "busybox.tar"
    run(["sh", "-c", 'dpkg-deb --fsys-tarfile "$1" > "$2"', "sh", archive, unpacked])
    with tarfile.open(unpacked) as tar:
        member = next(each for each in tar if each.name.endswith("/busybox") and each.isreg())
        return io.BufferedReader(tar.extractfile(member)).read()  # type: ignore[type-var]
