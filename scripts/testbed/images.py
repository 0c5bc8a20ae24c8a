"""OCI images made from scratch: ordinary layers and Nix layers, as files that containerd, skopeo and umoci accept.

Formats: the OCI image specification 1.0 (image layout, manifest, config, layer with whiteouts). The same description
gives the same bytes, and so the same digests, every time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import zstandard

from testbed.nix_store import Closure, NixStore

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
# With the levels that image builders have by default.
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 6, mtime=0),
    "zstd": lambda data: zstandard.ZstdCompressor(level=3).compress(data),
}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What the entries of a layer have in common; ``mtime`` in seconds, ``xattrs`` by name."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class File(Member):
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Directory(Member):
    pass


@dataclass(frozen=True, slots=True)
class Link(Member):
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True)
class HardLink(Member):
    """Another name of the file at ``target``, a path from the layer's root."""

    target: str


@dataclass(frozen=True, slots=True)
class Device(Member):
    """A character device, or a block device."""

    major: int
    minor: int
    block: bool = False


@dataclass(frozen=True, slots=True)
class Pipe(Member):
    pass


Entry = File | Directory | Link | HardLink | Device | Pipe
Entries = Mapping[str, Entry | bytes | str]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: its uncompressed tar, and the annotations of its descriptor in the manifest."""

    tar: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)


class NixLayerManner(Enum):
    """How an image says which store paths a Nix layer stands for.

    CLOSURE       annotation ``containerd.io/snapshot/nix-closure`` = a store path that lists them
    PATHS         annotations ``containerd.io/snapshot/nix-layer`` and ``nix-store-path.<N>``
    PLACEHOLDERS  by nothing but the layer's content
    """

    CLOSURE = "closure"
    PATHS = "paths"
    PLACEHOLDERS = "placeholders"


def whiteout(path: str) -> str:
    """The name in a layer that removes ``path`` of the layers below; give it an empty File."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/{WHITEOUT}{name}".lstrip("/")


def opaque(directory: str) -> str:
    """The name in a layer that hides all that the layers below have in ``directory``; give it an empty File."""
    return f"{directory}/{OPAQUE}".lstrip("/")


def ordinary_layer(entries: Entries) -> Layer:
    """A layer of ``entries`` in the order given, by path from the root without a leading slash.

    ``bytes`` stand for a file of mode 0644, ``str`` for a symbolic link. Parent directories that are not given come
    before their first entry, with mode 0755.
    """
    buffer = io.BytesIO()
    known: set[str] = set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, given in entries.items():
            for parent in _parents(path):
                if parent not in known and parent not in entries:
                    _add(tar, parent, Directory())
                known.add(parent)
            _add(tar, path, _entry(given))
            known.add(path)
    return Layer(buffer.getvalue())


def store_paths_layer(store: NixStore, paths: Sequence[str]) -> Layer:
    """A layer that carries store paths with all they hold, as images without a snapshotter of their own do."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            tar.add(store.real(path), path.lstrip("/"))
    return Layer(buffer.getvalue())


def nix_layer(
    store: NixStore,
    closure: Closure,
    manner: NixLayerManner,
    *,
    list_path: str | None = None,
    copy_to_root: bool = False,
) -> Layer:
    """A Nix layer as nix-snapshotter lays it out: an empty directory or an empty file for each store path.

    ``list_path`` is the store path that holds ``store-paths`` (``nix_store.store_paths_list``), for CLOSURE only.
    ``copy_to_root`` puts a link ``bin/<program>`` for each program of the closure's root beside the placeholders. A
    path that is a link to a directory has a directory as placeholder, as there.
    """
    entries: dict[str, Entry | bytes | str] = {}
    for path in closure.paths:
        directory = store.is_directory(path)
        entries[path.lstrip("/")] = Directory() if directory else File(mode=0o555)
    if copy_to_root:
        for program in sorted(store.real(f"{closure.root}/bin").iterdir()):
            entries[f"bin/{program.name}"] = f"{closure.root}/bin/{program.name}"
    return Layer(ordinary_layer(entries).tar, _annotations(closure, manner, list_path))


def _annotations(closure: Closure, manner: NixLayerManner, list_path: str | None) -> dict[str, str]:
    if manner is NixLayerManner.CLOSURE:
        if list_path is None:
            raise ValueError("a Nix layer of manner CLOSURE needs list_path")
        return {"containerd.io/snapshot/nix-closure": list_path}
    if manner is NixLayerManner.PATHS:
        numbered = {
            f"containerd.io/snapshot/nix-store-path.{number}": path
            for number, path in enumerate(closure.paths)
        }
        return {"containerd.io/snapshot/nix-layer": "true", **numbered}
    return {}


def write_image(
    archive: Path,
    layers: Sequence[Layer],
    *,
    name: str,
    command: Sequence[str] = (),
    entrypoint: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    working_directory: str = "/",
    compression: str = "gzip",
) -> Path:
    """Write an image as an ``oci-archive`` and return its file. ``name`` is its reference, as in ``redis:latest``.

    ``compression`` of its layers is gzip or zstd.
    """
    config = {
        "architecture": ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {
            "Cmd": list(command),
            "Entrypoint": list(entrypoint),
            "Env": [f"{key}={value}" for key, value in (environment or {}).items()],
            "WorkingDir": working_directory,
        },
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer.tar) for layer in layers]},
    }
    blobs: list[bytes] = []
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _blob(blobs, CONFIG_TYPE, _json(config)),
        "layers": [
            _blob(
                blobs,
                f"{LAYER_TYPE}+{compression}",
                _COMPRESS[compression](layer.tar),
                layer.annotations,
            )
            for layer in layers
        ],
    }
    reference = {"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name}
    index = {
        "schemaVersion": 2,
        "manifests": [_blob(blobs, MANIFEST_TYPE, _json(manifest), reference)],
    }
    files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _json(index)}
    files |= {f"blobs/{_digest(blob).replace(':', '/')}": blob for blob in blobs}
    archive.write_bytes(ordinary_layer(files).tar)
    return archive


def write_build_image(
    archive: Path, store: NixStore, closure: Closure, *, name: str, entrypoint: Sequence[str]
) -> Path:
    """Write what nix-snapshotter's ``buildImage`` leaves: one Nix layer, ``copyToRoot`` of the closure's root.

    From its source (``pkg/nix2container``): documents indented by two blanks; the layer with gzip and the annotations
    of PATHS; exported by containerd (``core/images/archive/exporter.go``), which lists directories too, writes
    ``manifest.json`` for Docker beside ``index.json``, and has the name without host and tag in no place but its own
    annotation.
    """
    layer = nix_layer(store, closure, NixLayerManner.PATHS, copy_to_root=True)
    packed = gzip.compress(layer.tar, mtime=0)
    blobs: list[bytes] = []
    config = _indented(
        {
            "architecture": ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": {"Entrypoint": list(entrypoint)},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer.tar)]},
        }
    )
    manifest = _indented(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _blob(blobs, CONFIG_TYPE, config),
            "layers": [_blob(blobs, f"{LAYER_TYPE}+gzip", packed, layer.annotations)],
        }
    )
    names = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [_blob(blobs, MANIFEST_TYPE, manifest, names)],
    }
    docker = {
        "Config": f"blobs/{_digest(config).replace(':', '/')}",
        "RepoTags": [name],
        "Layers": [f"blobs/{_digest(packed).replace(':', '/')}"],
    }
    entries: dict[str, Entry | bytes | str] = {
        "blobs": Directory(),
        "blobs/sha256": Directory(),
        **{f"blobs/{_digest(blob).replace(':', '/')}": File(blob, mode=0o444) for blob in blobs},
        "index.json": _json(index),
        "manifest.json": _json([docker]),
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
    }
    archive.write_bytes(ordinary_layer(entries).tar)
    return archive


def _indented(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()


def _blob(
    blobs: list[bytes],
    media_type: str,
    data: bytes,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Keep a blob, and return its descriptor."""
    blobs.append(data)
    descriptor: dict[str, Any] = {
        "mediaType": media_type,
        "digest": _digest(data),
        "size": len(data),
    }
    return {**descriptor, "annotations": dict(annotations)} if annotations else descriptor


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _parents(path: str) -> Iterable[str]:
    words = path.split("/")[:-1]
    return ("/".join(words[: count + 1]) for count in range(len(words)))


def _entry(given: Entry | bytes | str) -> Entry:
    if isinstance(given, bytes):
        return File(given, mode=0o644)
    return Link(given) if isinstance(given, str) else given


def _add(tar: tarfile.TarFile, path: str, entry: Entry) -> None:
    info = tarfile.TarInfo(path)
    info.mode, info.uid, info.gid, info.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
    # Go's archive/tar and GNU tar keep extended attributes under this name.
    info.pax_headers = {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
        for name, value in entry.xattrs.items()
    }
    match entry:
        case File():
            info.size = len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
            return
        case Directory():
            info.type = tarfile.DIRTYPE
        case Link():
            info.type, info.linkname = tarfile.SYMTYPE, entry.target
        case HardLink():
            info.type, info.linkname = tarfile.LNKTYPE, entry.target
        case Device():
            info.type = tarfile.BLKTYPE if entry.block else tarfile.CHRTYPE
            info.devmajor, info.devminor = entry.major, entry.minor
        case Pipe():
            info.type = tarfile.FIFOTYPE
    tar.addfile(info)
