"""``fusesnap image build``: an image of store paths, made of what caches say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import Node, open_node, plain_errors
from fusesnap.daemon.image_sources import opened, stop_if_cancelled
from fusesnap.daemon.prefetch import closure_of
from fusesnap.daemon.store_path_names import store_path
from fusesnap.daemon.watching import Watch, draw
from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.fetch.kinds import KindFinder
from fusesnap.fetch.priority import Priority
from fusesnap.images.archive_writer import write_archive, write_layout
from fusesnap.images.base_tree import open_base_tree
from fusesnap.images.build import build
from fusesnap.images.layer import FileKind
from fusesnap.images.links import Links
from fusesnap.images.opening import OpenImage
from fusesnap.images.placeholders import nix_layer_tar, placeholder_kinds
from fusesnap.images.platform import Platform
from fusesnap.images.programs import ProgramFinder, main_program, why_none
from fusesnap.images.run_config import RunConfig, parse_run_config
from fusesnap.nix.closure_labels import STORE_PATHS_FILE, parse_store_paths
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.storage_errors import storage

# What containerd and Docker set where an image says nothing.
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be built. ``paths``, ``copy_to_root``, ``closure_list`` and ``base`` are as people write them.

    ``realise``: take the kinds of paths from verified NARs, which all have to be fetched for that.
    """

    paths: tuple[str, ...]
    run: RunConfig
    platform: Platform
    output: Path
    as_layout: bool = False
    tag: str | None = None
    copy_to_root: tuple[str, ...] = ()
    base: str | None = None
    closure_list: str | None = None
    realise: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """What was built: the manifest's digest, store paths, the size of the Nix layer's blob in bytes, and a remark."""

    digest: str
    paths: int
    layer_size: int
    remark: str | None


async def build_image(settings: Settings, order: Order, watch: Watch) -> Built:
    """Build the image and write it. ``watch`` is told now and then what is being fetched.

    Raises InvalidArgument for an order that cannot be filled, ClosureUnavailable, and what reading a base image raises.
    """
    with plain_errors():
        async with open_node(settings) as node, trio.open_nursery() as drawing:
            drawing.start_soon(draw, node, watch)
            built = await _Builder(node, order).build()
            drawing.cancel_scope.cancel()
            return built
    raise AssertionError("unreachable: a block that raises nothing returned")


class _Builder:
    def __init__(self, node: Node, order: Order) -> None:
        self._node = node
        self._order = order

    async def build(self) -> Built:
        node, order = self._node, self._order
        roots = [await store_path(node, text) for text in order.paths]
        copied = [await store_path(node, text) for text in order.copy_to_root]
        closure = sorted(set(await closure_of(node, [*roots, *copied])))
        closure_list = await self._closure_list(closure)
        if order.realise:
            await self._realise(closure)
        links = Links(frozenset(closure), self._tree, node.store_dir)
        finder = KindFinder(node.store, node.pool, node.realiser, node.link.pay)
        kinds = await placeholder_kinds(await finder.roots(closure), links)
        trees = {path: await self._tree(path) for path in copied}
        async with AsyncExitStack() as stack:
            base = None
            if order.base is not None:
                base = await stack.enter_async_context(opened(node, order.base, order.platform))
            tar = await trio.to_thread.run_sync(self._layer, kinds, trees, base)
            run, remark = await self._run(roots, kinds, base)
            image = build(tar, closure, closure_list, run, order.platform, node.store_dir, base)
            write = write_layout if order.as_layout else write_archive
            await trio.to_thread.run_sync(
                partial(write, image, order.output, order.tag, stop_if_cancelled)
            )
        found = image.image
        return Built(str(found.manifest.digest), len(closure), found.layers[-1].size, remark)

    async def _tree(self, path: StorePath) -> Tree:
        # Nobody reads it: what it refers to is not wanted on its account.
        return await self._node.realiser.realise(path, priority=Priority.PREFETCH)

    def _layer(
        self,
        kinds: Mapping[StorePath, FileKind],
        copied: Mapping[StorePath, Tree],
        base: OpenImage | None,
    ) -> bytes:
        node = self._node
        if base is None or not copied:
            return nix_layer_tar(kinds, copied, node.store_dir)
        with open_base_tree(
            base, "base image", node.store_dir, node.settings.root, stop_if_cancelled
        ) as tree:
            return nix_layer_tar(kinds, copied, node.store_dir, tree)

    async def _realise(self, paths: Sequence[StorePath]) -> None:
        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(self._tree, path)

    async def _closure_list(self, closure: Sequence[StorePath]) -> StorePath | None:
        if self._order.closure_list is None:
            return None
        node = self._node
        path = await store_path(node, self._order.closure_list)
        await self._tree(path)
        file = node.store.location(path) / STORE_PATHS_FILE
        with storage("read", file):
            data = await trio.Path(file).read_bytes()
        listed = parse_store_paths(data, node.store_dir)
        if set(listed) != set(closure):
            differing = sorted(set(listed) ^ set(closure))
            raise InvalidArgument(
                f"{node.store_dir.format(path)} lists {len(listed)} store paths, expected the {len(closure)} of the"
                f" image; {differing[0]} is in one of the two only"
            )
        return path

    async def _run(
        self,
        roots: Sequence[StorePath],
        kinds: Mapping[StorePath, FileKind],
        base: OpenImage | None,
    ) -> tuple[RunConfig, str | None]:
        """How containers start, with what nobody said filled in, and a remark where that could not be."""
        said, below = self._order.run, _base_run(base)
        run = replace(
            said, environment={**self._path(roots, kinds, base, below), **said.environment}
        )
        starts = (said.entrypoint, said.command, below.entrypoint, below.command)
        if any(start is not None for start in starts):
            return run, None
        store_dir = self._node.store_dir
        closure = frozenset(await self._node.realiser.closure(roots[0]))
        finder = ProgramFinder(closure, self._tree, store_dir)
        try:
            programs = await finder.find(roots[0])
        except InvalidData as error:
            return run, f"no entrypoint: {error}"
        program = main_program(roots[0], programs)
        if program is None:
            return run, f"no entrypoint: {why_none(roots[0], programs)}"
        directory = programs.directory
        full = f"{directory}/{program}" if directory else store_dir.format(roots[0])
        return replace(run, entrypoint=(full,)), None

    def _path(
        self,
        roots: Sequence[StorePath],
        kinds: Mapping[StorePath, FileKind],
        base: OpenImage | None,
        below: RunConfig,
    ) -> Mapping[str, str]:
        """``PATH``: the programs of all roots, then those that the rest of the image has."""
        store_dir = self._node.store_dir
        bins = [
            f"{store_dir.format(path)}/bin" for path in roots if kinds[path] is FileKind.DIRECTORY
        ]
        rest = below.environment.get("PATH", DEFAULT_PATH)
        has_rest = base is not None or self._order.copy_to_root
        parts = [*dict.fromkeys(bins), *([rest] if has_rest else [])]
        return {"PATH": ":".join(parts)} if parts else {}


def _base_run(base: OpenImage | None) -> RunConfig:
    if base is None:
        return RunConfig()
    config = base.image.config
    return parse_run_config(config.data, f"config {config.digest} of the base image")
