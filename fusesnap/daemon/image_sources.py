"""Images as the commands of ``fusesnap image`` are given them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fusesnap.daemon.build import Node
from fusesnap.daemon.store_path_names import is_in_store, store_path
from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.images.blobs import LayoutArchive, LayoutDirectory, LayoutFiles
from fusesnap.images.documents import MAX_DOCUMENT_SIZE, parse_index
from fusesnap.images.opening import OpenImage, open_image
from fusesnap.images.platform import Platform
from fusesnap.images.reference import parse_reference
from fusesnap.images.store_images import StoreImages
from fusesnap.nix.quoting import quote

# What containerd, nerdctl and we write; the annotation of the specification may be the tag alone.
_FULL_NAME: Final = "io.containerd.image.name"
# As containers-transports(5) calls them. What a file is, it says itself; the words are for those who are used to them.
TRANSPORTS: Final = ("oci", "oci-archive", "docker-archive")


def local_image(text: str) -> tuple[Path, str | None]:
    """Read ``[TRANSPORT:]PATH[:REFERENCE]``; a reference needs a transport before the path. Raises InvalidArgument."""
    transport, _, rest = text.partition(":")
    if transport not in TRANSPORTS:
        return Path(text), None
    path, _, reference = rest.partition(":")
    if not path:
        raise InvalidArgument(f"{quote(text)}: expected a path after '{transport}:'")
    return Path(path), reference or None


def name_of(path: Path) -> str:
    """The full name of the only image in an archive or layout. Raises InvalidArgument where there is none."""
    files: LayoutFiles = (
        LayoutDirectory(path) if path.is_dir() else LayoutArchive(path, scratch=path.parent)
    )
    with files:
        region = files.find("index.json")
        if region is None:
            raise InvalidArgument(f"{path}: says no name for the image: give one")
        with region:
            if region.size > MAX_DOCUMENT_SIZE:
                raise InvalidData(f"{region.name}: expected at most {MAX_DOCUMENT_SIZE} bytes")
            index = parse_index(b"".join(region.pieces()), f"{path}: index.json", None)
    names = {
        name for entry in index.manifests if (name := entry.annotations.get(_FULL_NAME)) is not None
    }
    if len(names) != 1:
        said = f"{len(names)} names" if names else "no name"
        raise InvalidArgument(f"{path}: says {said} for the image: give one")
    return names.pop()


@asynccontextmanager
async def opened(node: Node, text: str, platform: Platform) -> AsyncIterator[OpenImage]:
    """Open the image that ``text`` names: a store path, a reference to one, an archive or a layout.

    Raises what opening raises.
    """
    if is_in_store(node, text):
        images = StoreImages(node.store, node.realiser, platform, node.settings.root)
        reference = parse_reference(text, node.store_dir)
        path = await store_path(node, text)
        async with images.open(path, reference.digest if reference else None) as image:
            yield image
        return
    path_on_disk, name = local_image(text)
    found = open_image(
        path_on_disk,
        str(path_on_disk),
        platform,
        node.settings.root,
        reference=name,
        follow=True,
        progress=stop_if_cancelled,
    )
    with ExitStack() as stack:
        yield await trio.to_thread.run_sync(partial(stack.enter_context, found))


def stop_if_cancelled(_: int) -> None:
    """For work in threads: raises where the task that waits for it was cancelled."""
    trio.from_thread.check_cancelled()
