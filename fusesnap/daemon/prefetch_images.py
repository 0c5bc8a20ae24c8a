"""Which store paths the images stand for that ``fusesnap prefetch`` is given."""

from __future__ import annotations

import os
from collections.abc import Sequence

import trio

from fusesnap.daemon.build import Node
from fusesnap.daemon.image_paths import paths_of_image, paths_of_labels
from fusesnap.daemon.image_sources import local_image, opened
from fusesnap.errors import InvalidArgument
from fusesnap.images.platform import Platform
from fusesnap.images.store_images import StoreImages
from fusesnap.nix.store_path import StorePath
from fusesnap.registry.reference import parse_registry_reference
from fusesnap.services.containerd_client import open_channel
from fusesnap.services.image_reader import ImageReader


async def paths_of_layers(node: Node, name: str) -> Sequence[StorePath]:
    """What the layers of an image on disk, or of one that containerd has, stand for.

    Raises InvalidArgument and InvalidData for what is neither.
    """
    platform = Platform.of_machine(os.uname().machine)
    if await trio.Path(local_image(name)[0]).exists():
        async with opened(node, name, platform) as image:
            return await paths_of_image(node, image)
    return await _paths_in_containerd(node, name, platform)


async def paths_of_archive(node: Node, path: StorePath) -> Sequence[StorePath]:
    """What the layers of the image stand for that a store path is."""
    platform = Platform.of_machine(os.uname().machine)
    images = StoreImages(node.store, node.realiser, platform, node.settings.root)
    async with images.open(path) as image:
        return await paths_of_image(node, image)


async def _paths_in_containerd(node: Node, name: str, platform: Platform) -> Sequence[StorePath]:
    try:
        full = str(parse_registry_reference(name))
    except InvalidArgument:
        raise InvalidArgument(
            f"{name!r}: expected a store path, an image's file, or its name"
        ) from None
    with open_channel(node.settings.containerd_address) as channel:
        layers = await ImageReader(channel, platform).layers(full)
    paths = [path for labels in layers for path in await paths_of_labels(node, labels)]
    if not paths:
        raise InvalidArgument(f"{full}: no layer of it names store paths")
    return paths
