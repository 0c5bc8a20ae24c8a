"""An image as ``docker save`` wrote it, and as nixpkgs' ``dockerTools`` writes it.

Source: Docker's image specification 1.2, "Combined Image JSON + Filesystem Changeset Format": ``manifest.json`` lists
images, each with the name of its configuration, its tags, and the names of its layers' tars, the lowest first. Nothing
but the configuration's ``diff_ids`` says what a layer's bytes must be, and nothing at all of a configuration but, as a
rule, its own name. So all layers are read here once. What comes out has the shape of a registry's image, with Docker's
media types, as containerd's importer makes it (``core/images/archive/importer.go``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.images.blobs import LayoutFiles
from fusesnap.images.digest import Digest
from fusesnap.images.disk import Progress, Region, no_progress, watched
from fusesnap.images.documents import (
    MAX_DOCUMENT_SIZE,
    Config,
    DockerImage,
    Document,
    parse_config,
    parse_docker_manifest,
)
from fusesnap.images.image_files import MANIFEST_NAME
from fusesnap.images.layout import Image, ImageLayer
from fusesnap.images.platform import Platform
from fusesnap.images.tar_scan import normalised
from fusesnap.images.uncompressed import compression_of, uncompressed
from fusesnap.nix.hash import HashAlgorithm
from fusesnap.nix.quoting import quote

MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPES: Final = {
    "none": "application/vnd.docker.image.rootfs.diff.tar",
    "gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "zstd": "application/vnd.docker.image.rootfs.diff.tar.zstd",
}
# "<64 digits>.json", and "blobs/sha256/<64 digits>" since Docker 25.
_NAMED_BY_DIGEST: Final = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?", re.ASCII)
_SHOWN: Final = 8  # choices in one message


@dataclass(frozen=True, slots=True)
class _Read:
    """What reading a layer's file found out."""

    digest: Digest
    size: int
    diff_id: Digest
    compression: str


class DockerArchive:
    """The images of one archive that has a ``manifest.json``."""

    def __init__(self, files: LayoutFiles, progress: Progress = no_progress) -> None:
        self._files = files
        self._progress = progress
        self._read: dict[str, _Read] = {}
        self._names: dict[Digest, str] = {}

    @property
    def name(self) -> str:
        """What messages call the archive."""
        return self._files.name

    def image(self, platform: Platform, reference: str | None = None) -> Image:
        """Return the image tagged ``reference`` (None: the only one) that runs on ``platform``.

        Reads every layer of it. Raises InvalidData where there is none or more than one, or anything is missing or
        malformed; ContentMismatch where a layer is not what the configuration says.
        """
        chosen, config = self._choose(platform, reference)
        document = self._config_document(chosen)
        if len(chosen.layers) != len(config.diff_ids):
            raise InvalidData(
                f"{self.name}: {MANIFEST_NAME}: expected {len(config.diff_ids)} layers, as"
                f" rootfs.diff_ids of {quote(chosen.config)} has, got {len(chosen.layers)}"
            )
        layers = tuple(
            self._layer(position, name, diff_id)
            for position, (name, diff_id) in enumerate(
                zip(chosen.layers, config.diff_ids, strict=True)
            )
        )
        return Image(_manifest(document, layers), document, config.platform, layers)

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        """Stream a layer of :meth:`image`; what came counts only when the iterator has ended.

        Raises ContentMismatch where it is not any more what it was; StorageFailure.
        """
        hasher = layer.digest.algorithm.new()
        for piece in self._pieces(self._names[layer.digest]):
            hasher.update(piece)
            yield piece
        if hasher.hexdigest() != layer.digest.hexadecimal:
            raise ContentMismatch(f"{self.name}: {layer}: it was changed while it was read")

    def _choose(self, platform: Platform, reference: str | None) -> tuple[DockerImage, Config]:
        listed = parse_docker_manifest(
            self._document(MANIFEST_NAME), f"{self.name}: {MANIFEST_NAME}"
        )
        named = [
            (image, self._config(image))
            for image in listed
            if reference is None or reference in image.tags
        ]
        distances = [platform.distance(config.platform) for _, config in named]
        running = [distance for distance in distances if distance is not None]
        if not running:
            offered = [f"{_label(image)} for {config.platform}" for image, config in named]
            raise InvalidData(
                f"{self.name}: expected an image for {platform}, there is {_choices(offered)}"
            )
        best = [
            each
            for each, distance in zip(named, distances, strict=True)
            if distance == min(running)
        ]
        if len({image.config for image, _ in best}) > 1:
            raise InvalidData(
                f"{self.name}: expected one image for {platform}, there are {len(best)}:"
                f" {_choices([_label(image) for image, _ in best])}"
            )
        return best[0]

    def _config(self, image: DockerImage) -> Config:
        return parse_config(
            self._config_document(image).data, f"{self.name}: {quote(image.config)}"
        )

    def _config_document(self, image: DockerImage) -> Document:
        data = self._document(image.config)
        digest = _sha256(data)
        named = _NAMED_BY_DIGEST.fullmatch(image.config)
        if named is not None and named[1] != digest.hexadecimal:
            raise ContentMismatch(
                f"{self.name}: {quote(image.config)}: expected the digest that it is named by, got {digest}"
            )
        return Document(CONFIG_TYPE, digest, data)

    def _layer(self, position: int, name: str, diff_id: Digest) -> ImageLayer:
        found = self._read.get(name)
        if found is None:
            found = self._read[name] = self._read_through(name, diff_id)
        if found.diff_id != diff_id:
            raise ContentMismatch(
                f"{self.name}: layer {position} ({quote(name)}): expected diff ID {diff_id}, got {found.diff_id}"
            )
        self._names[found.digest] = name
        media_type = _LAYER_TYPES.get(found.compression)
        if media_type is None:
            raise InvalidData(
                f"{self.name}: layer {position} ({quote(name)}): expected a tar, plain or with gzip or"
                f" zstd, got {found.compression}"
            )
        return ImageLayer(position, media_type, found.digest, found.size, diff_id, {})

    def _read_through(self, name: str, diff_id: Digest) -> _Read:
        """Hash a layer's file, and what it decompresses to with the algorithm that ``diff_id`` has."""
        raw, plain = HashAlgorithm.SHA256.new(), diff_id.algorithm.new()
        size, start = 0, b""

        def counted() -> Iterator[bytes]:
            nonlocal size, start
            for piece in watched(self._pieces(name), self._progress):
                start = start or piece[:8]
                size += len(piece)
                raw.update(piece)
                yield piece

        for piece in uncompressed(counted(), f"{self.name}: {quote(name)}"):
            plain.update(piece)
        return _Read(
            Digest(HashAlgorithm.SHA256, raw.hexdigest()),
            size,
            Digest(diff_id.algorithm, plain.hexdigest()),
            compression_of(start),
        )

    def _pieces(self, name: str) -> Iterator[bytes]:
        with self._find(name) as region:
            yield from region.pieces()

    def _document(self, name: str) -> bytes:
        with self._find(name) as region:
            if region.size > MAX_DOCUMENT_SIZE:
                raise InvalidData(
                    f"{region.name}: expected at most {MAX_DOCUMENT_SIZE} bytes, got {region.size}"
                )
            return b"".join(region.pieces())

    def _find(self, name: str) -> Region:
        # In a directory a name with ".." would lead out of it.
        path = normalised(name, f"{self.name}: {MANIFEST_NAME}").decode("utf-8", "replace")
        region = self._files.find(path)
        if region is None:
            raise InvalidData(f"{self.name}: expected a file {quote(name)}, there is none")
        return region


def _manifest(config: Document, layers: tuple[ImageLayer, ...]) -> Document:
    """The manifest that a registry would have, which the archive lacks."""
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": CONFIG_TYPE,
            "digest": str(config.digest),
            "size": len(config.data),
        },
        "layers": [
            {"mediaType": layer.media_type, "digest": str(layer.digest), "size": layer.size}
            for layer in layers
        ],
    }
    data = json.dumps(document, separators=(",", ":")).encode()
    return Document(MANIFEST_TYPE, _sha256(data), data)


def _sha256(data: bytes) -> Digest:
    hasher = HashAlgorithm.SHA256.new()
    hasher.update(data)
    return Digest(HashAlgorithm.SHA256, hasher.hexdigest())


def _label(image: DockerImage) -> str:
    return quote(image.tags[0] if image.tags else image.config)


def _choices(labels: list[str]) -> str:
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(labels[:_SHOWN]) + more if labels else "none"
