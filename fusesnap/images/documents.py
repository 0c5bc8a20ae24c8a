"""The JSON documents of an image: index, manifest and configuration.

Sources: OCI image specification, ``image-index.md``, ``manifest.md``, ``config.md`` and
``descriptor.md``; Docker's image manifest version 2, schema 2, which differs in media types only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from fusesnap.errors import InvalidData
from fusesnap.images.digest import Digest
from fusesnap.images.platform import Platform
from fusesnap.nix.quoting import quote

# The distribution specification lets registries refuse manifests above 4 MiB; a layer with a label
# for each of 10,000 store paths makes 1.5 MB of it. Documents are held in memory whole.
MAX_DOCUMENT_SIZE: Final = 4 * 1024 * 1024
# An overlay mount takes at most 500 lower layers (OVL_MAX_STACK of Linux), so that no runtime runs
# an image with more; each holds a file open here.
MAX_LAYERS: Final = 500

INDEX_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
MANIFEST_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
CONFIG_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)
_OCI_LAYER: Final = "application/vnd.oci.image.layer."
_DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs."
# Compression is told from the blob's first bytes, as containerd does: makers of images mislabel it,
# and the diff ID decides whether it was read rightly.
LAYER_TYPES: Final = frozenset(
    [
        f"{_OCI_LAYER}{kind}v1.tar{compression}"
        for kind in ("", "nondistributable.")
        for compression in ("", "+gzip", "+zstd")
    ]
    + [
        f"{_DOCKER_LAYER}{kind}diff.tar{compression}"
        for kind in ("", "foreign.")
        for compression in ("", ".gzip", ".zstd")
    ]
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob. ``size`` is in bytes; ``platform`` only where the index gives one."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str]
    platform: Platform | None


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or a configuration as it stands: its bytes have ``digest``."""

    media_type: str
    digest: Digest
    data: bytes


@dataclass(frozen=True, slots=True)
class Index:
    """Manifests, and indexes of more of them."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its configuration and its layers from the lowest."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What is needed of an image's configuration: the digests of the uncompressed layers."""

    platform: Platform
    diff_ids: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class DockerImage:
    """An entry of Docker's ``manifest.json``: names of files within the archive, and the image's tags."""

    config: str
    layers: tuple[str, ...]
    tags: tuple[str, ...]


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Platform(_Document):
    os: str
    architecture: str
    variant: str | None = None


class _Descriptor(_Document):
    media_type: str = Field(alias="mediaType")
    digest: str
    size: int = Field(ge=0)
    annotations: dict[str, str] | None = None
    platform: _Platform | None = None


class _Index(_Document):
    schema_version: int = Field(alias="schemaVersion", ge=2, le=2)
    media_type: str | None = Field(alias="mediaType", default=None)
    manifests: list[_Descriptor]
    # A document with the parts of both could be read as either (CVE-2021-41190).
    layers: None = None
    config: None = None


class _Manifest(_Document):
    schema_version: int = Field(alias="schemaVersion", ge=2, le=2)
    media_type: str | None = Field(alias="mediaType", default=None)
    config: _Descriptor
    layers: list[_Descriptor] = Field(max_length=MAX_LAYERS)
    manifests: None = None


class _RootFs(_Document):
    type: str = Field(pattern="^layers$")
    diff_ids: list[str] = Field(max_length=MAX_LAYERS)


class _Config(_Document):
    os: str
    architecture: str
    variant: str | None = None
    rootfs: _RootFs


class _Layout(_Document):
    version: str = Field(alias="imageLayoutVersion", pattern=r"^1\.")


class _DockerImage(_Document):
    config: str = Field(alias="Config")
    layers: list[str] | None = Field(alias="Layers", max_length=MAX_LAYERS)
    tags: list[str] | None = Field(alias="RepoTags", default=None)


class _DockerManifest(RootModel[list[_DockerImage]]):
    model_config = ConfigDict(strict=True, frozen=True)


def parse_layout(data: bytes, name: str) -> None:
    """Check the file ``oci-layout``; ``name`` is for messages, here and below. Raises InvalidData."""
    _parse(_Layout, data, name)


def parse_index(data: bytes, name: str, media_type: str | None) -> Index:
    """Read an index that its descriptor says has ``media_type`` (None: index.json)."""
    index = _parse(_Index, data, name)
    _check_type(index.media_type, media_type, name)
    return Index(tuple(_descriptor(each, name) for each in index.manifests))


def parse_manifest(data: bytes, name: str, media_type: str | None) -> Manifest:
    """Read a manifest that its descriptor says has ``media_type`` (None: where there is no descriptor)."""
    manifest = _parse(_Manifest, data, name)
    _check_type(manifest.media_type, media_type, name)
    layers = tuple(_descriptor(each, name) for each in manifest.layers)
    return Manifest(_descriptor(manifest.config, name), layers)


def parse_config(data: bytes, name: str) -> Config:
    """Read an image's configuration."""
    config = _parse(_Config, data, name)
    return Config(_platform(config), tuple(_digest(each, name) for each in config.rootfs.diff_ids))


def parse_docker_manifest(data: bytes, name: str) -> tuple[DockerImage, ...]:
    """Read ``manifest.json`` of an archive as ``docker save`` writes it."""
    return tuple(
        DockerImage(image.config, tuple(image.layers or ()), tuple(image.tags or ()))
        for image in _parse(_DockerManifest, data, name).root
    )


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], data: bytes, name: str) -> _Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidData(
            f"{name}: {where + ': ' if where else ''}{first['msg']}, got"
            f" {quote(repr(first['input']))}"
        ) from error


def _check_type(stated: str | None, expected: str | None, name: str) -> None:
    if stated and expected and stated != expected:
        raise InvalidData(
            f"{name}: expected mediaType {expected}, as its descriptor says, got {quote(stated)}"
        )


def _descriptor(document: _Descriptor, name: str) -> Descriptor:
    platform = document.platform
    return Descriptor(
        media_type=document.media_type,
        digest=_digest(document.digest, name),
        size=document.size,
        annotations=document.annotations or {},
        platform=_platform(platform) if platform is not None else None,
    )


def _platform(document: _Platform | _Config) -> Platform:
    # Some makers of images write an empty variant where there is none.
    return Platform(document.os, document.architecture, document.variant or None)


def _digest(text: str, name: str) -> Digest:
    try:
        return Digest.parse(text)
    except InvalidData as error:
        raise InvalidData(f"{name}: {error}") from error
