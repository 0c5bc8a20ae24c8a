"""Archives that are no good images, each for a reason of its own."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from testbed.images import Device, Entry, Link, ordinary_layer

NOWHERE: Final = f"/nix/store/{'0' * 32}-nothing"

Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Bad:
    """An archive, by its name; ``said`` is in the message that refuses it."""

    name: str
    said: str
    make: Callable[[Files], Mapping[str, Entry | bytes]]

    def write(self, good: Path, directory: Path) -> Path:
        """Write the archive, made of a good one, as ``<name>.tar``."""
        file = directory / f"{self.name}.tar"
        file.write_bytes(ordinary_layer(self.make(_files(good))).tar)
        return file


def _files(archive: Path) -> Files:
    with tarfile.open(archive) as tar:
        return {member.name: _data(tar, member) for member in tar.getmembers() if member.isfile()}


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _index(files: Files) -> Any:
    return json.loads(files["index.json"])


def _layer(files: Files) -> str:
    """The name of the last layer's blob."""
    manifest = json.loads(files[_blob(_index(files)["manifests"][0])])
    return _blob(manifest["layers"][-1])


def _blob(descriptor: Any) -> str:
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


def _with_config(files: Files, change: Callable[[Any], None]) -> Files:
    """Another configuration, with digests that are right."""
    index = _index(files)
    manifest = json.loads(files[_blob(index["manifests"][0])])
    config = json.loads(files[_blob(manifest["config"])])
    change(config)
    made = dict(files)
    manifest["config"] |= _put(made, config)
    index["manifests"][0] |= _put(made, manifest)
    return {**made, "index.json": json.dumps(index).encode()}


def _with_another_path(files: Files) -> Files:
    """The Nix layer stands for a path that no cache has."""
    index = _index(files)
    manifest = json.loads(files[_blob(index["manifests"][0])])
    manifest["layers"][-1]["annotations"]["containerd.io/snapshot/nix-store-path.0"] = NOWHERE
    made = dict(files)
    index["manifests"][0] |= _put(made, manifest)
    return {**made, "index.json": json.dumps(index).encode()}


def _put(files: Files, document: Any) -> dict[str, Any]:
    data = json.dumps(document).encode()
    digest = f"sha256:{sha256(data).hexdigest()}"
    files[_blob({"digest": digest})] = data
    return {"digest": digest, "size": len(data)}


def _with_another_manifest(files: Files) -> Files:
    index = _index(files)
    manifest = json.loads(files[_blob(index["manifests"][0])])
    made = dict(files)
    other = _put(made, {**manifest, "annotations": {"another": "one"}})
    index["manifests"].append({"mediaType": manifest["mediaType"], **other})
    return {**made, "index.json": json.dumps(index).encode()}


def _wrong_diff_id(config: Any) -> None:
    config["rootfs"]["diff_ids"][-1] = f"sha256:{'0' * 64}"


BAD = [
    Bad("traversal", "..", lambda files: {**files, "../escape": b""}),
    Bad("link", "expected plain files", lambda files: {**files, "blobs/link": Link("/etc")}),
    Bad("device", "expected plain files", lambda files: {**files, "blobs/null": Device(1, 3)}),
    Bad(
        "digest",
        "expected that digest",
        lambda files: {**files, _layer(files): bytes(len(files[_layer(files)]))},
    ),
    Bad("size", "bytes, got", lambda files: {**files, _layer(files): b"short"}),
    Bad("two", "expected one image", _with_another_manifest),
    Bad(
        "platform",
        "linux/s390x",
        lambda files: _with_config(files, lambda config: config.update(architecture="s390x")),
    ),
    Bad("diff-id", "expected it to unpack to", lambda files: _with_config(files, _wrong_diff_id)),
    Bad("closure", f"1 store paths cannot be had: {NOWHERE}", _with_another_path),
    Bad("empty", "expected an image", lambda files: {"readme": b"no image"}),
]
