"""``fusesnap image load``: an image into containerd, unpacked for our snapshotter."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import partial

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import open_node, plain_errors
from fusesnap.daemon.containerd_block import NAME
from fusesnap.daemon.image_sources import opened
from fusesnap.daemon.watching import Watch, draw
from fusesnap.images.opening import OpenImage
from fusesnap.images.platform import Platform
from fusesnap.services.containerd_calls import KUBERNETES, ContainerdCalls
from fusesnap.services.containerd_client import find_snapshotter, open_channel
from fusesnap.services.image_content import ImageContent
from fusesnap.services.image_names import ImageNames
from fusesnap.services.image_unpack import Unpacker
from fusesnap.services.lease import leased


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What is to be loaded, what it is to be called in ``namespace``, and for which platform."""

    image: str
    name: str
    namespace: str
    platform: Platform


async def load_image(settings: Settings, order: LoadOrder, watch: Watch) -> str:
    """Load an image, and return its manifest's digest. Nothing of it is left where that fails.

    Raises what opening it raises, and the tree's error for what containerd says.
    """
    with plain_errors(), open_channel(settings.containerd_address) as channel:
        async with open_node(settings) as node, trio.open_nursery() as drawing:
            drawing.start_soon(draw, node, watch)
            async with opened(node, order.image, order.platform) as image:
                await _load(settings, ContainerdCalls(channel, order.namespace), order, image)
                digest = str(image.image.manifest.digest)
            drawing.cancel_scope.cancel()
            return digest
    raise AssertionError("unreachable: a block that raises nothing returned")


async def _load(
    settings: Settings, containerd: ContainerdCalls, order: LoadOrder, image: OpenImage
) -> None:
    where = settings.containerd_address, settings.socket.absolute(), NAME
    snapshotter = await trio.to_thread.run_sync(
        partial(find_snapshotter, *where), abandon_on_cancel=True
    )
    lease = f"fusesnap-load-{hashlib.sha256(order.name.encode()).hexdigest()[:32]}"
    async with leased(containerd, lease, time.time()) as leasing:
        content = ImageContent(leasing, lease)
        target = await content.add(image)
        await Unpacker(leasing, content, snapshotter, order.name).unpack(image.image)
        names = ImageNames(leasing)
        id_ = str(image.image.config.digest)
        given = [id_, order.name] if order.namespace == KUBERNETES else [order.name]
        async with names.given(given, target):
            if order.namespace == KUBERNETES:
                await names.heard(order.name, id_)
