"""The names of images in containerd, as its CRI gives them, and how that comes to know them.

An image has three: its id, its reference with the tag, and its reference with the manifest's digest. The label says
that CRI's rules hold for it. CRI keeps what it knows of images in memory, and hears of names from containerd's events,
one after another, in the order in which they are made (``internal/cri/server/events`` and ``images`` there). So when it
knows the last one, it knows all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio
from google.protobuf.field_mask_pb2 import FieldMask

from fusesnap.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FusesnapError,
    NotFound,
    NotOurs,
    Unsupported,
)
from fusesnap.services.api import cri_images_pb2, cri_images_pb2_grpc, images_pb2, images_pb2_grpc
from fusesnap.services.api.descriptor_pb2 import Descriptor
from fusesnap.services.containerd_calls import TIDYING, ContainerdCalls

log = logging.getLogger(__name__)

_MANAGED: Final = {"io.cri-containerd.image": "managed"}
# Seconds that CRI has to hear of an image.
HEARD_WITHIN: Final = 60.0
_FIRST_LOOK, _LONGEST_WAIT = 0.01, 1.0  # seconds


@dataclass(frozen=True, slots=True)
class KnownImage:
    """What CRI says of an image. ``names`` are its references; ``chain_id`` is what its snapshot is called."""

    id: str
    names: frozenset[str]
    chain_id: str


class ImageNames:
    """containerd's names of images, and what its CRI makes of them."""

    def __init__(self, containerd: ContainerdCalls) -> None:
        self._containerd = containerd
        self._images = images_pb2_grpc.ImagesStub(containerd.channel)
        self._cri = cri_images_pb2_grpc.ImageServiceStub(containerd.channel)

    async def known(self, name: str) -> KnownImage | None:
        """What CRI knows under a name. Raises ``Unsupported`` where containerd has no CRI, and what it says."""
        request = cri_images_pb2.ImageStatusRequest(
            image=cri_images_pb2.ImageSpec(image=name), verbose=True
        )
        try:
            answer = await self._containerd.ask(self._cri.ImageStatus, request)
        except NotOurs as error:
            raise Unsupported(f"containerd serves no CRI images (runtime.v1): {error}") from error
        if not answer.HasField("image"):
            return None
        names = frozenset((*answer.image.repo_tags, *answer.image.repo_digests))
        return KnownImage(answer.image.id, names, _chain_id(answer.info))

    @asynccontextmanager
    async def given(self, names: Sequence[str], target: Descriptor) -> AsyncIterator[None]:
        """Give an image its names. If the block fails, or is cancelled, they are as before when this raises."""
        undo: list[Callable[[], Awaitable[object]]] = []
        try:
            for name in names:
                await self._give(name, target, undo)
            yield
        except BaseException:
            with trio.move_on_after(TIDYING, shield=True):
                for each in reversed(undo):
                    try:
                        await each()
                    except FusesnapError as error:  # what ended the block is told, not this
                        log.warning("%s: the names of an image are left: %s", names[-1], error)
            raise

    async def heard(self, name: str, id_: str) -> None:
        """Wait until CRI knows the image ``id_`` by ``name``. Raises ``DeadlineExceeded``, and as :meth:`known`."""
        with trio.move_on_after(HEARD_WITHIN):
            wait = _FIRST_LOOK
            while True:
                known = await self.known(name)
                if known is not None and known.id == id_ and name in known.names:
                    return
                await trio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise DeadlineExceeded(
            f"containerd's CRI does not know {name} after {HEARD_WITHIN:.0f} seconds; its log may say why"
        )

    async def _give(
        self, name: str, target: Descriptor, undo: list[Callable[[], Awaitable[object]]]
    ) -> None:
        image = images_pb2.Image(name=name, target=target, labels=_MANAGED)
        old = await self._find(name)
        if old is None:
            undo.append(lambda: self._remove(name))
            await self._create(image)
        elif old.target != target or not _MANAGED.items() <= dict(old.labels).items():
            undo.append(lambda: self._update(old))
            await self._update(image)

    async def _create(self, image: images_pb2.Image) -> None:
        try:
            # A call that is cancelled may be carried out all the same, and after the one that undoes it.
            with trio.CancelScope(shield=True):
                request = images_pb2.CreateImageRequest(image=image)
                await self._containerd.ask(self._images.Create, request)
        except AlreadyExists:  # somebody was quicker
            await self._update(image)

    async def _find(self, name: str) -> images_pb2.Image | None:
        request = images_pb2.GetImageRequest(name=name)
        try:
            return (await self._containerd.ask(self._images.Get, request)).image
        except NotFound:
            return None

    async def _update(self, image: images_pb2.Image) -> None:
        mask = FieldMask(paths=["target", *(f"labels.{key}" for key in _MANAGED)])
        request = images_pb2.UpdateImageRequest(image=image, update_mask=mask)
        with trio.CancelScope(shield=True):  # as when it is created
            await self._containerd.ask(self._images.Update, request)

    async def _remove(self, name: str) -> None:
        try:
            request = images_pb2.DeleteImageRequest(name=name)
            await self._containerd.ask(self._images.Delete, request)
        except NotFound:
            return


def _chain_id(info: Mapping[str, str]) -> str:
    """What the verbose part of a status calls the image's snapshot; empty if it does not."""
    try:
        said = json.loads(info.get("info", "{}"))
    except ValueError:
        return ""
    chain_id = said.get("chainID") if isinstance(said, dict) else None
    return chain_id if isinstance(chain_id, str) else ""
