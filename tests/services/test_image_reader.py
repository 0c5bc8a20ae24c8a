"""What an image in containerd says of its layers, through indexes of whatever depth is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from fusesnap.errors import InvalidData
from fusesnap.images.digest import Digest
from fusesnap.images.documents import MAX_DOCUMENT_SIZE, Descriptor
from fusesnap.images.platform import Platform
from fusesnap.images.synthesis import CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE, sha256
from fusesnap.services import image_reader
from fusesnap.services.image_reader import ImageReader

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
AMD64 = Platform("linux", "amd64")


class Content:
    """Documents by digest."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def add(self, document: object, media_type: str, **more: Any) -> dict[str, Any]:
        data = json.dumps(document).encode()
        digest = str(sha256(data))
        self.blobs[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def manifest(self, name: str, architecture: str = "amd64") -> dict[str, Any]:
        layer = {
            "mediaType": LAYER_TYPE,
            "digest": f"sha256:{'0' * 64}",
            "size": 1,
            "annotations": {"name": name},
        }
        config = self.add({}, CONFIG_TYPE)
        document = {"schemaVersion": 2, "config": config, "layers": [layer]}
        platform = {"os": "linux", "architecture": architecture}
        return self.add(document, MANIFEST_TYPE, platform=platform)

    def index(self, *entries: dict[str, Any]) -> dict[str, Any]:
        document = {"schemaVersion": 2, "manifests": list(entries)}
        platform = {"os": "linux", "architecture": "amd64"}
        return self.add(document, INDEX_TYPE, platform=platform)


Layers = Callable[[Content, dict[str, Any]], Any]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Layers:
    """Reads the layers of the image that a descriptor names."""

    async def read(content: Content, target: dict[str, Any]) -> Any:
        async def document(self: ImageReader, _: object, entry: Descriptor, name: str) -> bytes:
            return content.blobs[str(entry.digest)]

        monkeypatch.setattr(image_reader.ImageReader, "_read", document)
        entry = Descriptor(
            target["mediaType"], Digest.parse(target["digest"]), target["size"], {}, None
        )
        return await ImageReader(cast("Any", None), AMD64)._layers(cast("Any", None), entry, "x")

    return read


async def test_a_manifest(layers: Layers) -> None:
    content = Content()
    assert await layers(content, content.manifest("one")) == [{"name": "one"}]


async def test_an_index_of_indexes(layers: Layers) -> None:
    content = Content()
    inner = content.index(content.manifest("arm", "arm64"), content.manifest("amd"))
    assert await layers(content, content.index(inner)) == [{"name": "amd"}]


async def test_what_is_none_for_this_machine(layers: Layers) -> None:
    content = Content()
    with pytest.raises(InvalidData, match="expected an image for linux/amd64, there is none"):
        await layers(content, content.index(content.manifest("arm", "arm64")))


async def test_what_is_no_image(layers: Layers) -> None:
    content = Content()
    with pytest.raises(InvalidData, match="expected an image, got text/plain"):
        await layers(content, content.add({}, "text/plain"))


async def test_what_is_too_deep(layers: Layers) -> None:
    content = Content()
    entry = content.manifest("one")
    for _ in range(5):
        entry = content.index(entry)
    with pytest.raises(InvalidData, match="expected at most 4 indexes in one another"):
        await layers(content, entry)


async def test_what_is_too_large() -> None:
    entry = Descriptor(INDEX_TYPE, sha256(b""), MAX_DOCUMENT_SIZE + 1, {}, None)
    reader = ImageReader(cast("Any", None), AMD64)
    with pytest.raises(InvalidData, match=f"expected at most {MAX_DOCUMENT_SIZE} bytes"):
        await reader._layers(cast("Any", None), entry, "x")
