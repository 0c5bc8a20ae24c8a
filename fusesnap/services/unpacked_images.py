"""Finds in containerd the image of a layer: what it announces of its layers, and what its containers start with.

A snapshot's name has the chain ID of its layers (OCI image specification, ``config.md``), by which a configuration is
known, and through it the manifest. containerd fetches both before the layers, and tells the configuration by the label
of what refers to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from fusesnap.errors import InvalidData
from fusesnap.images.documents import MAX_DOCUMENT_SIZE, parse_config, parse_manifest
from fusesnap.images.run_config import parse_run_config
from fusesnap.services.api import content_pb2, content_pb2_grpc
from fusesnap.services.containerd_calls import ContainerdCalls
from fusesnap.services.image_content import CONTENT_REF
from fusesnap.services.image_unpack import chain_ids, inherited_labels
from fusesnap.snapshots.announced import AnnouncedImage

CONFIG_REF: Final = f"{CONTENT_REF}.config"
# Images that are looked into: what is being unpacked has just been fetched, so it is among the newest.
NEWEST: Final = 8
# Seconds. Who asks wants to be ahead of a start.
WITHIN: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Found:
    """An image: the digests of its documents, and what is in the second."""

    manifest: str
    config: str
    data: bytes
    chain_ids: tuple[str, ...]


class UnpackedImages:
    """Looks into one containerd, behind ``channel``.

    Methods raise the tree's error for what containerd says, and ``InvalidData`` for documents that are none.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    async def programs(self, snapshot: str) -> Sequence[Sequence[str]]:
        """Where the programs may be that a container above ``snapshot`` runs, see ``RunConfig.programs``.

        Empty where no image is known that has these layers.
        """
        namespace, _, rest = snapshot.partition("/")
        found = await self._image(namespace, rest.partition("/")[2])
        return () if found is None else parse_run_config(found.data, found.config).programs

    async def announced(self, namespace: str, chain_id: str) -> AnnouncedImage | None:
        """What the image of the layer with this chain ID announces, in one of containerd's namespaces."""
        found = await self._image(namespace, chain_id)
        if found is None:
            return None
        containerd = ContainerdCalls(self._channel, namespace)
        data = await self._document(containerd, found.manifest)
        layers = parse_manifest(data, found.manifest, None).layers
        return AnnouncedImage(
            found.chain_ids, tuple(inherited_labels(layer.annotations) for layer in layers)
        )

    async def _image(self, namespace: str, chain_id: str) -> _Found | None:
        """The newest image with a layer of this chain ID."""
        containerd = ContainerdCalls(self._channel, namespace)
        for manifest, config in await self._newest(containerd):
            data = await self._document(containerd, config)
            chain = chain_ids(parse_config(data, config).diff_ids)
            if chain_id in chain:
                return _Found(manifest, config, data, tuple(chain))
        return None

    async def _newest(self, containerd: ContainerdCalls) -> Sequence[tuple[str, str]]:
        """Digests of manifests and their configurations, the newest first."""
        content = content_pb2_grpc.ContentStub(self._channel)
        request = content_pb2.ListContentRequest(filters=[f'labels."{CONFIG_REF}"'])
        stream = content.List(request, metadata=containerd.metadata, timeout=WITHIN)
        manifests = await containerd.in_thread(
            lambda: [info for answer in stream for info in answer.info], stream.cancel
        )
        manifests.sort(key=lambda info: info.created_at.ToNanoseconds(), reverse=True)
        newest = {info.labels[CONFIG_REF]: info.digest for info in reversed(manifests)}
        return [(manifest, config) for config, manifest in reversed(newest.items())][:NEWEST]

    async def _document(self, containerd: ContainerdCalls, digest: str) -> bytes:
        content = content_pb2_grpc.ContentStub(self._channel)
        stream = content.Read(
            content_pb2.ReadContentRequest(digest=digest),
            metadata=containerd.metadata,
            timeout=WITHIN,
        )

        def read() -> bytes:
            data = bytearray()
            for answer in stream:
                data += answer.data
                if len(data) > MAX_DOCUMENT_SIZE:
                    raise InvalidData(f"{digest}: expected at most {MAX_DOCUMENT_SIZE} bytes")
            return bytes(data)

        return await containerd.in_thread(read, stream.cancel)
