"""Pulls images that store paths are, or that are made of them, into containerd.

What containerd then has is what a pull from a registry would have left: content, snapshots, names. So it needs us no
more to create containers of the image, to list it, or to remove it; and when it removes the snapshot of a Nix layer, we
let go of the layer's closure.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from fusesnap.errors import InvalidData
from fusesnap.images.digest import Digest
from fusesnap.images.opening import OpenImage
from fusesnap.images.reference import DOMAIN, NixReference, parse_reference, reference_of
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.services.containerd_calls import ContainerdCalls
from fusesnap.services.image_content import ImageContent
from fusesnap.services.image_names import ImageNames
from fusesnap.services.image_unpack import Unpacker
from fusesnap.services.lease import leased
from fusesnap.services.shared_work import SharedWork

log = logging.getLogger(__name__)

# A path as Docker's grammar has it (``reference.go`` of github.com/distribution/reference): domain and path together
# have at most 255 characters.
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME: Final = re.compile(rf"{re.escape(DOMAIN)}(?:/{_COMPONENT})+", re.ASCII)
_MAX_NAME: Final = 255


class StoreImages(Protocol):
    """Images of a store: found, fetched and verified."""

    async def resolve(self, reference: NixReference) -> StorePath:
        """The path that is meant. Raises why there is none."""
        ...

    def open(
        self, path: StorePath, digest: Digest | None = None
    ) -> AbstractAsyncContextManager[OpenImage]:
        """The image that it is, or that is made of it. Raises why there is none."""
        ...


class PulledImages:
    """Pulls over ``containerd``. ``snapshotter`` finds out what containerd calls us; ``clock`` is in seconds.

    Pulls are tasks of ``nursery``; of the same image there is one at a time, which ends when nobody waits for it.
    """

    def __init__(
        self,
        images: StoreImages,
        store_dir: StoreDir,
        containerd: ContainerdCalls,
        snapshotter: Callable[[], Awaitable[str]],
        clock: Callable[[], float],
        nursery: trio.Nursery,
    ) -> None:
        self._images = images
        self._store_dir = store_dir
        self._containerd = containerd
        self._snapshotter = snapshotter
        self._clock = clock
        self._names = ImageNames(containerd)
        self._pulls = SharedWork[str](nursery)

    def name(self, reference: str) -> str | None:
        """See ``NixImages``."""
        parsed = parse_reference(reference, self._store_dir)
        return full_name(parsed) if parsed is not None else None

    async def pull(self, reference: str) -> str:
        """See ``NixImages``."""
        parsed = parse_reference(reference, self._store_dir)
        if parsed is None:
            raise InvalidData(f"{reference}: expected {DOMAIN}{self._store_dir}/<hash>-<name>")
        name = full_name(parsed)
        return await self._pulls.result(name, lambda: self._pull(parsed, name))

    async def _pull(self, reference: NixReference, name: str) -> str:
        snapshotter = await self._snapshotter()
        known = await self._known(name, snapshotter)
        if known is not None:
            return known
        path = await self._images.resolve(reference)
        async with self._images.open(path, reference.digest) as image:
            return await self._add(reference, name, image, snapshotter)

    async def _known(self, name: str, snapshotter: str) -> str | None:
        """The id of an image that is there: what a store path holds never changes, so no cache need be asked again."""
        known = await self._names.known(name)
        if known is None or not known.chain_id:
            return None
        content = ImageContent(self._containerd, "")
        unpacker = Unpacker(self._containerd, content, snapshotter, name)
        return known.id if await unpacker.is_unpacked(known.chain_id) else None

    async def _add(
        self, reference: NixReference, name: str, image: OpenImage, snapshotter: str
    ) -> str:
        lease = f"fusesnap-pull-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        id_ = str(image.image.config_digest)
        by_digest = f"{bare_name(reference)}@{image.image.manifest_digest}"
        async with leased(self._containerd, lease, self._clock()) as containerd:
            content = ImageContent(containerd, lease)
            target = await content.add(image)
            await Unpacker(containerd, content, snapshotter, name).unpack(image.image)
            names = list(dict.fromkeys((id_, name, by_digest)))
            async with self._names.given(names, target):
                await self._names.heard(by_digest, id_)
        log.info("pulled %s: image %s", name, id_)
        return id_


def bare_name(reference: NixReference) -> str:
    """The name of a reference, without tag and digest, as Docker's grammar can spell it."""
    if len(reference.name) <= _MAX_NAME and _NAME.fullmatch(reference.name):
        return reference.name
    if reference.spelling is None:
        return reference.name
    path = StorePath.parse_base_name(f"{reference.hash_part}-{reference.spelling}")
    return reference_of(path, reference.store_dir)


def full_name(reference: NixReference) -> str:
    """What containerd makes of a reference: ``ParseDockerRef`` of its ``pkg/reference/docker``.

    A digest takes the place of a tag; without either the tag is ``latest``.
    """
    name = bare_name(reference)
    if reference.digest is not None:
        return f"{name}@{reference.digest}"
    return f"{name}:{reference.tag or 'latest'}"
