"""Keeps each layer as an uncompressed tar, so that any part of any file in it is one pread away."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from fusesnap.errors import ContentMismatch, InvalidData, StorageFailure
from fusesnap.images.disk import open_regular, refusals, write_all
from fusesnap.images.layer import LayerTar
from fusesnap.images.layout import ImageLayer, ImageLayout
from fusesnap.images.uncompressed import uncompressed

# A few KiB can say that they unfold to any number of bytes, and the disk would be full before the
# digest shows that they do not. The largest layers in use (models, CUDA) are some 20 GiB.
MAX_LAYER_SIZE: Final = 64 * 1024**3
_PARTIAL: Final = ".partial-"


class LayerCache:
    """A directory of ``<algorithm>-<diff ID>.tar``; whatever bears such a name was verified.

    Several processes may share it: a layer appears by rename, and what a killed process left
    behind is removed when the next opens the cache. Raises StorageFailure.
    """

    def __init__(self, directory: Path, *, max_layer_size: int = MAX_LAYER_SIZE) -> None:
        self._directory = directory
        self._max_layer_size = max_layer_size
        with refusals(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_leftovers()

    def layer(
        self,
        layout: ImageLayout,
        layer: ImageLayer,
        progress: Callable[[int], None] = lambda _: None,
    ) -> LayerTar:
        """Open the uncompressed tar of ``layer``, made now where it is not there yet.

        ``progress`` is told how many bytes of the tar were written since the last call; what it
        raises ends the work. Raises InvalidData (blob missing or damaged), ContentMismatch (size,
        digest or diff ID are not what was announced), StorageFailure.
        """
        path = self._directory / f"{layer.diff_id.file_name}.tar"
        descriptor = _open_present(path)
        if descriptor is None:
            descriptor = self._make(path, layout, layer, progress)
        return LayerTar(descriptor, layer.diff_id, f"{layout.name}: {layer}")

    def _make(
        self, path: Path, layout: ImageLayout, layer: ImageLayer, progress: Callable[[int], None]
    ) -> int:
        with self._partial() as (descriptor, partial):
            name = f"{layout.name}: {layer}"
            self._write(descriptor, name, layout, layer, progress)
            with refusals(self._directory):
                os.fsync(descriptor)
                partial.rename(path)
                _sync_directory(self._directory)
        return open_regular(path, follow=False)

    def _write(
        self,
        descriptor: int,
        name: str,
        layout: ImageLayout,
        layer: ImageLayer,
        progress: Callable[[int], None],
    ) -> None:
        hasher = layer.diff_id.algorithm.new()
        total = 0
        with closing(layout.blob(layer)) as blob, closing(uncompressed(blob, name)) as pieces:
            for piece in pieces:
                total += len(piece)
                if total > self._max_layer_size:
                    raise InvalidData(
                        f"{name}: expected at most {self._max_layer_size} bytes uncompressed,"
                        " got more"
                    )
                hasher.update(piece)
                with refusals(self._directory):
                    write_all(descriptor, piece)
                progress(len(piece))
        if hasher.hexdigest() != layer.diff_id.hexadecimal:
            raise ContentMismatch(
                f"{name}: expected diff ID {layer.diff_id} uncompressed, got"
                f" {layer.diff_id.algorithm}:{hasher.hexdigest()}"
            )

    @contextmanager
    def _partial(self) -> Iterator[tuple[int, Path]]:
        """A file being written: locked, so that nobody takes it for a leftover, removed at the end."""
        descriptor, partial = self._create()
        try:
            yield descriptor, partial
        finally:
            # Gone after its rename; what cannot be removed is the next process's leftover, and no
            # reason to hide the error that may be on its way.
            with suppress(OSError):
                partial.unlink()
            os.close(descriptor)

    def _create(self) -> tuple[int, Path]:
        while True:
            with refusals(self._directory):
                descriptor, name = tempfile.mkstemp(prefix=_PARTIAL, dir=self._directory)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Before it was locked, another process may have taken it for a leftover.
                if os.fstat(descriptor).st_nlink:
                    return descriptor, Path(name)
                os.close(descriptor)

    def _remove_leftovers(self) -> None:
        with refusals(self._directory):
            leftovers = list(self._directory.glob(f"{_PARTIAL}*"))
        for path in leftovers:
            # Two processes may meet here, and a lock that is held means that the file is in use.
            with suppress(StorageFailure, InvalidData, OSError):
                descriptor = open_regular(path, follow=False)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)


def _open_present(path: Path) -> int | None:
    try:
        return open_regular(path, follow=False)
    except StorageFailure as failure:
        if isinstance(failure.__cause__, FileNotFoundError):
            return None
        raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
