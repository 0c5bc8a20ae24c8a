"""Finds in containerd what a container of an image starts with, which its configuration says.

A snapshot's name has the chain ID of its layers (OCI image specification, ``config.md``), by which a configuration is
known. containerd fetches it before the layers, and tells it by the label of what refers to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc

from fusesnap.errors import InvalidData
from fusesnap.images.documents import MAX_DOCUMENT_SIZE, parse_config
from fusesnap.images.run_config import RunConfig, parse_run_config
from fusesnap.services.api import content_pb2, content_pb2_grpc
from fusesnap.services.containerd_calls import ContainerdCalls
from fusesnap.services.image_content import CONTENT_REF
from fusesnap.services.image_unpack import chain_ids

CONFIG_REF: Final = f"{CONTENT_REF}.config"
# Configurations that are looked into: what is being unpacked has just been fetched, so it is among the newest.
NEWEST: Final = 8
# Seconds. Who asks wants to be ahead of a start.
WITHIN: Final = 5.0


class EntryPrograms:
    """Looks into one containerd, behind ``channel``."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    async def of(self, snapshot: str) -> Sequence[Sequence[str]]:
        """Where the programs may be that a container above ``snapshot`` runs, see ``RunConfig.programs``.

        Empty where no image is known that has these layers. Raises the tree's error for what containerd says, and
        ``InvalidData`` for what is no configuration.
        """
        namespace, _, rest = snapshot.partition("/")
        chain_id = rest.partition("/")[2]
        containerd = ContainerdCalls(self._channel, namespace)
        for digest in await self._newest(containerd):
            config = await self._config(containerd, digest, chain_id)
            if config is not None:
                return config.programs
        return ()

    async def _newest(self, containerd: ContainerdCalls) -> Sequence[str]:
        """Digests of configurations, those of the newest manifests first."""
        content = content_pb2_grpc.ContentStub(self._channel)
        request = content_pb2.ListContentRequest(filters=[f'labels."{CONFIG_REF}"'])
        stream = content.List(request, metadata=containerd.metadata, timeout=WITHIN)
        manifests = await containerd.in_thread(
            lambda: [info for answer in stream for info in answer.info], stream.cancel
        )
        manifests.sort(key=lambda info: info.created_at.ToNanoseconds(), reverse=True)
        digests = dict.fromkeys(info.labels[CONFIG_REF] for info in manifests)
        return list(digests)[:NEWEST]

    async def _config(
        self, containerd: ContainerdCalls, digest: str, chain_id: str
    ) -> RunConfig | None:
        """The configuration with this digest, if ``chain_id`` is of its layers."""
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

        data = await containerd.in_thread(read, stream.cancel)
        if chain_id not in chain_ids(parse_config(data, digest).diff_ids):
            return None
        return parse_run_config(data, digest)
