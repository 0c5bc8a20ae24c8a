"""The few calls of Kubernetes' CRI that tests make, without its protocol files."""

from __future__ import annotations

import grpc

from .conftest import Node


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protobuf message (protobuf.dev, "Encoding")."""
    length = len(value)
    size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
    return bytes([number << 3 | 2]) + size + value


def cri_pull(node: Node, reference: str) -> None:
    """runtime.v1.ImageService/PullImage with ``image`` (1) as ImageSpec, whose ``image`` (1) is the reference."""
    with grpc.insecure_channel(f"unix:{node.containerd.address}") as channel:
        pull = channel.unary_unary("/runtime.v1.ImageService/PullImage", bytes, bytes)
        pull(field(1, field(1, reference.encode())), timeout=60)
