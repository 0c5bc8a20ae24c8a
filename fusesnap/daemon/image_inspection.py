"""``fusesnap image inspect``: what an image is, what it stands for, and where that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.image_paths import paths_of_layer
from fusesnap.daemon.image_sources import opened
from fusesnap.daemon.watching import Watch, draw
from fusesnap.errors import FusesnapError
from fusesnap.images.opening import OpenImage
from fusesnap.images.platform import Platform
from fusesnap.nix.store_path import StorePath


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
    layers = [(layer, await paths_of_layer(node, image, layer)) for layer in image.image.layers]
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
