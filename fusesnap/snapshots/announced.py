"""Learns which store paths an image shows from the moment that its lowest layer is about to be unpacked.

A client fetches an image's manifest before anything else of it, and with it the labels of all layers. A layer's own
arrive with its snapshot, after everything below it was fetched and unpacked: with far registries that is half a second
in which caches could have been asked already.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

from fusesnap.errors import FusesnapError
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.nix_layer import NixLayers
from fusesnap.snapshots.start_hints import StartHints

log = logging.getLogger(__name__)

# What a client calls the snapshot that an extraction will become (``labelSnapshotRef`` in containerd's
# ``core/unpack/unpacker.go``): the chain ID of its layers.
CHAIN_LABEL: Final = "containerd.io/snapshot.ref"
# Layers that are about to come; of more the oldest are forgotten.
_EXPECTED: Final = 4096


@dataclass(frozen=True, slots=True)
class AnnouncedImage:
    """An image that a client knows: the chain IDs of its layers, from the lowest, and the labels of each layer."""

    chain_ids: tuple[str, ...]
    labels: tuple[Mapping[str, str], ...]


# Finds the image that is being unpacked in one of the client's namespaces, of whose layers this is a chain ID.
FindImage: TypeAlias = Callable[[str, str], Awaitable[AnnouncedImage | None]]


class Announced:
    """Looks for images with ``find``, in ``nursery``; without either nothing is learnt. Nothing here fails a call."""

    def __init__(
        self,
        find: FindImage | None,
        nix: NixLayers,
        hints: StartHints,
        nursery: trio.Nursery | None,
    ) -> None:
        self._find = find
        self._nix = nix
        self._hints = hints
        self._nursery = nursery
        self._expected: dict[tuple[str, str], None] = {}

    def unpacking(self, key: str, labels: Mapping[str, str]) -> None:
        """The snapshot ``key`` with these ``labels`` is being prepared: perhaps for a layer of an image."""
        chain_id = labels.get(CHAIN_LABEL)
        if chain_id is None or self._find is None or self._nursery is None:
            return
        namespace = key.partition("/")[0]
        if (namespace, chain_id) in self._expected:
            del self._expected[namespace, chain_id]
        else:
            self._nursery.start_soon(self._learn, self._find, namespace, chain_id)

    async def _learn(self, find: FindImage, namespace: str, chain_id: str) -> None:
        try:
            image = await find(namespace, chain_id)
            if image is not None:
                self._expect(namespace, image.chain_ids, chain_id)
                await self._foresee(namespace, image)
        except FusesnapError as error:  # whoever needs it will be told
            log.info("what the image of layer %s shows is not known ahead: %s", chain_id, error)

    def _expect(self, namespace: str, chain_ids: tuple[str, ...], unpacked: str) -> None:
        """The layers above the one that is being unpacked will be, and tell nothing new."""
        above = chain_ids[chain_ids.index(unpacked) + 1 :]
        self._expected.update(((namespace, each), None) for each in above)
        while len(self._expected) > _EXPECTED:
            del self._expected[next(iter(self._expected))]

    async def _foresee(self, namespace: str, image: AnnouncedImage) -> None:
        paths: set[StorePath] = set()
        merged: dict[str, str] = {}
        for labels in image.labels:
            paths.update(await self._nix.named(labels))
            merged.update(labels)
        if paths:
            self._hints.announced(paths, merged)
            await self._nix.ensure_admitted(paths, ())
            # Names of snapshots have a number there that nobody knows yet.
            self._hints.admitted(f"{namespace}/0/{image.chain_ids[-1]}", paths)
