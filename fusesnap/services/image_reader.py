"""Reads what an image in containerd says of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import grpc

from fusesnap.errors import InvalidData, NotFound
from fusesnap.images.digest import Digest
from fusesnap.images.documents import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_SIZE,
    Descriptor,
    parse_index,
    parse_manifest,
)
from fusesnap.images.layout import MAX_DEPTH
from fusesnap.images.platform import Platform
from fusesnap.services.api import content_pb2, content_pb2_grpc, images_pb2, images_pb2_grpc
from fusesnap.services.containerd_calls import KUBERNETES, QUICK, ContainerdCalls

# Kubernetes' images, and those of ctr and nerdctl.
NAMESPACES: Final = (KUBERNETES, "default")


class ImageReader:
    """Looks into one containerd, behind ``channel``, for images of ``platform``."""

    def __init__(self, channel: grpc.Channel, platform: Platform) -> None:
        self._channel = channel
        self._platform = platform

    async def layers(self, name: str) -> Sequence[Mapping[str, str]]:
        """Return the annotations of each layer of the image called ``name``, from the lowest.

        Raises ``NotFound`` where no namespace of containerd's has it, InvalidData for an image that is none for the
        platform, and the tree's error for what containerd says.
        """
        for namespace in NAMESPACES:
            containerd = ContainerdCalls(self._channel, namespace)
            images = images_pb2_grpc.ImagesStub(self._channel)
            try:
                found = await containerd.ask(images.Get, images_pb2.GetImageRequest(name=name))
            except NotFound:
                continue
            target = found.image.target
            entry = Descriptor(
                target.media_type, Digest.parse(target.digest), target.size, {}, None
            )
            return await self._layers(containerd, entry, name)
        raise NotFound(f"{name}: containerd has no such image in {' and '.join(NAMESPACES)}")

    async def _layers(
        self, containerd: ContainerdCalls, entry: Descriptor, name: str
    ) -> Sequence[Mapping[str, str]]:
        for _ in range(MAX_DEPTH + 1):
            data = await self._read(containerd, entry, name)
            where = f"{name}: {entry.digest}"
            if entry.media_type in MANIFEST_TYPES:
                layers = parse_manifest(data, where, entry.media_type).layers
                return [layer.annotations for layer in layers]
            if entry.media_type not in INDEX_TYPES:
                raise InvalidData(f"{where}: expected an image, got {entry.media_type}")
            entry = self._best(parse_index(data, where, entry.media_type).manifests, name)
        raise InvalidData(f"{name}: expected at most {MAX_DEPTH} indexes in one another")

    def _best(self, entries: Sequence[Descriptor], name: str) -> Descriptor:
        ranked = [
            (distance, number)
            for number, entry in enumerate(entries)
            if entry.platform is not None
            and (distance := self._platform.distance(entry.platform)) is not None
        ]
        if not ranked:
            raise InvalidData(f"{name}: expected an image for {self._platform}, there is none")
        return entries[min(ranked)[1]]

    async def _read(self, containerd: ContainerdCalls, entry: Descriptor, name: str) -> bytes:
        if entry.size > MAX_DOCUMENT_SIZE:
            raise InvalidData(
                f"{name}: {entry.digest}: expected at most {MAX_DOCUMENT_SIZE} bytes, got {entry.size}"
            )
        content = content_pb2_grpc.ContentStub(containerd.channel)
        request = content_pb2.ReadContentRequest(digest=str(entry.digest))
        stream = content.Read(request, metadata=containerd.metadata, timeout=QUICK)
        pieces = await containerd.in_thread(
            lambda: [answer.data for answer in stream], stream.cancel
        )
        return b"".join(pieces)
