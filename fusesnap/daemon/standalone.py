"""``fusesnap mount``: one view, one mount, one process."""

from __future__ import annotations

import os
import platform
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.path_source import LocalPathSource
from fusesnap.daemon.readers import identify, is_dying
from fusesnap.daemon.signals import stop_on_signal
from fusesnap.daemon.watching import Watch, draw
from fusesnap.errors import Unsupported
from fusesnap.filesystem.accesses import Accesses, Opened
from fusesnap.filesystem.error_counts import ErrorCounts
from fusesnap.filesystem.image_nodes import ImageNodes
from fusesnap.filesystem.inode import InodeKind
from fusesnap.filesystem.nodes import Nodes
from fusesnap.filesystem.open_files import OpenFiles
from fusesnap.filesystem.operations import Operations
from fusesnap.filesystem.session import mounted
from fusesnap.filesystem.store_nodes import StoreNodes
from fusesnap.filesystem.waiting import WaitingRequests
from fusesnap.fuse_mount import mount_points
from fusesnap.images.digest import Digest
from fusesnap.images.layer import LayerTar
from fusesnap.images.layer_cache import LayerCache
from fusesnap.images.layout import Image, ImageLayout, open_layout
from fusesnap.images.merge import MergeLayer, merge_layers
from fusesnap.images.mountable import open_rootfs
from fusesnap.images.platform import Platform
from fusesnap.images.rootfs import RootFs
from fusesnap.images.source import parse_source
from fusesnap.nix.store_path import HashPart, StorePath
from fusesnap.snapshots.nix_layer import NixLayers

# Each blocked reader occupies a task.
MAX_TASKS = 1024


async def mount_source(
    settings: Settings,
    source: str,
    mountpoint: Path,
    ready: Callable[[], None],
    watch: Watch,
    ended: Callable[[Mapping[str, int]], None] = lambda _: None,
) -> None:
    """Show ``source`` at ``mountpoint`` until SIGTERM, SIGINT, or until somebody unmounts it.

    ``mountpoint`` is as the kernel's list of mounts names it: absolute, without links.
    ``ready`` is called once it is mounted, ``watch`` now and then with what is being fetched, ``ended`` at the end with
    the bytes that came from each cache. Raises ``InvalidConfiguration`` or ``InvalidData`` for a source that is none,
    ``ClosureUnavailable`` where paths of it cannot be had, ``Unsupported`` where FUSE refuses.
    """
    with plain_errors():
        async with open_node(settings) as node, trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, nursery.cancel_scope)
            nursery.start_soon(draw, node, watch)
            rootfs = await open_source(node, source)
            waiting = WaitingRequests(identify, ErrorCounts())
            nursery.start_soon(waiting.release_killed, is_dying)
            accesses = Opened(node.loader.opened)
            shown = serving(node, rootfs, mountpoint, waiting, accesses)
            with telling_bytes(node, ended), rootfs, shown:
                ready()
                await pyfuse3.main(max_tasks=MAX_TASKS)
                if str(mountpoint) in mount_points():
                    # Nobody unmounted it: libfuse gave up, and has said why on stderr.
                    raise Unsupported(f"{mountpoint}: libfuse ended the session by itself")
            nursery.cancel_scope.cancel()


@contextmanager
def telling_bytes(node: Node, ended: Callable[[Mapping[str, int]], None]) -> Iterator[None]:
    """Tell ``ended`` what came from each cache."""
    try:
        yield
    finally:
        ended({state.url: state.bytes_received for state in node.pool.states()})


@contextmanager
def serving(
    node: Node, rootfs: RootFs, mountpoint: Path, waiting: WaitingRequests, accesses: Accesses
) -> Iterator[None]:
    """The mount, with what answers it; ``accesses`` hears what is asked for."""
    open_files = OpenFiles()
    store_nodes = StoreNodes(node.store, node.contents, open_files, waiting, accesses)
    image_nodes = ImageNodes(rootfs, shown_paths(rootfs), store_nodes)
    parts: dict[InodeKind, Nodes] = {
        InodeKind.FIXED: image_nodes,
        InodeKind.IMAGE: image_nodes,
        InodeKind.STORE: store_nodes,
    }
    try:
        # An ordinary user may not let others in unless /etc/fuse.conf says so.
        with mounted(
            str(mountpoint), Operations(parts, node.store.layer), others=os.geteuid() == 0
        ):
            yield
    finally:
        open_files.close()


def shown_paths(rootfs: RootFs) -> frozenset[StorePath]:
    """The store paths whose content shows: of all Nix layers, without those that layers above replaced."""
    stated = {stated.path for layer in rootfs.nix_layers for stated in layer.placeholders}
    return frozenset(stated - rootfs.overridden)


async def open_source(node: Node, source: str) -> RootFs:
    """The tree of ``source``, every store path that it names admitted."""
    if source.startswith(node.store_dir.path + "/"):
        root = node.store_dir.parse(source)
        async with trio.open_nursery() as nursery:  # where there is no bundle it has cost no time
            nursery.start_soon(node.pool.introduce)
            await node.bundles.find_of(HashPart(root.hash_part))
        closure = await node.realiser.closure(root)
        return await trio.to_thread.run_sync(closure_tree, node, closure)
    rootfs = await open_image(node, source)
    paths = shown_paths(rootfs)
    # As long as this is mounted nothing of it is collected.
    await trio.to_thread.run_sync(node.store.roots.keep, paths)
    await node.realiser.admit(paths)
    return rootfs


def closure_tree(node: Node, closure: Sequence[StorePath]) -> RootFs:
    """A tree that has the store directory and nothing else, standing for the paths of ``closure``."""
    descriptor = os.memfd_create("fusesnap")
    with (
        os.fdopen(os.dup(descriptor), "wb") as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        directory = tarfile.TarInfo(node.store_dir.path.strip("/"))
        directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, 1
        tar.addfile(directory)
    nothing = Digest.parse("sha256:" + "0" * 64)  # only messages about a damaged tar name it
    layer = LayerTar(descriptor, nothing, "the closure's tree")
    return merge_layers([MergeLayer(layer, tuple(closure))], node.store_dir)


async def open_image(node: Node, source: str) -> RootFs:
    """The merged layers of an image on disk, with the lists of its Nix layers read."""
    parsed = parse_source(source)
    with open_layout(parsed) as layout:
        image = await trio.to_thread.run_sync(
            layout.image, Platform.of_machine(platform.machine()), parsed.reference
        )
        nix_layers = NixLayers(
            node.store,
            LocalPathSource(node.realiser),
            node.store_dir,
            by_content=node.settings.recognise_by_content,
        )
        stated = {
            layer.position: paths
            for layer in image.layers
            if (paths := await nix_layers.labelled(layer.annotations))
        }
        return await trio.to_thread.run_sync(merge_image, node, layout, image, stated)


def merge_image(
    node: Node, layout: ImageLayout, image: Image, stated: Mapping[int, tuple[StorePath, ...]]
) -> RootFs:
    """Blocking: decompresses the layers that the cache of layers has not got, as long as nobody cancels."""

    def stop_if_cancelled(_: int) -> None:
        trio.from_thread.check_cancelled()

    return open_rootfs(
        layout,
        image,
        LayerCache(node.settings.root / "layers"),
        node.store_dir,
        stated,
        recognise_content=node.settings.recognise_by_content,
        progress=stop_if_cancelled,
    )
