"""Our calls to containerd: what they carry, and what becomes of them when nobody waits any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from fusesnap.errors import DeadlineExceeded, NotFound, PathNotFound, Unsupported
from fusesnap.services.api import cri_images_pb2, images_pb2, images_pb2_grpc
from fusesnap.services.api.descriptor_pb2 import Descriptor
from fusesnap.services.containerd_calls import ContainerdCalls
from fusesnap.services.containerd_client import open_channel
from fusesnap.services.image_names import ImageNames, KnownImage
from fusesnap.services.lease import leased

TARGET = Descriptor(digest="sha256:target")


class Played(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic for mypy alone
    """containerd, as far as it is needed: leases and names of images in memory, and a CRI that may be deaf."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.leases: set[str] = set()
        self.images: dict[str, images_pb2.Image] = {}
        self.deaf = False
        self.refused = ""
        self.gate: threading.Event | None = None
        self.waiting = threading.Event()
        self.left = threading.Event()

    def service(self, handler_call_details: Any) -> Any:
        method: str = handler_call_details.method
        short = ".".join(method.rpartition(".")[2].split("/"))

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.asked.append(short)
            self.metadata = dict(context.invocation_metadata())
            context.add_callback(self.left.set)
            self.waiting.set()
            if self.gate is not None:
                self.gate.wait(60)
            if short == self.refused:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown service")
            return self._answer(short, request, context)

        return grpc.unary_unary_rpc_method_handler(answer)

    def _answer(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        match method:
            case "Images.Get":
                name = images_pb2.GetImageRequest.FromString(request).name
                if name not in self.images:
                    context.abort(grpc.StatusCode.NOT_FOUND, f"image {name}")
                return images_pb2.GetImageResponse(image=self.images[name]).SerializeToString()
            case "Images.Create" | "Images.Update":
                image = images_pb2.CreateImageRequest.FromString(request).image
                self.images[image.name] = image
            case "Images.Delete":
                del self.images[images_pb2.DeleteImageRequest.FromString(request).name]
            case "ImageService.ImageStatus" if not self.deaf:
                name = cri_images_pb2.ImageStatusRequest.FromString(request).image.image
                return self._status(name).SerializeToString()
        return b""

    def _status(self, name: str) -> cri_images_pb2.ImageStatusResponse:
        if name not in self.images:
            return cri_images_pb2.ImageStatusResponse()
        image = cri_images_pb2.Image(id="sha256:id", repo_tags=[name])
        info = {"info": '{"chainID": "sha256:chain"}'}
        return cri_images_pb2.ImageStatusResponse(image=image, info=info)


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        found = Played()
        server.add_generic_rpc_handlers((found,))
        server.add_insecure_port(f"unix:{tmp_path}/containerd.sock")
        server.start()
        yield found
        if found.gate is not None:
            found.gate.set()
        server.stop(None).wait()


@pytest.fixture
def containerd(tmp_path: Path, played: Played) -> Iterator[ContainerdCalls]:
    with open_channel(tmp_path / "containerd.sock") as channel:
        yield ContainerdCalls(channel, "k8s.io")


async def test_a_call_says_its_namespace_and_its_lease(
    containerd: ContainerdCalls, played: Played
) -> None:
    images = images_pb2_grpc.ImagesStub(containerd.channel)
    with pytest.raises(NotFound, match="containerd: image x"):
        await containerd.under("mine").ask(images.Get, images_pb2.GetImageRequest(name="x"))
    assert played.metadata["containerd-namespace"] == "k8s.io"
    assert played.metadata["containerd-lease"] == "mine"


async def test_who_is_cancelled_cancels_the_call(
    containerd: ContainerdCalls, played: Played, nursery: trio.Nursery
) -> None:
    played.gate = threading.Event()
    images = images_pb2_grpc.ImagesStub(containerd.channel)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as own:
            own.start_soon(containerd.ask, images.List, images_pb2.ListImagesRequest())
            assert await trio.to_thread.run_sync(played.waiting.wait, 60)
            scope.cancel()
    assert await trio.to_thread.run_sync(played.left.wait, 60)


async def test_work_in_a_thread_is_cancelled_and_waited_for(containerd: ContainerdCalls) -> None:
    stop, ended = threading.Event(), threading.Event()

    def work() -> None:
        stop.wait(60)
        ended.set()

    with trio.move_on_after(0.01) as scope:
        await containerd.in_thread(work, stop.set)
    assert scope.cancelled_caught
    assert ended.is_set()


async def test_why_work_in_a_thread_failed_is_told_as_it_is(containerd: ContainerdCalls) -> None:
    def work() -> None:
        raise PathNotFound("no cache has it")

    with pytest.raises(PathNotFound, match="no cache has it"):
        await containerd.in_thread(work, lambda: None)
    assert await containerd.in_thread(lambda: 7, lambda: None) == 7


async def test_a_lease_ends_with_its_block_and_at_once_if_that_fails(
    containerd: ContainerdCalls, played: Played
) -> None:
    async with leased(containerd, "mine", 0):
        assert played.asked == ["Leases.Create"]
    with pytest.raises(PathNotFound):
        async with leased(containerd, "mine", 0):
            raise PathNotFound("no cache has it")
    assert played.asked == ["Leases.Create", "Leases.Delete"] * 2


async def test_names_are_as_before_if_the_block_fails(
    containerd: ContainerdCalls, played: Played
) -> None:
    old = images_pb2.Image(name="old", target=Descriptor(digest="sha256:other"))
    played.images["old"] = old
    names = ImageNames(containerd)
    with pytest.raises(PathNotFound):
        async with names.given(["new", "old"], TARGET):
            assert {name: image.target for name, image in played.images.items()} == {
                "new": TARGET,
                "old": TARGET,
            }
            raise PathNotFound("no cache has it")
    assert {name: image.target for name, image in played.images.items()} == {"old": old.target}


async def test_names_that_are_there_are_left_alone(
    containerd: ContainerdCalls, played: Played
) -> None:
    names = ImageNames(containerd)
    async with names.given(["one"], TARGET):
        pass
    with pytest.raises(PathNotFound):
        async with names.given(["one"], TARGET):
            raise PathNotFound("no cache has it")
    assert list(played.images) == ["one"]
    assert dict(played.images["one"].labels) == {"io.cri-containerd.image": "managed"}


async def test_what_cri_knows(containerd: ContainerdCalls, played: Played) -> None:
    names = ImageNames(containerd)
    assert await names.known("one") is None
    played.images["one"] = images_pb2.Image(name="one", target=TARGET)
    known = await names.known("one")
    assert known is not None
    assert known == KnownImage("sha256:id", frozenset({"one"}), "sha256:chain")
    await names.heard("one", "sha256:id")


async def test_without_cri_the_message_says_so(containerd: ContainerdCalls, played: Played) -> None:
    played.refused = "ImageService.ImageStatus"
    with pytest.raises(Unsupported, match="serves no CRI images"):
        await ImageNames(containerd).known("one")


async def test_a_cri_that_hears_of_nothing_is_not_waited_for_for_ever(
    containerd: ContainerdCalls, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    played.deaf = True
    monkeypatch.setattr("fusesnap.services.image_names.HEARD_WITHIN", 0.05)
    with pytest.raises(DeadlineExceeded, match="does not know one"):
        await ImageNames(containerd).heard("one", "sha256:id")
