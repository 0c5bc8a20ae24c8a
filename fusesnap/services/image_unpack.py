"""Has containerd unpack the layers of an image into snapshots, as its own unpacker does (``core/unpack/unpacker.go``).

Each layer is a snapshot on the one below it: prepared, applied by containerd's differ, committed under its chain ID.
Annotations that are meant for snapshotters go with it as labels; so a Nix layer is one for our snapshotter.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import Final

import trio

from fusesnap.errors import AlreadyExists, ContentMismatch, FusesnapError, NotFound, Unavailable
from fusesnap.images.digest import Digest
from fusesnap.images.layout import Image, ImageLayer
from fusesnap.nix.closure_labels import LABEL_PREFIX
from fusesnap.services.api import diff_pb2, diff_pb2_grpc, snapshots_pb2, snapshots_pb2_grpc
from fusesnap.services.containerd_calls import LONG, TIDYING, ContainerdCalls
from fusesnap.services.content import UNCOMPRESSED_LABEL
from fusesnap.services.image_content import ImageContent, layer_descriptor
from fusesnap.snapshots.announced import CHAIN_LABEL

log = logging.getLogger(__name__)

_GC_REF: Final = "containerd.io/gc.ref.snapshot"
# Of a snapshot that another unpacker makes at the same time it may be said that it is there, and then that it is not.
_ATTEMPTS: Final = 3


class Unpacker:
    """Unpacks for ``snapshotter``, which is what containerd calls us. ``name`` is what messages call the image."""

    def __init__(
        self, containerd: ContainerdCalls, content: ImageContent, snapshotter: str, name: str
    ) -> None:
        self._name = name
        self._containerd = containerd
        self._content = content
        self._snapshotter = snapshotter
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(containerd.channel)
        self._diff = diff_pb2_grpc.DiffStub(containerd.channel)

    async def unpack(self, image: Image) -> None:
        """Unpack what is not unpacked yet, and have the configuration refer to it.

        Raises ``ContentMismatch`` for a layer that is not what the configuration says, and the tree's error for what
        containerd says; what our snapshotter says of a layer is told by containerd in turn.
        """
        chain = chain_ids(layer.diff_id for layer in image.layers)
        for layer, parent, chain_id in zip(image.layers, ["", *chain], chain, strict=False):
            await self._layer(layer, parent, chain_id)
        if chain:
            label = f"{_GC_REF}.{self._snapshotter}"
            await self._content.label(str(image.config_digest), {label: chain[-1]})

    async def is_unpacked(self, chain_id: str) -> bool:
        """Whether the snapshot of that name is there."""
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=self._snapshotter, key=chain_id)
        try:
            await self._containerd.ask(self._snapshots.Stat, request)
        except NotFound:
            return False
        return True

    async def _layer(self, layer: ImageLayer, parent: str, name: str) -> None:
        labels = inherited_labels(layer.annotations)
        for _ in range(_ATTEMPTS):
            key = f"extract-{secrets.token_hex(8)} {name}"
            prepare = snapshots_pb2.PrepareSnapshotRequest(
                snapshotter=self._snapshotter,
                key=key,
                parent=parent,
                labels={**labels, CHAIN_LABEL: name},
            )
            try:
                mounts = await self._containerd.ask(self._snapshots.Prepare, prepare, within=LONG)
            except AlreadyExists:
                if await self.is_unpacked(name):
                    return
                continue
            await self._fill(layer, key, name, prepare, mounts)
            return
        raise Unavailable(
            f"{self._name}: {layer}: somebody else unpacks and removes it at the same time"
        )

    async def _fill(
        self,
        layer: ImageLayer,
        key: str,
        name: str,
        prepared: snapshots_pb2.PrepareSnapshotRequest,
        mounts: snapshots_pb2.PrepareSnapshotResponse,
    ) -> None:
        """Apply the layer on the mounts of the snapshot ``key``, and commit it as ``name``."""
        try:
            request = diff_pb2.ApplyRequest(diff=layer_descriptor(layer), mounts=mounts.mounts)
            applied = await self._containerd.ask(self._diff.Apply, request, within=LONG)
            self._check(layer, applied.applied.digest)
            commit = snapshots_pb2.CommitSnapshotRequest(
                snapshotter=self._snapshotter, name=name, key=key, labels=prepared.labels
            )
            await self._containerd.ask(self._snapshots.Commit, commit, within=LONG)
        except AlreadyExists:
            await self._discard(key)
        except BaseException:
            await self._discard(key)
            raise
        await self._content.label(str(layer.digest), {UNCOMPRESSED_LABEL: str(layer.diff_id)})

    def _check(self, layer: ImageLayer, diff_id: str) -> None:
        if diff_id != str(layer.diff_id):
            raise ContentMismatch(
                f"{self._name}: {layer}: expected it to unpack to {layer.diff_id}, as its configuration says,"
                f" got {diff_id}"
            )

    async def _discard(self, key: str) -> None:
        """Remove a snapshot that came to nothing. The lease would end it too, later."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self._snapshotter, key=key)
        with trio.move_on_after(TIDYING, shield=True):
            try:
                await self._containerd.ask(self._snapshots.Remove, request)
            except NotFound:
                return
            except FusesnapError as error:  # what ended the unpacking is told, not this
                log.warning("%s: left until its lease ends: %s", key, error)


def inherited_labels(annotations: Mapping[str, str]) -> dict[str, str]:
    """What of a layer's annotations its snapshot gets (FilterInheritedLabels of containerd's ``core/snapshots``)."""
    return {key: value for key, value in annotations.items() if key.startswith(LABEL_PREFIX)}


def chain_ids(diff_ids: Iterable[Digest]) -> list[str]:
    """The names of layers' snapshots, from the lowest (OCI image specification, ``config.md``, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        joined = f"{chain[-1]} {diff_id}".encode() if chain else b""
        chain.append(f"sha256:{hashlib.sha256(joined).hexdigest()}" if chain else str(diff_id))
    return chain
