"""The pull of an image as a kubelet has it done."""

from __future__ import annotations

from pathlib import Path

import grpc

from fusesnap.services.api.cri_images_pb2 import ImageSpec, PullImageRequest
from fusesnap.services.api.cri_images_pb2_grpc import ImageServiceStub


def cri_pull(address: Path, reference: str, *, timeout: float) -> str:
    """Pull over the CRI image service at the socket ``address``; returns the image's id. ``timeout`` in seconds."""
    request = PullImageRequest(image=ImageSpec(image=reference))
    with grpc.insecure_channel(f"unix:{address}") as channel:
        return ImageServiceStub(channel).PullImage(request, timeout=timeout).image_ref
