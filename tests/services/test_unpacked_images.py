"""What an image announces and starts with, as containerd's content store knows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fusesnap.errors import InvalidData, Unavailable
from fusesnap.images.digest import Digest
from fusesnap.images.documents import MAX_DOCUMENT_SIZE
from fusesnap.services.api import content_pb2, content_pb2_grpc
from fusesnap.services.containerd_client import open_channel
from fusesnap.services.image_unpack import chain_ids
from fusesnap.services.unpacked_images import CONFIG_REF, NEWEST, UnpackedImages
from fusesnap.snapshots.announced import AnnouncedImage

LOWER, UPPER = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
# sha256 of "<LOWER> <UPPER>", by sha256sum.
CHAIN = "sha256:9932074217c35353d2e03a3f5a86549f7c67bfeb0ba53e23d69f4d4c8f7958f5"


def descriptor(digest: str) -> dict[str, object]:
    return {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": 1}


class Content(content_pb2_grpc.ContentServicer):
    """Configurations and the manifests that name them, each newer than the one before."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.infos: list[content_pb2.Info] = []
        self.read: list[str] = []
        self.namespaces: set[object] = set()

    def add(
        self, *layers: str, command: str, annotations: Sequence[Mapping[str, str]] = ()
    ) -> None:
        config = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": layers},
            "config": {"Cmd": [command]},
        }
        number = self.add_blob(json.dumps(config).encode())
        self.blobs[f"manifest-{number}"] = json.dumps(
            {
                "schemaVersion": 2,
                "config": descriptor(f"sha256:{number:064}"),
                "layers": [
                    {**descriptor(layer), "annotations": dict(said)}
                    for layer, said in zip(layers, annotations, strict=False)
                ],
            }
        ).encode()

    def add_blob(self, data: bytes) -> int:
        number = len(self.infos)
        self.blobs[f"config-{number}"] = data
        info = content_pb2.Info(
            digest=f"manifest-{number}", labels={CONFIG_REF: f"config-{number}"}
        )
        info.created_at.FromSeconds(number)
        self.infos.append(info)
        return number

    def List(  # noqa: N802 - gRPC's name
        self, request: content_pb2.ListContentRequest, context: grpc.ServicerContext
    ) -> Iterator[content_pb2.ListContentResponse]:
        assert list(request.filters) == ['labels."containerd.io/gc.ref.content.config"']
        self.namespaces.add(dict(context.invocation_metadata())["containerd-namespace"])
        for info in self.infos:
            yield content_pb2.ListContentResponse(info=[info])

    def Read(  # noqa: N802
        self, request: content_pb2.ReadContentRequest, context: grpc.ServicerContext
    ) -> Iterator[content_pb2.ReadContentResponse]:
        self.read.append(request.digest)
        data, half = self.blobs[request.digest], len(self.blobs[request.digest]) // 2
        yield content_pb2.ReadContentResponse(data=data[:half])
        yield content_pb2.ReadContentResponse(offset=half, data=data[half:])


@pytest.fixture
def content(tmp_path: Path) -> Iterator[Content]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        found = Content()  # type: ignore[abstract]  # what is not asked for answers UNIMPLEMENTED
        content_pb2_grpc.add_ContentServicer_to_server(found, server)
        server.add_insecure_port(f"unix:{tmp_path}/containerd.sock")
        server.start()
        yield found
        server.stop(None).wait()


@pytest.fixture
def images(tmp_path: Path) -> Iterator[UnpackedImages]:
    with open_channel(tmp_path / "containerd.sock") as channel:
        yield UnpackedImages(channel)


async def test_a_configuration_is_known_by_its_layers(
    content: Content, images: UnpackedImages
) -> None:
    content.add(LOWER, UPPER, command="/nix/store/a/bin/tool")
    content.add(UPPER, command="/other")
    assert await images.programs(f"k8s.io/7/{CHAIN}") == (("/nix/store/a/bin/tool",),)
    assert content.read == ["config-1", "config-0"]  # the newest first
    assert content.namespaces == {"k8s.io"}
    assert await images.programs(f"default/7/{LOWER}") == (("/nix/store/a/bin/tool",),)
    assert await images.programs("default/7/sha256:none") == ()
    assert await images.programs("of another client") == ()


async def test_what_an_image_announces_are_the_labels_that_its_layers_will_get(
    content: Content, images: UnpackedImages
) -> None:
    said = {"containerd.io/snapshot/nix-layer": "true"}
    content.add(LOWER, UPPER, command="/x", annotations=[{}, {**said, "org.example": "other"}])
    for chain_id in (LOWER, CHAIN):
        found = await images.announced("k8s.io", chain_id)
        assert found == AnnouncedImage((LOWER, CHAIN), ({}, said))
    assert content.namespaces == {"k8s.io"}
    assert await images.announced("k8s.io", UPPER) is None


async def test_of_images_with_the_same_layer_the_newest_is_meant(
    content: Content, images: UnpackedImages
) -> None:
    for path in ("old", "new"):
        said = {"containerd.io/snapshot/nix-closure": path}
        content.add(LOWER, command="/x", annotations=[said])
    found = await images.announced("k8s.io", LOWER)
    assert found is not None
    assert found.labels == ({"containerd.io/snapshot/nix-closure": "new"},)


async def test_few_configurations_are_looked_into(content: Content, images: UnpackedImages) -> None:
    for _ in range(3 * NEWEST):
        content.add(LOWER, command="/x")
    assert await images.programs(f"default/7/{UPPER}") == ()
    assert len(content.read) == NEWEST


@pytest.mark.parametrize("data", [b"{", bytes(MAX_DOCUMENT_SIZE + 1)])
async def test_what_is_no_configuration_is_said_so(
    content: Content, images: UnpackedImages, data: bytes
) -> None:
    content.add_blob(data)
    with pytest.raises(InvalidData, match="config-0"):
        await images.programs(f"default/7/{LOWER}")


async def test_without_containerd(tmp_path: Path) -> None:
    with (
        open_channel(tmp_path / "nowhere.sock") as channel,
        pytest.raises(Unavailable, match="containerd"),
    ):
        await UnpackedImages(channel).programs(f"default/7/{LOWER}")


def test_a_chain_id_is_the_digest_of_what_is_below_and_the_layer() -> None:
    assert chain_ids([Digest.parse(LOWER), Digest.parse(UPPER)]) == [LOWER, CHAIN]
