"""``fusesnap image inspect``: what an image is, what it stands for, and where that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.image_sources import opened
from fusesnap.daemon.path_source import LocalPathSource
from fusesnap.daemon.watching import Watch, draw
from fusesnap.errors import FusesnapError
from fusesnap.images.blobs import spooled
from fusesnap.images.layer import LayerTar
from fusesnap.images.layout import ImageLayer
from fusesnap.images.nix_layer import Held, recognise
from fusesnap.images.opening import OpenImage
from fusesnap.images.platform import Platform
from fusesnap.images.uncompressed import uncompressed
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.nix_layer import NixLayers

# A layer of nothing but placeholders, of the largest closure that is taken, has less when it is compressed.
MAX_LOOKED_INTO: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path is: ``cache`` offers it, ``nar_size`` and ``file_size`` in bytes; or why it is nowhere."""

    present: bool
    nar_size: int | None = None
    file_size: int | None = None
    cache: str | None = None
    error: str | None = None


async def inspect_image(
    settings: Settings, name: str, platform: Platform, watch: Watch
) -> dict[str, Any]:
    """Return what there is to say of an image, as it is printed for scripts. Raises what opening it raises."""
    with plain_errors():
        async with open_node(settings) as node, trio.open_nursery() as drawing:
            drawing.start_soon(draw, node, watch)
            async with opened(node, name, platform) as image:
                report = await _report(node, image)
            drawing.cancel_scope.cancel()
            return report
    raise AssertionError("unreachable: a block that raises nothing returned")


async def _report(node: Node, image: OpenImage) -> dict[str, Any]:
    layers = [(layer, await _paths_of(node, image, layer)) for layer in image.image.layers]
    closure = sorted({path for _, paths in layers for path in paths})
    places = await _places(node, closure)
    missing = [place for place in places.values() if not place.present]
    return {
        "manifest": str(image.image.manifest.digest),
        "id": str(image.image.config.digest),
        "platform": str(image.image.platform),
        "config": json.loads(image.image.config.data).get("config") or {},
        "layers": [
            {
                "digest": str(layer.digest),
                "media_type": layer.media_type,
                "size": layer.size,
                "store_paths": len(paths),
            }
            for layer, paths in layers
        ],
        "paths": [
            {
                "path": node.store_dir.format(path),
                "present": places[path].present,
                "nar_size": places[path].nar_size,
                "file_size": places[path].file_size,
                "cache": places[path].cache,
                "error": places[path].error,
            }
            for path in closure
        ],
        "nar_size": sum(place.nar_size or 0 for place in places.values()),
        "missing_nar_size": sum(place.nar_size or 0 for place in missing),
        "missing_file_size": sum(place.file_size or 0 for place in missing),
        "unavailable": sum(place.error is not None for place in missing),
    }


async def _paths_of(node: Node, image: OpenImage, layer: ImageLayer) -> Sequence[StorePath]:
    # What nobody has is said of each path, so none is admitted here; a list's own path is fetched.
    nix_layers = NixLayers(
        node.store,
        LocalPathSource(node.realiser),
        node.store_dir,
        by_content=node.settings.recognise_by_content,
    )
    named = await nix_layers.named(layer.annotations)
    if named or not node.settings.recognise_by_content or layer.size > MAX_LOOKED_INTO:
        return named
    return await trio.to_thread.run_sync(_recognised, node, image, layer)


def _recognised(node: Node, image: OpenImage, layer: ImageLayer) -> Sequence[StorePath]:
    name = str(layer)
    pieces = uncompressed(image.blob(layer), name)
    with LayerTar(spooled(pieces, name, node.settings.root), layer.diff_id, name) as tar:
        held = [
            Held(entry.path, None if entry.hard_link else entry.kind, entry.size)
            for entry in tar.entries()
        ]
    found = recognise(held, node.store_dir) or ()
    return [placeholder.path for placeholder in found]


async def _places(node: Node, paths: Sequence[StorePath]) -> dict[StorePath, _Place]:
    present = await trio.to_thread.run_sync(node.store.committed_among, paths)
    places: dict[StorePath, _Place] = {}

    async def find(path: StorePath) -> None:
        try:
            offer = await node.pool.find(path)
        except FusesnapError as error:
            places[path] = _Place(False, error=str(error))
            return
        info = offer.narinfo
        places[path] = _Place(False, info.nar_size, info.file_size, offer.substituter.url)

    async with trio.open_nursery() as nursery:
        for path in paths:
            if path in present:
                pin = node.store.pinned(path)
                places[path] = _Place(True, pin.info.nar_size if pin is not None else None)
            else:
                nursery.start_soon(find, path)
    return places
