"""Writes an image as an OCI layout, into a tar or a directory: all of it, or nothing of it.

Source: OCI image specification, ``image-layout.md``.
"""

from __future__ import annotations

import os
import secrets
import tarfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from fusesnap.errors import ContentMismatch, InvalidArgument
from fusesnap.images.digest import Digest
from fusesnap.images.disk import PIECE, Progress, no_progress, refusals
from fusesnap.images.documents import Document
from fusesnap.images.layout import ImageLayer
from fusesnap.images.opening import OpenImage
from fusesnap.images.synthesis import json_document

INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'


def write_archive(
    image: OpenImage, path: Path, tag: str | None, progress: Progress = no_progress
) -> None:
    """Write ``image`` as a tar at ``path``, over what is there.

    ``tag`` is the reference that it gets. ``progress`` is told of the layers' bytes. Raises StorageFailure, and what
    reading a layer raises.
    """
    with _replacing(path) as file:
        for name, size, pieces in _files(image, tag, progress):
            header = tarfile.TarInfo(name)
            header.size, header.mode = size, 0o644
            _write(file, path, _padded(header.tobuf(tarfile.PAX_FORMAT), pieces, size))
        _write(file, path, [bytes(2 * tarfile.BLOCKSIZE)])


def write_layout(
    image: OpenImage, directory: Path, tag: str | None, progress: Progress = no_progress
) -> None:
    """Write ``image`` as a layout into ``directory``, which is to be empty or not there yet.

    Otherwise as :func:`write_archive`. Raises InvalidArgument for a directory with something in it.
    """
    with refusals(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if os.listdir(directory):
            raise InvalidArgument(f"{directory}: expected an empty directory, or none")
    for name, _, pieces in _files(image, tag, progress):
        target = directory / name
        with refusals(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as file:
            _write(file, target, pieces)


def _files(
    image: OpenImage, tag: str | None, progress: Progress
) -> Iterator[tuple[str, int, Generator[bytes, None, None]]]:
    """Each file's name, size in bytes, and pieces; a layout is complete with its last, ``index.json``."""
    found = image.image
    yield "oci-layout", len(_LAYOUT), _once(_LAYOUT)
    written: set[Digest] = set()
    for layer in found.layers:
        if layer.digest not in written:
            written.add(layer.digest)
            yield (
                _name(layer.digest),
                layer.size,
                checked(image, layer, progress),
            )
    for document in (found.config, found.manifest):
        yield _name(document.digest), len(document.data), _once(document.data)
    index = json_document(INDEX_TYPE, _index(found.manifest, image, tag)).data
    yield "index.json", len(index), _once(index)


def checked(
    image: OpenImage, layer: ImageLayer, progress: Progress
) -> Generator[bytes, None, None]:
    """Give the pieces of a layer's blob, telling ``progress`` of each.

    Raises ContentMismatch at the end where they are not what the manifest says.
    """
    hasher = layer.digest.algorithm.new()
    size = 0
    for piece in image.blob(layer):
        hasher.update(piece)
        size += len(piece)
        progress(len(piece))
        yield piece
    if (size, hasher.hexdigest()) != (layer.size, layer.digest.hexadecimal):
        raise ContentMismatch(
            f"{layer}: expected {layer.size} bytes with that digest, got {size} with"
            f" {layer.digest.algorithm}:{hasher.hexdigest()}"
        )


def _index(manifest: Document, image: OpenImage, tag: str | None) -> Mapping[str, Any]:
    platform = image.image.platform
    names = {"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": tag}
    return {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            {
                "mediaType": manifest.media_type,
                "digest": str(manifest.digest),
                "size": len(manifest.data),
                **({"annotations": names} if tag is not None else {}),
                "platform": {
                    "architecture": platform.architecture,
                    "os": platform.os,
                    **({"variant": platform.variant} if platform.variant is not None else {}),
                },
            }
        ],
    }


def _name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hexadecimal}"


def _once(data: bytes) -> Generator[bytes, None, None]:
    yield data


def _padded(header: bytes, pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    yield header
    yield from pieces
    yield bytes(-size % tarfile.BLOCKSIZE)


def _write(file: IO[bytes], path: Path, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        with refusals(path):
            file.write(piece)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets the name ``path`` when the block ends well, and is gone otherwise."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with refusals(path):
        file = partial.open("xb", buffering=PIECE)
    try:
        with file:
            yield file
            with refusals(path):
                file.flush()
                os.fsync(file.fileno())
        with refusals(path):
            partial.rename(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
