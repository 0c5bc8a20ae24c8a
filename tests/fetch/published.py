"""Store paths on a cache in memory as ``fusesnap publish`` writes them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fusesnap.nix.chunk_table import Chunk
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.nar import NarEnd, nar_bytes
from fusesnap.nix.nar_index import NarIndex
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import SecretKey
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.publish.packing import Compressor, Packer
from fusesnap.substituter.memory import MemorySubstituter

from ..store.conftest import Tree, make_path, tree_events
from ..substituter.samples import KEY

CHUNK = 4096


@dataclass(frozen=True)
class PublishedPath:
    """What a cache has of one path."""

    info: NarInfo
    nar: bytes
    file: bytes
    index: NarIndex
    index_name: str

    @property
    def path(self) -> StorePath:
        return self.info.store_path

    def chunk_of(self, name: bytes, offset: int = 0) -> Chunk:
        """The chunk that holds byte ``offset`` of the file called ``name``."""
        entry = next(e for e in self.index.tree.entries if e.name == name)
        start = entry.offset + offset
        return self.index.chunks[self.index.chunks.covering(start, start + 1)[0]]


def published(
    name: str,
    tree: Tree,
    references: Iterable[str] = (),
    *,
    key: SecretKey = KEY,
    store_path: StorePath | None = None,
) -> PublishedPath:
    """A path as it is published; its narinfo is signed by KEY, its index by ``key``.

    ``store_path`` is what it is called, if it is not called ``name``.
    """
    plain, _ = make_path(name, tree, references)
    plain = replace(plain, store_path=store_path or plain.store_path)
    nar = b"".join(nar_bytes([*tree_events(tree), NarEnd()]))
    file = io.BytesIO()
    with ThreadPoolExecutor(1) as executor:
        packer = Packer(executor, Compressor(3), CHUNK)
        named = [plain.store_path, *plain.references]
        packed = packer.pack([nar], [path.hash_part for path in named], file)
    index = NarIndex(plain.store_path, packed.nar_hash, packed.tree, packed.chunks, StoreDir())
    info = replace(
        plain,
        url=f"nar/{name}.nar.zst",
        compression="zstd",
        file_hash=packed.file_hash,
        file_size=packed.file_size,
    )
    signed = replace(info, signatures=(KEY.sign(info.fingerprint()),))
    index_name = f"nar/{name}.narindex"
    reference = IndexReference(index_name, len(index.to_bytes(key)), key.name)
    return PublishedPath(reference.added_to(signed), nar, file.getvalue(), index, index_name)


def put(cache: MemorySubstituter, path: PublishedPath, *, key: SecretKey = KEY) -> PublishedPath:
    """Publish ``path`` on ``cache``."""
    cache.publish(path.info, path.file)
    cache.files[path.index_name] = path.index.to_bytes(key)
    return path
