"""Pods with user namespaces (``hostUsers: false``), as a kubelet starts them: each has ids of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from testbed.binary_cache import HttpCache
from testbed.containerd import cgroup_name
from testbed.containerd_configuration import Release
from testbed.debian import containerd_release, newest_runc
from testbed.images import Layer, write_image
from testbed.registry import Registry
from testbed.synthetic import SimpleClosure

from .conftest import NodeMaker
from .cri import Pod, kubelet, mapping

NixLayers = Callable[..., Layer]
SLEEP = ("/bin/sleep", "1000")


def test_pods_see_files_as_their_own(
    work: Path,
    make_node: NodeMaker,
    cache: HttpCache,
    image_registry: Registry,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    # The pod's own container is of the same image: containerd is told of it before it starts.
    archive = write_image(
        work / "pod.tar", [base_layer, nix_layers()], name="pod:1", command=SLEEP,
        environment={"PATH": "/bin"},
    )  # fmt: skip
    image = image_registry.push(archive, "pod:1")
    release = Release.of(*containerd_release("2").programs, newest_runc())
    node = make_node(cache.url, cri=True, release=release, remap_ids=True, sandbox=image)
    work.chmod(0o711)
    script = f"""
        stat -c %u:%g / /etc/hostname /nix/store {simple.tree}/self {simple.file}
        cat {simple.tree}/self
        awk '{{ print $2 }}' /proc/self/uid_map
        echo new > /new && chmod u+w {simple.file} && echo new > {simple.file}
        stat -c %u:%g /new {simple.file}
    """
    with kubelet(node) as asking, ExitStack() as pods:
        asking.pull(image)
        for name, uid in (("first", 100_000), ("second", 300_000)):
            ids = mapping(uid, uid + 1_000_000)
            pod = Pod(name, f"/{cgroup_name(work / 'c')}", user_namespace=ids)
            identity = pods.enter_context(asking.pod(pod))
            container = asking.start(identity, pod, pod.container(image, SLEEP))
            said = asking.execute(container, "/bin/sh", "-c", script).splitlines()
            own = ["0:0"] * 5
            assert said == [*own, f"this path is {simple.tree}", str(uid), "0:0", "0:0"]
        # Two pods with two containers each, all cold.
        assert len(node.daemon.status()["depend_on_fuse"]) == 4
        assert not cache.requested_nars([simple.large, simple.unused])
    node.containerd.ctr("content", "prune", "references")
    assert not list((node.daemon.state / "idmapped").iterdir())
