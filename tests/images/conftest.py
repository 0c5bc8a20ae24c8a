"""What the tests of images share: layers and layouts made by hand, and their look on a real disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fusesnap.images.digest import Digest
from fusesnap.images.layer import LayerTar
from fusesnap.images.rootfs import RootFs

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")

Item = tuple[tarfile.TarInfo, bytes]

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def tar_bytes(items: Sequence[Item], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tar_format) as archive:
        for info, data in items:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return written.getvalue()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class LayoutMaker:
    """Writes an OCI image layout, blob by blob, with nothing checked: lies are welcome."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
        self.write_index()

    def write_index(self) -> None:
        (self.directory / "index.json").write_text(json.dumps(self.index))

    def path(self, digest: str) -> Path:
        return self.directory / "blobs" / digest.replace(":", "/")

    def blob(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        digest = digest_of(data)
        self.path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def document(self, document: Any, media_type: str, **more: Any) -> dict[str, Any]:
        return self.blob(json.dumps(document).encode(), media_type, **more)

    def manifest(
        self,
        tars: Sequence[bytes] = (),
        *,
        config: dict[str, Any] | None = None,
        manifest: dict[str, Any] | None = None,
        layers: Sequence[dict[str, Any]] | None = None,
        media_types: tuple[str, str, str] = (MANIFEST, CONFIG, LAYER + "+gzip"),
        **more: Any,
    ) -> dict[str, Any]:
        """Write a manifest with these layers; what is given replaces parts of its documents."""
        manifest_type, config_type, layer_type = media_types
        diff_ids = [digest_of(tar) for tar in tars]
        made_config = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            **(config or {}),
        }
        made_layers = [self.blob(gzip.compress(tar, 1, mtime=0), layer_type) for tar in tars]
        made = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": self.document(made_config, config_type),
            "layers": made_layers if layers is None else layers,
            **(manifest or {}),
        }
        return self.document(made, manifest_type, **more)

    def add(self, descriptor: dict[str, Any], reference: str | None = None) -> None:
        if reference is not None:
            descriptor = {
                **descriptor,
                "annotations": {"org.opencontainers.image.ref.name": reference},
            }
        self.index["manifests"].append(descriptor)
        self.write_index()

    def archive(self, path: Path) -> Path:
        with tarfile.open(path, "w") as archive:
            archive.add(self.directory, ".")
        return path


@pytest.fixture
def new_layout(tmp_path: Path) -> Callable[[], LayoutMaker]:
    """A maker of layouts, each in a directory of its own."""
    numbers = itertools.count()
    return lambda: LayoutMaker(tmp_path / f"layout-{next(numbers)}")


@pytest.fixture
def layout(new_layout: Callable[[], LayoutMaker]) -> LayoutMaker:
    """One empty layout."""
    return new_layout()


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., bytes]:
    """``tar_bytes``, for files that cannot import from here."""
    return tar_bytes


@pytest.fixture(scope="session")
def open_tar(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], LayerTar]:
    """Opens bytes as a layer's tar."""
    directory = tmp_path_factory.mktemp("tars")

    def opened(data: bytes) -> LayerTar:
        digest = digest_of(data)
        path = directory / digest
        path.write_bytes(data)
        return LayerTar(os.open(path, os.O_RDONLY), Digest.parse(digest), f"layer {digest[:14]}")

    return opened


def _shown(rootfs: RootFs) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    names: dict[int, list[str]] = {}
    for index in range(len(rootfs)):
        node = rootfs.node(index)
        path = os.fsdecode(rootfs.path(index))
        names.setdefault(node.inode, []).append(path)
        regular = stat.S_ISREG(node.st_mode)
        facts[path] = {
            "mode": stat.filemode(node.st_mode),
            "owner": (node.uid, node.gid),
            "rdev": node.rdev,
            "target": node.target,
            "content": rootfs.read(index, 0, node.size + 1) if regular else None,
            "mtime": None if stat.S_ISDIR(node.st_mode) else node.mtime_ns,
            "xattrs": dict(node.xattrs),
            "links": (node.nlink, node.inode),
        }
    for fact in facts.values():
        nlink, inode = fact["links"]
        fact["links"] = None if fact["mode"][0] == "d" else (nlink, sorted(names[inode]))
    return facts


def _on_disk(root: Path) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    names: dict[int, list[str]] = {}
    for directory, directories, files in os.walk(root):
        for name in ["."] * (directory == str(root)) + directories + files:
            path = Path(directory) / name
            status = path.lstat()
            relative = os.path.relpath(path, root).removeprefix(".")
            names.setdefault(status.st_ino, []).append(relative)
            link, regular = stat.S_ISLNK(status.st_mode), stat.S_ISREG(status.st_mode)
            facts[relative] = {
                "mode": stat.filemode(status.st_mode),
                "owner": (status.st_uid, status.st_gid),
                "rdev": status.st_rdev,
                "target": os.fsencode(path.readlink()) if link else b"",
                "content": path.read_bytes() if regular else None,
                "mtime": None if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns,
                "xattrs": {
                    os.fsencode(key): os.getxattr(path, key, follow_symlinks=False)
                    for key in os.listxattr(path, follow_symlinks=False)
                },
                "links": (status.st_nlink, status.st_ino),
            }
    for fact in facts.values():
        nlink, inode = fact["links"]
        fact["links"] = None if fact["mode"][0] == "d" else (nlink, sorted(names[inode]))
    return facts


@pytest.fixture(scope="session")
def shown() -> Callable[[RootFs], dict[str, dict[str, Any]]]:
    """What a tree shows, by path, in the form of ``unpacked``."""
    return _shown


@pytest.fixture(scope="session")
def unpacked(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[bytes]], dict[str, dict[str, Any]] | None]:
    """What real umoci makes of layers on a real disk, by path; None where it refuses."""

    def unpack(tars: Sequence[bytes]) -> dict[str, dict[str, Any]] | None:
        directory = tmp_path_factory.mktemp("unpacked")
        maker = LayoutMaker(directory / "layout")
        maker.add(maker.manifest(tars), "test")
        command = ["umoci", "raw", "unpack", "--image", f"{maker.directory}:test"]
        done = subprocess.run(
            [*command, directory / "rootfs"], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            assert "unpack entry" in done.stderr, done.stderr
            return None
        return _on_disk(directory / "rootfs")

    return unpack
