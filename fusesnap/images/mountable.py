"""From an image to its tree: all layers cached, opened and merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from fusesnap.images.layer_cache import LayerCache
from fusesnap.images.layout import Image, ImageLayout
from fusesnap.images.merge import MergeLayer, merge_layers
from fusesnap.images.rootfs import RootFs
from fusesnap.nix.store_path import StoreDir, StorePath


def open_rootfs(
    layout: ImageLayout,
    image: Image,
    cache: LayerCache,
    store_dir: StoreDir,
    store_paths: Mapping[int, tuple[StorePath, ...]],
    *,
    recognise_content: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> RootFs:
    """Merge the layers of ``image``; the result is to be closed, and outlives ``layout``.

    ``store_paths`` has, by position, what the labels of Nix layers state
    (:func:`fusesnap.images.nix_layer.layer_labels`). ``progress`` is told of bytes unpacked into
    the cache, and may raise to stop. Raises InvalidData, ContentMismatch, StorageFailure.
    """
    with ExitStack() as opened:
        layers = [
            MergeLayer(
                opened.enter_context(cache.layer(layout, layer, progress)),
                store_paths.get(layer.position),
            )
            for layer in image.layers
        ]
        rootfs = merge_layers(layers, store_dir, recognise_content=recognise_content)
        opened.pop_all()  # the tree's from here on
    return rootfs
