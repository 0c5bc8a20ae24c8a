"""Puts an image together: the layers of a base image, a Nix layer on top, and how its containers start.

Nothing in it depends on when, where or by whom it is made: the same parts give the same bytes.
"""

from __future__ import annotations

import gzip
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.images.documents import MAX_DOCUMENT_SIZE, MAX_LAYERS
from fusesnap.images.layout import Image, ImageLayer
from fusesnap.images.opening import OpenImage
from fusesnap.images.platform import Platform
from fusesnap.images.run_config import RunConfig, parse_history, parse_run_config
from fusesnap.images.synthesis import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    json_document,
    manifest_of,
    path_annotations,
    sha256,
)
from fusesnap.nix.closure_labels import CLOSURE_LABEL
from fusesnap.nix.store_path import StoreDir, StorePath

_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
# A base image may have Docker's types; they say the same.
_OCI_TYPES: Final = {
    f"application/vnd.docker.image.rootfs.{old}diff.tar{packed}": (
        f"application/vnd.oci.image.layer.{new}v1.tar{packed.replace('.', '+')}"
    )
    for old, new in (("", ""), ("foreign.", "nondistributable."))
    for packed in ("", ".gzip", ".zstd")
}


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """See ``OpenImage``. As long as its layers are read, the base image must stay open."""

    image: Image
    store_paths: tuple[StorePath, ...]
    _layer: bytes
    _base: OpenImage | None

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        """See ``OpenImage``."""
        if layer.position == len(self.image.layers) - 1:
            yield self._layer
        elif self._base is not None:
            yield from self._base.blob(self._base.image.layers[layer.position])


def build(
    tar: bytes,
    closure: Sequence[StorePath],
    closure_list: StorePath | None,
    run: RunConfig,
    platform: Platform,
    store_dir: StoreDir,
    base: OpenImage | None,
) -> BuiltImage:
    """Make an image whose topmost layer is the Nix layer ``tar`` for the paths ``closure``.

    ``closure_list`` is a store path with a file ``store-paths`` that lists them: it is named too, for those who read
    that. Raises InvalidData where the whole is more than containerd or a registry would take.
    """
    packed = gzip.compress(tar, 9, mtime=0)
    annotations = path_annotations(closure, store_dir)
    if closure_list is not None:
        annotations = {CLOSURE_LABEL: store_dir.format(closure_list), **annotations}
    below = base.image.layers if base is not None else ()
    top = ImageLayer(len(below), _LAYER_TYPE, sha256(packed), len(packed), sha256(tar), annotations)
    layers = (*(_as_oci(layer) for layer in below), top)
    document = _config(run, platform, layers, base)
    config = json_document(CONFIG_TYPE, document)
    manifest = json_document(MANIFEST_TYPE, manifest_of(config, layers))
    if len(layers) > MAX_LAYERS:
        raise InvalidData(f"expected at most {MAX_LAYERS} layers, got {len(layers)}")
    if len(manifest.data) > MAX_DOCUMENT_SIZE:
        raise InvalidData(
            f"the manifest names {len(closure)} store paths and has {len(manifest.data)} bytes, expected at most"
            f" {MAX_DOCUMENT_SIZE}"
        )
    return BuiltImage(Image(manifest, config, platform, layers), tuple(closure), packed, base)


def _config(
    run: RunConfig, platform: Platform, layers: Sequence[ImageLayer], base: OpenImage | None
) -> Mapping[str, object]:
    history = []
    if base is not None:
        data, name = base.image.config.data, f"config {base.image.config.digest} of the base image"
        run = run.over(parse_run_config(data, name))
        if history := parse_history(data, name):
            history = [*history, {"created_by": "fusesnap image build"}]
    return {
        "architecture": platform.architecture,
        "os": platform.os,
        **({"variant": platform.variant} if platform.variant is not None else {}),
        "config": run.to_json(),
        "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer in layers]},
        **({"history": history} if history else {}),
    }


def _as_oci(layer: ImageLayer) -> ImageLayer:
    return replace(layer, media_type=_OCI_TYPES.get(layer.media_type, layer.media_type))
