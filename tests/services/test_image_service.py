"""The image service in front of a containerd that is played: what is handed on, and what is not."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import trio

from fusesnap.errors import InvalidArgument, PathNotFound
from fusesnap.services import image_service as module
from fusesnap.services.api.cri_images_pb2 import (
    ImageSpec,
    ImageStatusRequest,
    PullImageRequest,
    PullImageResponse,
    RemoveImageRequest,
)
from fusesnap.services.containerd_client import open_channel
from fusesnap.services.image_service import image_service
from fusesnap.services.server import serve
from fusesnap.snapshots.interface import Snapshots

T = TypeVar("T")
SERVICE = "/runtime.v1.ImageService"


class Played(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic for mypy alone
    """containerd's own service. It answers every call with its request, twice where the method is a stream's."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.metadata: dict[str, str | bytes] = {}
        self.remaining: float | None = None
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.gate: threading.Event | None = None
        self.waiting = threading.Event()
        self.left = threading.Event()

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = handler_call_details.method

        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.asked.append((method, request))
            self.metadata = dict(context.invocation_metadata())
            self.remaining = context.time_remaining()
            context.add_callback(self.left.set)
            self.waiting.set()
            if self.gate is not None:
                self.gate.wait(60)
            context.send_initial_metadata((("early", "bird"),))
            context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05"),))
            if self.refusal is not None:
                context.abort(*self.refusal)
            yield request
            if "Stream" in method:
                yield request

        return grpc.unary_stream_rpc_method_handler(answer)


class Images:
    """What is in no registry: everything that begins with ``nix:0/``."""

    def __init__(self) -> None:
        self.pulled: list[str] = []
        self.others = 0  # pulls that were begun of what is not ours
        self.error: Exception | None = None
        self.gate: trio.Event | None = None
        self.waiting = trio.Event()
        self.cancelled = trio.Event()

    def name(self, reference: str) -> str | None:
        if reference == "nix:0/wrong":
            raise InvalidArgument("expected a store path")
        return f"{reference.lower()}:latest" if reference.startswith("nix:0/") else None

    async def pull_begins(self) -> None:
        self.others += 1

    async def pull(self, reference: str) -> str:
        self.pulled.append(reference)
        if self.gate is not None:
            self.waiting.set()
            try:
                await self.gate.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise
        if self.error is not None:
            raise self.error
        return "sha256:made"


class Kubelet:
    """Calls from threads, as the bytes that go over the socket."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    def method(self, name: str) -> Any:
        return self.channel.unary_unary(name if "/" in name else f"{SERVICE}/{name}", None, None)

    async def call(self, name: str, request: bytes = b"", **options: Any) -> bytes:
        return await self._run(lambda: bytes(self.method(name)(request, **options)))

    async def fail(self, name: str, request: bytes = b"", **options: Any) -> Any:
        def run() -> grpc.RpcError:
            with pytest.raises(grpc.RpcError) as caught:
                self.method(name)(request, **options)
            return caught.value

        return await self._run(run)

    @staticmethod
    async def _run(call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call)


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Played]:
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        played = Played()
        server.add_generic_rpc_handlers((played,))
        server.add_insecure_port(f"unix:{tmp_path}/containerd.sock")
        server.start()
        yield played
        if played.gate is not None:
            played.gate.set()
        server.stop(None).wait()


@pytest.fixture
async def kubelet(
    tmp_path: Path, nursery: trio.Nursery, snapshotter: Snapshots, images: Images
) -> AsyncIterator[Kubelet]:
    scope = trio.CancelScope()
    stopped = trio.Event()
    with open_channel(tmp_path / "containerd.sock") as channel:
        also = [image_service(images, channel, images.pull_begins)]

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await serve(
                    snapshotter, tmp_path / "socket", also=also, grace=0, task_status=task_status
                )
            stopped.set()

        await nursery.start(run)
        with grpc.insecure_channel(f"unix:{tmp_path}/socket") as own:
            yield Kubelet(own)
        scope.cancel()
        await stopped.wait()


def pull(reference: str) -> bytes:
    return PullImageRequest(image=ImageSpec(image=reference)).SerializeToString()


UNKNOWN_FIELD = b"\xfa\x7f\x05later"  # field 2047


async def test_other_calls_are_handed_on_to_the_byte(kubelet: Kubelet, containerd: Played) -> None:
    requests = {
        "ListImages": UNKNOWN_FIELD,
        "ImageFsInfo": b"",
        "PullImage": pull("registry.example.org/redis:7") + UNKNOWN_FIELD,
        "ImageStatus": pull("registry.example.org/redis:7") + UNKNOWN_FIELD,
        "RemoveImage": b"no message at all",
        "NotInventedYet": b"\x00",
    }
    for name, request in requests.items():
        assert await kubelet.call(name, request) == request
    assert containerd.asked == [(f"{SERVICE}/{name}", said) for name, said in requests.items()]


async def test_streams_are_handed_on(kubelet: Kubelet, containerd: Played) -> None:
    def ask() -> list[bytes]:
        stream = kubelet.channel.unary_stream(f"{SERVICE}/StreamImages", None, None)
        return list(stream(b"filter"))

    assert await trio.to_thread.run_sync(ask) == [b"filter", b"filter"]


async def test_metadata_and_deadline_go_along(kubelet: Kubelet, containerd: Played) -> None:
    def ask() -> tuple[Any, Any]:
        metadata = (("traceparent", "00-1"), ("key-bin", b"\xff"))
        _, call = kubelet.method("ListImages").with_call(b"", metadata=metadata, timeout=1000)
        return call.initial_metadata(), call.trailing_metadata()

    initial, trailing = await trio.to_thread.run_sync(ask)
    assert ("early", "bird") in initial
    assert ("grpc-status-details-bin", b"\x08\x05") in trailing
    assert containerd.metadata["traceparent"] == "00-1"
    assert containerd.metadata["key-bin"] == b"\xff"
    assert containerd.remaining is not None
    assert 900 < containerd.remaining < 1100  # gRPC rounds it


async def test_what_containerd_refuses_is_refused_in_its_words(
    kubelet: Kubelet, containerd: Played
) -> None:
    containerd.refusal = grpc.StatusCode.NOT_FOUND, "no such image ✗"
    error = await kubelet.fail("PullImage", pull("registry.example.org/redis:7"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "no such image ✗"
    assert ("grpc-status-details-bin", b"\x08\x05") in error.trailing_metadata()


async def test_a_client_that_goes_away_ends_its_call_to_containerd(
    kubelet: Kubelet, containerd: Played
) -> None:
    containerd.gate = threading.Event()
    call = kubelet.method("PullImage").future(pull("registry.example.org/redis:7"))
    assert await trio.to_thread.run_sync(containerd.waiting.wait, 60)
    call.cancel()
    assert await trio.to_thread.run_sync(containerd.left.wait, 60)


async def test_without_containerd_the_message_says_where_it_was_looked_for(
    kubelet: Kubelet, tmp_path: Path
) -> None:
    error = await kubelet.fail("ListImages")
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert f"{tmp_path}/containerd.sock" in error.details()
    assert "See containerd-address" in error.details()


async def test_an_image_of_nix_is_pulled_here(
    kubelet: Kubelet, containerd: Played, images: Images
) -> None:
    answer = await kubelet.call("PullImage", pull("nix:0/Path") + UNKNOWN_FIELD)
    assert PullImageResponse.FromString(answer).image_ref == "sha256:made"
    assert images.pulled == ["nix:0/Path"]
    assert not containerd.asked


async def test_a_pull_that_is_handed_on_is_told_before(
    kubelet: Kubelet, containerd: Played, images: Images
) -> None:
    for reference, others in (("nix:0/image", 0), ("docker.io/redis", 1)):
        await kubelet.call("PullImage", pull(reference))
        assert images.others == others
    await kubelet.call("ListImages", b"")
    assert images.others == 1
    assert [method for method, _ in containerd.asked] == [
        f"{SERVICE}/PullImage",
        f"{SERVICE}/ListImages",
    ]


async def test_elsewhere_it_has_the_name_that_containerd_knows(
    kubelet: Kubelet, containerd: Played
) -> None:
    spec = ImageSpec(image="nix:0/Path", annotations={"a": "b"})
    status = ImageStatusRequest(image=spec, verbose=True).SerializeToString() + UNKNOWN_FIELD
    await kubelet.call("ImageStatus", status)
    removal = RemoveImageRequest(image=spec).SerializeToString()
    await kubelet.call("RemoveImage", removal)
    spec.image = "nix:0/path:latest"
    handed_on = [request for _, request in containerd.asked]
    expected = ImageStatusRequest(image=spec, verbose=True).SerializeToString() + UNKNOWN_FIELD
    assert handed_on == [expected, RemoveImageRequest(image=spec).SerializeToString()]


@pytest.mark.parametrize("call", ["PullImage", "ImageStatus", "RemoveImage"])
async def test_a_reference_that_is_wrong_is_said_to_be(
    kubelet: Kubelet, containerd: Played, call: str
) -> None:
    error = await kubelet.fail(call, pull("nix:0/wrong"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "expected a store path"
    assert not containerd.asked


async def test_why_an_image_cannot_be_had_is_the_status(kubelet: Kubelet, images: Images) -> None:
    images.error = PathNotFound("no cache has it")
    error = await kubelet.fail("PullImage", pull("nix:0/path"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "no cache has it"


async def test_a_client_that_goes_away_ends_its_pull(kubelet: Kubelet, images: Images) -> None:
    images.gate = trio.Event()
    call = kubelet.method("PullImage").future(pull("nix:0/path"))
    await images.waiting.wait()
    call.cancel()
    await images.cancelled.wait()


async def test_image_calls_leave_threads_for_snapshots(
    kubelet: Kubelet, containerd: Played
) -> None:
    """What a pull waits for may be a snapshot that is prepared on the same socket."""
    containerd.gate = threading.Event()
    calls = [kubelet.method("ListImages").future(b"") for _ in range(module.CONCURRENT_CALLS + 1)]
    ended = threading.Semaphore(0)
    for each in calls:
        each.add_done_callback(lambda _: ended.release())
    assert await trio.to_thread.run_sync(ended.acquire)
    (refused,) = [each for each in calls if each.done()]
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    containerd.gate.set()
    for _ in calls[1:]:
        await trio.to_thread.run_sync(ended.acquire)
    assert await kubelet.call("ListImages", b"again") == b"again"


async def test_the_version_before_is_refused_with_the_reason(kubelet: Kubelet) -> None:
    error = await kubelet.fail("/runtime.v1alpha2.ImageService/ListImages")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "fusesnap serves runtime.v1.ImageService" in error.details()
    error = await kubelet.fail("/runtime.v1.RuntimeService/Version")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
