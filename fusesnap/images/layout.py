"""An image in an OCI image layout: which one is meant, for which platform, and its verified parts.

Source: OCI image specification, ``image-layout.md`` and ``image-index.md``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.images.blobs import LayoutArchive, LayoutDirectory, LayoutFiles, verified
from fusesnap.images.digest import Digest
from fusesnap.images.documents import (
    CONFIG_TYPES,
    INDEX_TYPES,
    LAYER_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_SIZE,
    Config,
    Descriptor,
    Document,
    Manifest,
    parse_config,
    parse_index,
    parse_layout,
    parse_manifest,
)
from fusesnap.images.platform import Platform
from fusesnap.images.source import ImageSource, Transport
from fusesnap.nix.quoting import quote

# An index that names one nested index many times, and that another, would multiply; no image's
# platforms and attestations come near this.
MAX_DOCUMENTS: Final = 1024
# One below index.json is usual (an image for several platforms); the walk takes stack.
MAX_DEPTH: Final = 4
# Where a maker writes which image an entry of index.json is; the second is containerd's full name.
_REFERENCE_ANNOTATIONS: Final = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
_SHOWN: Final = 8  # choices in one message


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """One layer of an image. ``position`` counts from 0, the lowest; ``size`` is the blob's."""

    position: int
    media_type: str
    digest: Digest
    size: int
    diff_id: Digest
    annotations: Mapping[str, str]

    def __str__(self) -> str:
        return f"layer {self.position} ({self.digest})"


@dataclass(frozen=True, slots=True)
class Image:
    """One image for one platform, its documents checked."""

    manifest: Document
    config: Document
    platform: Platform
    layers: tuple[ImageLayer, ...]

    @property
    def manifest_digest(self) -> Digest:
        """What a registry knows the image by."""
        return self.manifest.digest

    @property
    def config_digest(self) -> Digest:
        """The image's ID."""
        return self.config.digest


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A manifest that an index offers; ``label`` tells it apart for people."""

    label: str
    descriptor: Descriptor
    platform: Platform


class ImageLayout:
    """The images of one layout. Made by :func:`open_layout`."""

    def __init__(self, files: LayoutFiles, how_to_choose: str = "add :REFERENCE") -> None:
        self._files = files
        self._how_to_choose = how_to_choose
        self._read_documents = 0

    @property
    def name(self) -> str:
        """What messages call the layout: its path."""
        return self._files.name

    def image(self, platform: Platform, reference: str | None = None) -> Image:
        """Return the image called ``reference`` (None: the only one) that runs on ``platform``.

        A reference is what annotations say, or the digest that index.json has.
        Raises InvalidData where there is none or more than one, naming the choices, and wherever a
        document or blob is not what was announced.
        """
        self._read_documents = 0
        chosen = self._choose(platform, reference)
        manifest, config = self._manifest_and_config(chosen.descriptor)
        if config is None or platform.distance(config.platform) is None:
            got = config.platform if config else f"config {quote(manifest.config.media_type)}"
            raise InvalidData(f"{self.name}: {chosen.label}: expected {platform}, got {got}")
        return Image(
            manifest=self._kept(chosen.descriptor, "manifest"),
            config=self._kept(manifest.config, "config"),
            platform=config.platform,
            layers=self._layers(chosen.descriptor, manifest, config),
        )

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        """Stream a layer's blob; what came counts only when the iterator has ended.

        Raises InvalidData (missing), ContentMismatch (size or digest), StorageFailure.
        """
        return verified(self._files, layer.digest, layer.size, f"layer {layer.position}")

    def _choose(self, platform: Platform, reference: str | None) -> _Candidate:
        entries = self._entries(reference)
        offered = [
            candidate
            for entry in entries
            for candidate in self._best_of(entry, platform, _label(entry), depth=0)
        ]
        ranked = [
            (distance, candidate)
            for candidate in offered
            if (distance := platform.distance(candidate.platform)) is not None
        ]
        if not ranked:
            raise InvalidData(
                f"{self.name}: expected an image for {platform}, there is"
                f" {_choices(f'{c.label} for {c.platform}' for c in offered)}"
            )
        nearest = min(distance for distance, _ in ranked)
        best = {c.descriptor.digest: c for distance, c in ranked if distance == nearest}
        if len(best) > 1:
            raise InvalidData(
                f"{self.name}: expected one image for {platform}, there are {len(best)}:"
                f" {_choices(c.label for c in best.values())}; {self._how_to_choose} to choose"
            )
        return next(iter(best.values()))

    def _entries(self, reference: str | None) -> list[Descriptor]:
        parse_layout(self._file("oci-layout"), f"{self.name}: oci-layout")
        index = parse_index(self._file("index.json"), f"{self.name}: index.json", None)
        if reference is None:
            return list(index.manifests)
        named = [
            entry
            for entry in index.manifests
            if reference in (*_references(entry), str(entry.digest))
        ]
        if not named:
            raise InvalidData(
                f"{self.name}: expected an image called {quote(reference)}, there is"
                f" {_choices(_label(entry) for entry in index.manifests)}"
            )
        return named

    def _best_of(
        self, entry: Descriptor, platform: Platform, label: str, depth: int
    ) -> list[_Candidate]:
        """What an entry offers: of a nested index the first of the nearest, else all for the message."""
        if entry.media_type in MANIFEST_TYPES:
            found = entry.platform or self._platform_of(entry)
            return [_Candidate(label, entry, found)] if found is not None else []
        if entry.media_type not in INDEX_TYPES:
            return []  # "unknown media types MUST NOT generate an error" (image-index.md)
        name = f"{self.name}: index {entry.digest}"
        if depth == MAX_DEPTH:
            raise InvalidData(f"{name}: expected at most {MAX_DEPTH} indexes in one another")
        nested = parse_index(self._document(entry, "index"), name, entry.media_type)
        below = [
            candidate
            for each in nested.manifests
            for candidate in self._best_of(each, platform, label, depth + 1)
        ]
        distances = [platform.distance(candidate.platform) for candidate in below]
        running = [distance for distance in distances if distance is not None]
        return [below[distances.index(min(running))]] if running else below

    def _platform_of(self, entry: Descriptor) -> Platform | None:
        config = self._manifest_and_config(entry)[1]
        return config.platform if config is not None else None

    def _manifest_and_config(self, entry: Descriptor) -> tuple[Manifest, Config | None]:
        name = f"{self.name}: manifest {entry.digest}"
        manifest = parse_manifest(self._document(entry, "manifest"), name, entry.media_type)
        if manifest.config.media_type not in CONFIG_TYPES:
            return manifest, None  # an artifact (a signature, a chart), not an image
        data = self._document(manifest.config, "config")
        return manifest, parse_config(data, f"{self.name}: config {manifest.config.digest}")

    def _layers(
        self, entry: Descriptor, manifest: Manifest, config: Config
    ) -> tuple[ImageLayer, ...]:
        name = f"{self.name}: manifest {entry.digest}"
        if len(manifest.layers) != len(config.diff_ids):
            raise InvalidData(
                f"{name}: expected {len(config.diff_ids)} layers, as rootfs.diff_ids of config"
                f" {manifest.config.digest} has, got {len(manifest.layers)}"
            )
        for position, layer in enumerate(manifest.layers):
            if layer.media_type not in LAYER_TYPES:
                raise InvalidData(
                    f"{name}: layer {position} ({layer.digest}): expected a tar layer, plain or"
                    f" with gzip or zstd, got media type {quote(layer.media_type)}"
                )
        return tuple(
            ImageLayer(
                position=position,
                media_type=layer.media_type,
                digest=layer.digest,
                size=layer.size,
                diff_id=diff_id,
                annotations=layer.annotations,
            )
            for position, (layer, diff_id) in enumerate(
                zip(manifest.layers, config.diff_ids, strict=True)
            )
        )

    def _kept(self, descriptor: Descriptor, what: str) -> Document:
        data = self._document(descriptor, what)
        return Document(descriptor.media_type, descriptor.digest, data)

    def _document(self, descriptor: Descriptor, what: str) -> bytes:
        self._read_documents += 1
        if self._read_documents > MAX_DOCUMENTS:
            raise InvalidData(
                f"{self.name}: expected at most {MAX_DOCUMENTS} indexes, manifests and configs to"
                f" look through, got more at {what} {descriptor.digest}"
            )
        if descriptor.size > MAX_DOCUMENT_SIZE:
            raise InvalidData(
                f"{self.name}: {what} {descriptor.digest}: expected at most {MAX_DOCUMENT_SIZE}"
                f" bytes, got {descriptor.size}"
            )
        return b"".join(verified(self._files, descriptor.digest, descriptor.size, what))

    def _file(self, name: str) -> bytes:
        region = self._files.find(name)
        if region is None:
            raise InvalidData(
                f"{self.name}: expected an OCI image layout with a file {name}, there is none"
            )
        with region:
            if region.size > MAX_DOCUMENT_SIZE:
                raise InvalidData(
                    f"{region.name}: expected at most {MAX_DOCUMENT_SIZE} bytes, got {region.size}"
                )
            return b"".join(region.pieces())


@contextmanager
def open_layout(source: ImageSource) -> Iterator[ImageLayout]:
    """Open the layout that ``source`` names.

    Raises StorageFailure where the system refuses, InvalidData for an archive that is none.
    """
    make = LayoutArchive if source.transport is Transport.ARCHIVE else LayoutDirectory
    with make(source.path) as files:
        yield ImageLayout(files)


def _references(entry: Descriptor) -> list[str]:
    return [entry.annotations[key] for key in _REFERENCE_ANNOTATIONS if key in entry.annotations]


def _label(entry: Descriptor) -> str:
    references = _references(entry)
    return quote(references[-1]) if references else str(entry.digest)


def _choices(labels: Iterator[str]) -> str:
    every = list(dict.fromkeys(labels))
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more if every else "none"
