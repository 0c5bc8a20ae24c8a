"""An image that can be read, wherever it comes from: a file, a directory, or made for the occasion."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fusesnap.errors import InvalidData
from fusesnap.images.blobs import LayoutArchive, LayoutDirectory, LayoutFiles
from fusesnap.images.digest import Digest
from fusesnap.images.disk import Progress, no_progress, refusals
from fusesnap.images.docker_archive import DockerArchive
from fusesnap.images.image_files import MANIFEST_NAME
from fusesnap.images.layout import Image, ImageLayer, ImageLayout
from fusesnap.images.platform import Platform
from fusesnap.nix.store_path import StorePath

_LAYOUT_NAMES = ("oci-layout", "index.json")


class OpenImage(Protocol):
    """An image for one platform, checked, whose layers can be read.

    ``image`` has the documents' bytes and says what each layer is; ``store_paths`` are the paths that it stands for
    where that is known before a layer was looked at: of an image that was made of a package, its closure.
    """

    @property
    def image(self) -> Image: ...

    @property
    def store_paths(self) -> tuple[StorePath, ...]: ...

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        """Stream the blob of a layer of ``image``; what came counts only when the iterator has ended.

        Raises InvalidData, ContentMismatch, StorageFailure.
        """


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image in an archive or a layout. Which of its layers are Nix layers, their annotations say."""

    image: Image
    _source: ImageLayout | DockerArchive
    store_paths: tuple[StorePath, ...] = ()

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        """See ``OpenImage``."""
        return self._source.blob(layer)


@contextmanager
def open_image(
    location: Path,
    name: str,
    platform: Platform,
    scratch: Path,
    *,
    digest: Digest | None = None,
    reference: str | None = None,
    follow: bool = False,
    progress: Progress = no_progress,
) -> Iterator[OpenImage]:
    """Open the image at ``location``: an OCI layout, in a directory or in a tar, or a tar as Docker saves one.

    ``location`` is a stranger's: no link in it is followed, unless ``follow``. ``name`` is what messages call it. A tar
    may be compressed; it is unfolded into a file without a name in the directory ``scratch``. ``digest`` chooses one
    image of several by its manifest, ``reference`` by what it is called there. ``progress`` is told of bytes that were
    decompressed or hashed, and may raise to stop.

    Raises InvalidData for what is no image, or none for ``platform``, or more than one; ContentMismatch;
    StorageFailure.
    """
    with _files(location, name, scratch, progress, follow=follow) as files:
        source = _source(files, progress)
        chosen = str(digest) if _chooses(source, digest) else reference
        image = source.image(platform, chosen)
        if digest is not None and image.manifest.digest != digest:
            raise InvalidData(
                f"{name}: expected an image with manifest {digest}, got {image.manifest.digest}"
            )
        yield FoundImage(image, source)


def _files(
    location: Path, name: str, scratch: Path, progress: Progress, *, follow: bool
) -> LayoutFiles:
    with refusals(name):
        mode = (location.stat() if follow else location.lstat()).st_mode
    if stat.S_ISDIR(mode):
        return LayoutDirectory(location, name, follow=follow)
    return LayoutArchive(location, name, scratch=scratch, follow=follow, progress=progress)


def _source(files: LayoutFiles, progress: Progress) -> ImageLayout | DockerArchive:
    # Docker 25 and later write both, the layout with more in it.
    if any(_has(files, name) for name in _LAYOUT_NAMES):
        return ImageLayout(files, "add @ and a digest")
    if _has(files, MANIFEST_NAME):
        return DockerArchive(files, progress)
    raise InvalidData(
        f"{files.name}: expected an image: an OCI layout (oci-layout, index.json) or what docker"
        f" save writes ({MANIFEST_NAME}); neither is there"
    )


def _has(files: LayoutFiles, name: str) -> bool:
    region = files.find(name)
    if region is None:
        return False
    with region:
        return True


def _chooses(source: ImageLayout | DockerArchive, digest: Digest | None) -> bool:
    return digest is not None and isinstance(source, ImageLayout)
