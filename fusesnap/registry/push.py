"""A whole image into a registry: what it lacks, then the manifest, which makes the image."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.errors import FusesnapError
from fusesnap.images.archive_writer import checked
from fusesnap.images.digest import Digest
from fusesnap.images.disk import no_progress
from fusesnap.images.layout import ImageLayer
from fusesnap.images.opening import OpenImage
from fusesnap.registry.client import RegistryClient

# What is in memory of a blob that is being sent, so that it can be sent again.
PART: Final = 16 * 1024 * 1024
_MAX_PART: Final = 256 * 1024 * 1024  # a registry may want larger ones, but not any
_AT_ONCE: Final = 3
_LAST_WORDS: Final = 5.0  # seconds to abandon an upload

Show = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was sent: blobs and bytes of them, and blobs that were there already."""

    digest: Digest
    sent: int
    sent_bytes: int
    present: int


@dataclass(frozen=True, slots=True)
class _Blob:
    label: str
    digest: Digest
    size: int
    pieces: Callable[[], Iterator[bytes]]


async def push(image: OpenImage, registry: RegistryClient, show: Show = lambda *_: None) -> Pushed:
    """Push ``image`` to the name that ``registry`` was made for.

    ``show`` is called with what is being sent, the bytes that were, and those of all that has to be. Raises what
    ``RegistryClient`` does, and what reading a layer does; then the name is as it was before.
    """
    await registry.begin()
    blobs = list(_blobs(image))
    missing = [blob for blob in blobs if not await registry.has_blob(blob.digest, blob.size)]
    total, done = sum(blob.size for blob in missing), 0
    failures: list[FusesnapError] = []
    turns = trio.CapacityLimiter(_AT_ONCE)

    async def send(blob: _Blob) -> None:
        def sent(count: int) -> None:
            nonlocal done
            done += count
            show(blob.label, done, total)

        async with turns:
            try:
                await _send(blob, registry, sent)
            except FusesnapError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for blob in missing:
            nursery.start_soon(send, blob)
    if failures:
        raise failures[0]
    await registry.put_manifest(image.image.manifest)
    return Pushed(image.image.manifest.digest, len(missing), total, len(blobs) - len(missing))


def _blobs(image: OpenImage) -> Iterator[_Blob]:
    found = image.image
    seen: set[Digest] = set()
    for layer in found.layers:
        if layer.digest not in seen:
            seen.add(layer.digest)
            yield _Blob(f"layer {layer.position}", layer.digest, layer.size, _reader(image, layer))
    config = found.config
    if config.digest not in seen:
        yield _Blob("config", config.digest, len(config.data), lambda: iter([config.data]))


def _reader(image: OpenImage, layer: ImageLayer) -> Callable[[], Iterator[bytes]]:
    return lambda: checked(image, layer, no_progress)


async def _send(blob: _Blob, registry: RegistryClient, sent: Callable[[int], None]) -> None:
    place, least = await registry.begin_upload()
    parts = _parts(blob.pieces(), min(max(PART, least), _MAX_PART))
    offset = 0
    try:
        part = await trio.to_thread.run_sync(next, parts, b"")
        while following := await trio.to_thread.run_sync(next, parts, b""):
            place = await registry.send_part(place, offset, part)
            offset += len(part)
            sent(len(part))
            part = following
        if offset and part:
            place = await registry.send_part(place, offset, part)
            await registry.end_upload(place, blob.digest, b"")
        else:
            await registry.end_upload(place, blob.digest, part)
        sent(len(part))
    except BaseException:
        last_words = trio.CancelScope(shield=True, deadline=trio.current_time() + _LAST_WORDS)
        # It forgets it by itself, later; why it failed is on its way.
        with last_words, suppress(FusesnapError):
            await registry.abandon_upload(place)
        raise
    finally:
        parts.close()


def _parts(pieces: Iterator[bytes], size: int) -> Generator[bytes, None, None]:
    """Give the pieces as parts of ``size`` bytes; the last one is shorter."""
    gathered: list[bytes] = []
    length = 0
    for piece in pieces:
        gathered.append(piece)
        length += len(piece)
        while length >= size:
            data = b"".join(gathered)
            yield data[:size]
            gathered, length = [data[size:]], length - size
    if length:
        yield b"".join(gathered)
