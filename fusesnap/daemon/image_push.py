"""``fusesnap image push``: an image into a registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusesnap.config import Settings
from fusesnap.daemon.build import Authorities, open_client, open_node, plain_errors
from fusesnap.daemon.image_sources import opened
from fusesnap.images.platform import Platform
from fusesnap.registry.client import RegistryClient
from fusesnap.registry.credentials import find_credentials
from fusesnap.registry.push import Pushed, Show, push
from fusesnap.registry.reference import RegistryReference
from fusesnap.substituter.retry import RetryPolicy

CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class PushOrder:
    """What is to be pushed, and where to. ``credentials`` are files to look for a password in, in this order."""

    image: str
    reference: RegistryReference
    platform: Platform
    credentials: Sequence[Path]
    plain_http: bool


async def push_image(settings: Settings, order: PushOrder, show: Show) -> Pushed:
    """Push an image. Raises what opening it raises, and ``RegistryClient`` does."""
    reference = order.reference
    with plain_errors():
        async with (
            open_node(settings) as node,
            opened(node, order.image, order.platform) as image,
            open_client(
                settings, Authorities.load(settings).transfers, http2=False, connections=CONNECTIONS
            ) as client,
        ):
            registry = RegistryClient(
                client,
                reference,
                await find_credentials(reference.host, order.credentials),
                RetryPolicy(),
                plain_http=order.plain_http or reference.is_local,
            )
            return await push(image, registry, show)
    raise AssertionError("unreachable: a block that raises nothing returned")
