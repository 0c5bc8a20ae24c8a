"""The calls of a kubelet (CRI), with its deadlines: ``pkg/kubelet/cri-client`` of Kubernetes.

It has an endpoint for images and one for pods, which may be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from fusesnap.services.api import cri_images_pb2, cri_images_pb2_grpc, cri_runtime_pb2_grpc
from fusesnap.services.api.cri_images_pb2 import Image, ImageSpec
from fusesnap.services.api.cri_runtime_pb2 import (
    ContainerConfig,
    ContainerMetadata,
    ContainerStatus,
    ContainerStatusRequest,
    CreateContainerRequest,
    ExecSyncRequest,
    IDMapping,
    LinuxContainerConfig,
    LinuxContainerSecurityContext,
    LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext,
    NamespaceOption,
    PodSandboxConfig,
    PodSandboxMetadata,
    RemoveContainerRequest,
    RemovePodSandboxRequest,
    RunPodSandboxRequest,
    StartContainerRequest,
    StopContainerRequest,
    StopPodSandboxRequest,
    UserNamespace,
)

from .conftest import Node

# Seconds. A kubelet gives a call --runtime-request-timeout, two minutes, and a new pod twice as much. A pull has no
# deadline there; here it has one so that no test waits for ever.
REQUEST: Final = 120.0
NEW_POD: Final = 2 * REQUEST
PULL: Final = 300.0


@dataclass(frozen=True, slots=True)
class Pod:
    """What a kubelet is told of a pod. ``cgroup`` is where its cgroups are; ``logs`` a directory for output."""

    name: str
    cgroup: str
    logs: Path | None = None
    user_namespace: UserNamespace | None = None

    @property
    def config(self) -> PodSandboxConfig:
        options = NamespaceOption(userns_options=self.user_namespace)
        return PodSandboxConfig(
            metadata=PodSandboxMetadata(
                name=self.name, uid=f"uid-{self.name}", namespace="default"
            ),
            log_directory=str(self.logs or ""),
            linux=LinuxPodSandboxConfig(
                cgroup_parent=self.cgroup,
                security_context=LinuxSandboxSecurityContext(namespace_options=options),
            ),
        )

    def container(
        self, image: str, command: Sequence[str] = (), args: Sequence[str] = ()
    ) -> ContainerConfig:
        """A container of this pod. ``image`` is an image's id or reference, as the kubelet gives it to the runtime."""
        options = NamespaceOption(userns_options=self.user_namespace)
        return ContainerConfig(
            metadata=ContainerMetadata(name="one"),
            image=ImageSpec(image=image),
            command=command,
            args=args,
            log_path="one.log" if self.logs else "",
            linux=LinuxContainerConfig(
                security_context=LinuxContainerSecurityContext(namespace_options=options)
            ),
        )


def mapping(uid: int, gid: int) -> UserNamespace:
    """A user namespace of 65,536 ids that begin at these of the host."""
    ids = [IDMapping(host_id=host, length=65536) for host in (uid, gid)]
    return UserNamespace(uids=ids[:1], gids=ids[1:])


class Kubelet:
    """The calls of a kubelet, on a channel for images and one for pods."""

    def __init__(self, images: grpc.Channel, pods: grpc.Channel) -> None:
        self._images = cri_images_pb2_grpc.ImageServiceStub(images)
        self._pods = cri_runtime_pb2_grpc.RuntimeServiceStub(pods)

    def image(self, reference: str) -> Image | None:
        """What is known of an image, if it is there."""
        request = cri_images_pb2.ImageStatusRequest(image=ImageSpec(image=reference))
        answer = self._images.ImageStatus(request, timeout=REQUEST)
        return answer.image if answer.HasField("image") else None

    def images(self) -> dict[str, Image]:
        """All images by their ids."""
        answer = self._images.ListImages(cri_images_pb2.ListImagesRequest(), timeout=REQUEST)
        return {image.id: image for image in answer.images}

    def pull(self, reference: str) -> str:
        """Pull an image; returns its id."""
        request = cri_images_pb2.PullImageRequest(image=ImageSpec(image=reference))
        return self._images.PullImage(request, timeout=PULL).image_ref

    def begin_pull(self, reference: str) -> grpc.Future[cri_images_pb2.PullImageResponse]:
        """Pull an image without waiting."""
        request = cri_images_pb2.PullImageRequest(image=ImageSpec(image=reference))
        return self._images.PullImage.future(request, timeout=PULL)

    def remove_image(self, image: str) -> None:
        """Remove an image by its id or reference."""
        request = cri_images_pb2.RemoveImageRequest(image=ImageSpec(image=image))
        self._images.RemoveImage(request, timeout=REQUEST)

    def image_file_systems(self) -> list[str]:
        """Where images are."""
        answer = self._images.ImageFsInfo(cri_images_pb2.ImageFsInfoRequest(), timeout=REQUEST)
        return [each.fs_id.mountpoint for each in answer.image_filesystems]

    @contextmanager
    def pod(self, pod: Pod) -> Iterator[str]:
        """Run a pod without containers for the time of the context; gives its identity."""
        request = RunPodSandboxRequest(config=pod.config)
        identity = self._pods.RunPodSandbox(request, timeout=NEW_POD).pod_sandbox_id
        try:
            yield identity
        finally:
            stop = StopPodSandboxRequest(pod_sandbox_id=identity)
            self._pods.StopPodSandbox(stop, timeout=REQUEST)
            remove = RemovePodSandboxRequest(pod_sandbox_id=identity)
            self._pods.RemovePodSandbox(remove, timeout=REQUEST)

    def start(self, identity: str, pod: Pod, config: ContainerConfig) -> str:
        """Start a container in a pod; returns its identity."""
        request = CreateContainerRequest(
            pod_sandbox_id=identity, config=config, sandbox_config=pod.config
        )
        container = self._pods.CreateContainer(request, timeout=REQUEST).container_id
        start = StartContainerRequest(container_id=container)
        self._pods.StartContainer(start, timeout=REQUEST)
        return container

    def status(self, container: str) -> ContainerStatus:
        """How a container is."""
        request = ContainerStatusRequest(container_id=container)
        return self._pods.ContainerStatus(request, timeout=REQUEST).status

    def execute(self, container: str, *argv: str) -> str:
        """Run a program in a container; returns what it prints. Nothing may go wrong with it."""
        request = ExecSyncRequest(container_id=container, cmd=argv, timeout=60)
        said = self._pods.ExecSync(request, timeout=60 + REQUEST)
        assert (said.exit_code, said.stderr) == (0, b""), said
        return said.stdout.decode()

    def stop(self, container: str) -> None:
        """End a container's program, after a second by force."""
        request = StopContainerRequest(container_id=container, timeout=1)
        self._pods.StopContainer(request, timeout=1 + REQUEST)

    def remove(self, container: str) -> None:
        """Remove a container."""
        request = RemoveContainerRequest(container_id=container)
        self._pods.RemoveContainer(request, timeout=REQUEST)


@contextmanager
def kubelet(node: Node, *, images: Path | None = None) -> Iterator[Kubelet]:
    """The kubelet of a node. ``images`` is its image endpoint; containerd's unless given."""
    with ExitStack() as channels:
        pods = channels.enter_context(grpc.insecure_channel(f"unix:{node.containerd.address}"))
        if images is None:
            yield Kubelet(pods, pods)
        else:
            yield Kubelet(channels.enter_context(grpc.insecure_channel(f"unix:{images}")), pods)


def cri_pull(node: Node, reference: str) -> None:
    """Have an image pulled as a kubelet does."""
    node.containerd.cri_pull(reference, timeout=PULL)
