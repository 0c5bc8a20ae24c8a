"""Calls of a kubelet (CRI), in messages written by hand: the numbers of the fields are those of
``k8s.io/cri-api/pkg/apis/runtime/v1/api.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from .conftest import Node


def varint(value: int) -> bytes:
    """A number as protobuf has it (protobuf.dev, "Encoding")."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: bytes | str | int) -> bytes:
    """A field of a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(message: bytes) -> dict[int, bytes]:
    """What is in a message of strings, messages and small numbers; of a number the empty string."""
    found = {}
    while message:
        tag, message = _number(message)
        length, message = _number(message)
        if tag & 7 == 0:
            length = 0
        found[tag >> 3], message = message[:length], message[length:]
    return found


def _number(message: bytes) -> tuple[int, bytes]:
    size = next(at for at, byte in enumerate(message, 1) if byte < 128)
    return sum((byte & 127) << (7 * at) for at, byte in enumerate(message[:size])), message[size:]


class Kubelet:
    """The calls of a kubelet. Messages are given as they are encoded."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def pull(self, reference: str) -> None:
        """PullImage: image (1) is an ImageSpec, whose image (1) is the reference."""
        self._call("ImageService/PullImage", field(1, field(1, reference)))

    @contextmanager
    def pod(self, config: bytes) -> Iterator[bytes]:
        """Run a pod without containers for the time of the context; gives its identity."""
        pod = self._call("RuntimeService/RunPodSandbox", field(1, config))[1]
        try:
            yield pod
        finally:
            self._call("RuntimeService/StopPodSandbox", field(1, pod))
            self._call("RuntimeService/RemovePodSandbox", field(1, pod))

    def start(self, pod: bytes, pod_config: bytes, config: bytes) -> bytes:
        """Start a container in a pod; returns its identity."""
        request = field(1, pod) + field(2, config) + field(3, pod_config)
        container = self._call("RuntimeService/CreateContainer", request)[1]
        self._call("RuntimeService/StartContainer", field(1, container))
        return container

    def execute(self, container: bytes, *argv: str) -> str:
        """ExecSync; returns what the program prints. Its stderr (2) must be empty."""
        request = field(1, container) + b"".join(field(2, word) for word in argv)
        said = self._call("RuntimeService/ExecSync", request)
        assert not said.get(2), said
        return said[1].decode()

    def _call(self, name: str, request: bytes) -> dict[int, bytes]:
        call = self._channel.unary_unary(f"/runtime.v1.{name}", bytes, bytes)
        return fields(call(request, timeout=120))


def cri_pull(node: Node, reference: str) -> None:
    """Have an image pulled as a kubelet does."""
    with grpc.insecure_channel(f"unix:{node.containerd.address}") as channel:
        Kubelet(channel).pull(reference)


def mapping(uid: int, gid: int) -> bytes:
    """UserNamespace: uids (2) and gids (3), each an IDMapping with host_id (1), container_id (2), length (3)."""
    uids, gids = (field(1, host) + field(2, 0) + field(3, 65536) for host in (uid, gid))
    return field(2, uids) + field(3, gids)


def pod_config(name: str, cgroup: str, user_namespace: bytes) -> bytes:
    """PodSandboxConfig: metadata (1), linux (8), whose cgroup_parent (1) and security_context (2) are given.

    ``user_namespace`` is userns_options (5) of the latter's namespace_options (1).
    """
    metadata = field(1, name) + field(2, f"uid-{name}") + field(3, "default")
    linux = field(1, cgroup) + field(2, field(1, field(5, user_namespace)))
    return field(1, metadata) + field(8, linux)


def container_config(reference: str, user_namespace: bytes, *command: str) -> bytes:
    """ContainerConfig: metadata (1), image (2), command (3), linux (15) with security_context (2)."""
    words = b"".join(field(3, word) for word in command)
    linux = field(2, field(3, field(5, user_namespace)))  # namespace_options is 3 here
    return field(1, field(1, "one")) + field(2, field(1, reference)) + words + field(15, linux)
