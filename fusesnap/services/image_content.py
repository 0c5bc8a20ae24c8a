"""Puts the content of an image into containerd's content store, with the labels by which its collector goes.

A manifest refers to its configuration and its layers, as ``ChildGCLabels`` in containerd's ``core/images`` has it. What
refers comes after what it refers to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from fusesnap.images.layout import ImageLayer
from fusesnap.images.opening import OpenImage
from fusesnap.services.api import content_pb2, content_pb2_grpc
from fusesnap.services.api.descriptor_pb2 import Descriptor
from fusesnap.services.containerd_calls import LONG, ContainerdCalls
from fusesnap.services.content import Upload, in_blocks

CONTENT_REF: Final = "containerd.io/gc.ref.content"


class ImageContent:
    """Writes over ``containerd``, whose lease ``lease`` keeps what is written, and tells uploads of others apart."""

    def __init__(self, containerd: ContainerdCalls, lease: str) -> None:
        self._containerd = containerd
        self._content = content_pb2_grpc.ContentStub(containerd.channel)
        self._lease = lease

    async def add(self, image: OpenImage) -> Descriptor:
        """Write configuration, layers and manifest, where they are not there yet; returns the manifest's descriptor.

        Raises what reading them raises, and the tree's error for what containerd says.
        """
        found = image.image
        config, manifest = found.config, found.manifest
        references = {f"{CONTENT_REF}.config": str(config.digest)}
        await self._write(_descriptor(config.media_type, config.digest, config.data), [config.data])
        for layer in found.layers:
            await self._write(layer_descriptor(layer), image.blob(layer))
            references[f"{CONTENT_REF}.l.{layer.position}"] = str(layer.digest)
        target = _descriptor(manifest.media_type, manifest.digest, manifest.data)
        await self._write(target, [manifest.data], references)
        return target

    async def label(self, digest: str, labels: Mapping[str, str]) -> None:
        """Set labels of content that is there; others stay."""
        request = content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=digest, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
        )
        await self._containerd.ask(self._content.Update, request)

    async def _write(
        self,
        blob: Descriptor,
        pieces: Iterable[bytes],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        upload = Upload(
            self._content,
            f"{self._lease}-{blob.digest}",
            self._containerd.metadata,
            expected=blob.digest,
            size=blob.size,
            timeout=LONG,
        )
        was_there = not await self._containerd.in_thread(
            lambda: _uploaded(upload, pieces, labels or {}), upload.cancel
        )
        if was_there and labels:
            await self.label(blob.digest, labels)


def layer_descriptor(layer: ImageLayer) -> Descriptor:
    """The descriptor of a layer, as its manifest has it."""
    return Descriptor(
        media_type=layer.media_type,
        digest=str(layer.digest),
        size=layer.size,
        annotations=layer.annotations,
    )


def _descriptor(media_type: str, digest: object, data: bytes) -> Descriptor:
    return Descriptor(media_type=media_type, digest=str(digest), size=len(data))


def _uploaded(upload: Upload, pieces: Iterable[bytes], labels: Mapping[str, str]) -> bool:
    """Upload content, unless it is there; says whether it was not."""
    with upload:
        try:
            if not upload.begin():
                for block in in_blocks(pieces):
                    upload.write(block)
            return upload.commit(labels)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            return False
