"""What an image starts with, as containerd's content store knows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fusesnap.errors import InvalidData, Unavailable
from fusesnap.images.digest import Digest
from fusesnap.images.documents import MAX_DOCUMENT_SIZE
from fusesnap.services.api import content_pb2, content_pb2_grpc
from fusesnap.services.containerd_client import open_channel
from fusesnap.services.entry_programs import CONFIG_REF, NEWEST, EntryPrograms
from fusesnap.services.image_unpack import chain_ids

LOWER, UPPER = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
# sha256 of "<LOWER> <UPPER>", by sha256sum.
CHAIN = "sha256:9932074217c35353d2e03a3f5a86549f7c67bfeb0ba53e23d69f4d4c8f7958f5"


class Content(content_pb2_grpc.ContentServicer):
    """Configurations and the manifests that name them, each newer than the one before."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.infos: list[content_pb2.Info] = []
        self.read: list[str] = []
        self.namespaces: set[object] = set()

    def add(self, *layers: str, command: str) -> None:
        config = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": layers},
            "config": {"Cmd": [command]},
        }
        self.add_blob(json.dumps(config).encode())

    def add_blob(self, data: bytes) -> None:
        number = len(self.blobs)
        self.blobs[f"config-{number}"] = data
        info = content_pb2.Info(
            digest=f"manifest-{number}", labels={CONFIG_REF: f"config-{number}"}
        )
        info.created_at.FromSeconds(number)
        self.infos.append(info)

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
def programs(tmp_path: Path) -> Iterator[EntryPrograms]:
    with open_channel(tmp_path / "containerd.sock") as channel:
        yield EntryPrograms(channel)


async def test_a_configuration_is_known_by_its_layers(
    content: Content, programs: EntryPrograms
) -> None:
    content.add(LOWER, UPPER, command="/nix/store/a/bin/tool")
    content.add(UPPER, command="/other")
    assert await programs.of(f"k8s.io/7/{CHAIN}") == (("/nix/store/a/bin/tool",),)
    assert content.read == ["config-1", "config-0"]  # the newest first
    assert content.namespaces == {"k8s.io"}
    assert await programs.of(f"default/7/{LOWER}") == (("/nix/store/a/bin/tool",),)
    assert await programs.of("default/7/sha256:none") == ()
    assert await programs.of("of another client") == ()


async def test_few_configurations_are_looked_into(
    content: Content, programs: EntryPrograms
) -> None:
    for _ in range(3 * NEWEST):
        content.add(LOWER, command="/x")
    assert await programs.of(f"default/7/{UPPER}") == ()
    assert len(content.read) == NEWEST


@pytest.mark.parametrize("data", [b"{", bytes(MAX_DOCUMENT_SIZE + 1)])
async def test_what_is_no_configuration_is_said_so(
    content: Content, programs: EntryPrograms, data: bytes
) -> None:
    content.add_blob(data)
    with pytest.raises(InvalidData, match="config-0"):
        await programs.of(f"default/7/{LOWER}")


async def test_without_containerd(tmp_path: Path) -> None:
    with (
        open_channel(tmp_path / "nowhere.sock") as channel,
        pytest.raises(Unavailable, match="containerd"),
    ):
        await EntryPrograms(channel).of(f"default/7/{LOWER}")


def test_a_chain_id_is_the_digest_of_what_is_below_and_the_layer() -> None:
    assert chain_ids([Digest.parse(LOWER), Digest.parse(UPPER)]) == [LOWER, CHAIN]
