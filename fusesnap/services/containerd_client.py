"""What a running containerd says of itself: its version, and which plugins it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from fusesnap.errors import FailedPrecondition, Unavailable
from fusesnap.services.api import (
    cri_images_pb2,
    cri_images_pb2_grpc,
    introspection_pb2,
    introspection_pb2_grpc,
    version_pb2_grpc,
)

ANSWER_WITHIN: Final = 10.0  # seconds; containerd only looks into its memory
# containerd's own limit (its defaults.DefaultMaxRecvMsgSize); gRPC's is 4 MiB.
MAX_MESSAGE_BYTES: Final = 16 << 20
# How long containerd may have been back before we notice, in milliseconds. gRPC would wait for up to two minutes.
LONGEST_BACKOFF: Final = 1000

HINT: Final = "is that containerd's socket, and does it run? See containerd-address in fusesnap's configuration"
SNAPSHOTTER: Final = "io.containerd.snapshotter.v1"
ADDRESS: Final = "address"  # of a proxy plugin, among its exports

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that containerd has loaded; ``error`` is why it cannot be used, empty if it can."""

    type: str
    id: str
    exports: Mapping[str, str]
    capabilities: tuple[str, ...]
    error: str


def open_channel(address: Path) -> grpc.Channel:
    """A channel to the containerd that serves ``address``, now or later; to be used as a context, or closed."""
    return grpc.insecure_channel(
        f"unix:{address.absolute()}",
        [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", LONGEST_BACKOFF // 10),
            ("grpc.max_reconnect_backoff_ms", LONGEST_BACKOFF),
            # A connection of its own, whatever else this process has opened to the same address.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )


def ask_version(address: Path) -> str:
    """The version of the containerd that serves ``address``. Raises ``Unavailable``."""
    return _ask(
        address,
        lambda channel: (
            version_pb2_grpc.VersionStub(channel).Version(Empty(), timeout=ANSWER_WITHIN).version
        ),
    )


def ask_plugins(address: Path) -> tuple[Plugin, ...]:
    """The plugins of the containerd that serves ``address``. Raises ``Unavailable``."""
    question = introspection_pb2.PluginsRequest()
    answer = _ask(
        address,
        lambda channel: introspection_pb2_grpc.IntrospectionStub(channel).Plugins(
            question, timeout=ANSWER_WITHIN
        ),
    )
    return tuple(
        Plugin(
            each.type,
            each.id,
            dict(each.exports),
            tuple(each.capabilities),
            each.init_err.message or "unknown reason" if each.HasField("init_err") else "",
        )
        for each in answer.plugins
    )


def ask_image_file_systems(address: Path) -> tuple[str, ...]:
    """Where the image service (CRI v1) that serves ``address`` says that images are. Raises ``Unavailable``."""
    answer = _ask(
        address,
        lambda channel: cri_images_pb2_grpc.ImageServiceStub(channel).ImageFsInfo(
            cri_images_pb2.ImageFsInfoRequest(), timeout=ANSWER_WITHIN
        ),
    )
    return tuple(each.fs_id.mountpoint for each in answer.image_filesystems)


def find_snapshotter(address: Path, socket: Path, preferred: str) -> str:
    """What the containerd that serves ``address`` calls the snapshotter that serves ``socket``.

    If it has several names, ``preferred`` if that is one of them. Raises ``FailedPrecondition`` where it has none, and
    ``Unavailable``.
    """
    try:
        names = snapshotters_at(ask_plugins(address), socket, preferred)
    except Unavailable as error:
        raise Unavailable(f"{error}: {HINT}") from error
    if not names:
        raise FailedPrecondition(
            f"containerd at {address} has no snapshotter at {socket}: put what"
            " `fusesnap daemon --print-containerd-config` prints into its configuration"
        )
    return preferred if preferred in names else min(names)


def snapshotters_at(plugins: Iterable[Plugin], socket: Path, assumed: str) -> set[str]:
    """What the snapshotter that serves ``socket`` is called. A proxy of containerd 1.6 does not say its address: the
    one of the name ``assumed`` is taken to be it.
    """
    return {
        each.id
        for each in plugins
        if each.type == SNAPSHOTTER
        and (
            _is_at(each.exports[ADDRESS], socket) if ADDRESS in each.exports else each.id == assumed
        )
    }


def _is_at(address: str, socket: Path) -> bool:
    return Path(address.removeprefix("unix://")).resolve() == socket.resolve()


def _ask(address: Path, question: Callable[[grpc.Channel], T]) -> T:
    with grpc.insecure_channel(f"unix:{address.absolute()}") as channel:
        try:
            return question(channel)
        except grpc.RpcError as error:
            raise Unavailable(f"{address}: {error.details()}") from error
