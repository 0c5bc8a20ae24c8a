"""An image made of an ordinary package: one Nix layer that stands for its closure, and a configuration to start it.

The layer says what it stands for in its annotations alone (``nix-layer`` and ``nix-store-path.<N>``,
:mod:`fusesnap.nix.closure_labels`). It has no placeholders: those say whether a path is a directory or a file, which
no narinfo tells; some of them would be taken for the whole list by whoever gets no annotations. Its tar holds the empty
store directory, with a comment that names the closure: containerd knows an unpacked layer by the digest of its tar,
whatever its annotations, so that two closures must never have the same one.

The same package gives the same bytes everywhere: nothing in it has a time, and the closure is in the order of names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fusesnap.images.digest import Digest
from fusesnap.images.documents import Document
from fusesnap.images.layer_writer import directories, layer_tar
from fusesnap.images.layout import Image, ImageLayer
from fusesnap.images.platform import Platform
from fusesnap.images.programs import Programs, main_program, why_none
from fusesnap.nix.closure_labels import LAYER_LABEL, STORE_PATH_LABEL_PREFIX
from fusesnap.nix.hash import HashAlgorithm
from fusesnap.nix.store_path import StoreDir, StorePath

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class SynthesisedImage:
    """See ``OpenImage``. ``store_paths`` is the closure, sorted."""

    image: Image
    store_paths: tuple[StorePath, ...]
    _layer: bytes

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        """See ``OpenImage``."""
        yield self._layer


def synthesise(
    root: StorePath,
    closure: Iterable[StorePath],
    programs: Programs,
    platform: Platform,
    store_dir: StoreDir,
) -> SynthesisedImage:
    """Make the image of the package ``root``, whose ``closure`` has it too.

    It starts the main program, if it is clear which one that is. Otherwise it has no entrypoint; then its command is a
    sentence that says so: whoever starts it without a command of his own gets it as the name of what was not found.
    """
    paths = tuple(sorted(closure))
    tar = store_layer(paths, store_dir)
    config = json_document(CONFIG_TYPE, _config(root, programs, platform, store_dir, tar))
    digest = sha256(tar)
    layer = ImageLayer(0, LAYER_TYPE, digest, len(tar), digest, path_annotations(paths, store_dir))
    manifest = json_document(MANIFEST_TYPE, manifest_of(config, [layer]))
    return SynthesisedImage(Image(manifest, config, platform, (layer,)), paths, tar)


def store_layer(paths: Iterable[StorePath], store_dir: StoreDir) -> bytes:
    """Return the tar of a layer that has the store directory and nothing in it, and is another for other ``paths``."""
    closure = hashlib.sha256("".join(f"{store_dir.format(path)}\n" for path in paths).encode())
    *above, store = directories(store_dir.path)
    comment = {"comment": f"closure {closure.hexdigest()}"}
    return layer_tar([*above, replace(store, records=comment)])


def path_annotations(paths: Iterable[StorePath], store_dir: StoreDir) -> Mapping[str, str]:
    """Return the annotations by which a Nix layer names its store paths, one each: no label may be long."""
    numbered = {
        f"{STORE_PATH_LABEL_PREFIX}{number}": store_dir.format(path)
        for number, path in enumerate(paths)
    }
    return {LAYER_LABEL: "true", **numbered}


def manifest_of(config: Document, layers: Iterable[ImageLayer]) -> dict[str, Any]:
    """Return the manifest of an image with this configuration and these layers."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": config.media_type,
            "digest": str(config.digest),
            "size": len(config.data),
        },
        "layers": [
            {
                "mediaType": layer.media_type,
                "digest": str(layer.digest),
                "size": layer.size,
                **({"annotations": dict(layer.annotations)} if layer.annotations else {}),
            }
            for layer in layers
        ],
    }


def json_document(media_type: str, document: Mapping[str, Any]) -> Document:
    """Return a document as bytes that depend on nothing but what it says."""
    data = json.dumps(document, separators=(",", ":")).encode()
    return Document(media_type, sha256(data), data)


def sha256(data: bytes) -> Digest:
    """Return the digest of ``data``."""
    return Digest(HashAlgorithm.SHA256, hashlib.sha256(data).hexdigest())


def _config(
    root: StorePath, programs: Programs, platform: Platform, store_dir: StoreDir, tar: bytes
) -> dict[str, Any]:
    variant = {"variant": platform.variant} if platform.variant is not None else {}
    return {
        "architecture": platform.architecture,
        "os": platform.os,
        **variant,
        "config": {
            **_start(root, programs, store_dir),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [str(sha256(tar))]},
    }


def _start(root: StorePath, programs: Programs, store_dir: StoreDir) -> dict[str, Any]:
    if programs.directory is None:  # the path itself
        return {"Entrypoint": [store_dir.format(root)]}
    environment = {"Env": [f"PATH={programs.directory}"]}
    program = main_program(root, programs)
    if program is None:
        return {**environment, "Cmd": [why_none(root, programs)]}
    return {**environment, "Entrypoint": [f"{programs.directory}/{program}"]}
