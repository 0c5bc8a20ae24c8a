"""The NAR index: what one NAR holds, and where each chunk of it is in the compressed file; signed.

Source: docs/formats.md, "The NAR index", and ``proto/fusesnap/nix/api/nar_index.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import zstandard
from google.protobuf.message import DecodeError

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.api import nar_index_pb2 as api
from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.nix.compression import unfold
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.hash_parts import Occurrence
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.packed_tree import PackedTree, pack_tree, unpack_tree
from fusesnap.nix.signature import SecretKey, TrustedKeys
from fusesnap.nix.signed_file import SignedFile
from fusesnap.nix.store_path import HASH_PART_LENGTH, StoreDir, StorePath
from fusesnap.nix.tree import Tree

MAGIC: Final = b"NAR-INDEX"
VERSION: Final = 1
# The largest paths of nixpkgs have some 300,000 entries, and 10 GB of NAR have 80,000 chunks: their indexes have less
# than 16 MiB. The file is held in memory before anything is known of it; what it unfolds to, after its signature was
# checked.
MAX_INDEX_SIZE: Final = 64 * 1024 * 1024
MAX_MESSAGE_SIZE: Final = 256 * 1024 * 1024
# Written once and read everywhere.
_LEVEL: Final = 19
_SIGNED: Final = SignedFile("index", MAGIC, VERSION)


@dataclass(frozen=True, slots=True)
class NarIndex:
    """The index of the NAR of ``store_path``, which hashes to ``nar_hash``.

    The tree's entries have the same order, and so the same indices, as those read from the NAR itself.
    """

    store_path: StorePath
    nar_hash: Hash
    tree: Tree
    chunks: ChunkTable
    store_dir: StoreDir

    def check_matches(self, info: NarInfo) -> None:
        """Raise :class:`ContentMismatch` unless it is of the NAR that ``info`` describes.

        A narinfo need not say how large its file is; then there is nothing to contradict.
        """
        pairs = (
            ("store path", self.store_path, info.store_path),
            ("NAR hash", self.nar_hash, info.nar_hash),
            ("NAR size", self.chunks.nar_size, info.nar_size),
            ("file size", self.chunks.file_size, info.file_size or self.chunks.file_size),
        )
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise ContentMismatch(
                    f"index of {info.store_path}: its {what} is {ours}, the narinfo's is {theirs}"
                )

    def to_bytes(self, key: SecretKey) -> bytes:
        """Write it, signed with ``key``."""
        message = _to_message(self).SerializeToString(deterministic=True)
        body = zstandard.ZstdCompressor(level=_LEVEL).compress(message)
        return _SIGNED.sign(body, key) + body


def parse_nar_index(data: bytes, keys: TrustedKeys, store_dir: StoreDir) -> NarIndex:
    """Read an index of a store path in ``store_dir``.

    The signature is checked before anything else is looked at. Raises :class:`UntrustedPath` where none of ``keys``
    has made it, :class:`InvalidData` for everything else.
    """
    if len(data) > MAX_INDEX_SIZE:
        raise InvalidData(f"index has {len(data)} bytes, expected at most {MAX_INDEX_SIZE}")
    message = unfold(_SIGNED.verified(data, keys), MAX_MESSAGE_SIZE, "index")
    try:
        return _from_message(api.NarIndex.FromString(message), store_dir)
    except DecodeError as error:
        raise InvalidData(f"index: not the message that it should be: {error}") from None


def _to_message(index: NarIndex) -> api.NarIndex:
    chunks, tree = index.chunks, pack_tree(index.tree)
    return api.NarIndex(
        store_path=index.store_dir.format(index.store_path),
        nar_hash=index.nar_hash.digest,
        nar_size=chunks.nar_size,
        file_size=chunks.file_size,
        tree=api.Tree(
            kinds=tree.kinds,
            names=tree.names,
            children=tree.children,
            sizes=tree.sizes,
            targets=tree.targets,
        ),
        chunks=api.Chunks(
            nar_sizes=[chunk.size for chunk in chunks],
            file_sizes=[chunk.file_size for chunk in chunks],
            hashes=chunks.digests,
        ),
        hash_parts=api.HashParts(
            hash_parts="".join(chunks.hash_parts).encode(),
            gaps=_gaps(chunks.occurrences),
            which=[found.which for found in chunks.occurrences],
            blanked_hashes=chunks.blanked_digests,
        ),
    )


def _gaps(occurrences: Sequence[Occurrence]) -> Iterator[int]:
    end = 0
    for found in occurrences:
        yield found.position - end
        end = found.end


def _from_message(message: api.NarIndex, store_dir: StoreDir) -> NarIndex:
    path = store_dir.parse(message.store_path)
    try:
        tree, nar_size = unpack_tree(_packed_tree(message.tree))
        chunks = _chunks(message)
        _check_size("tree makes a NAR", nar_size, message.nar_size)
        _check_size("chunks make a NAR", chunks.nar_size, message.nar_size)
        _check_size("chunks make a file", chunks.file_size, message.file_size)
    except InvalidData as error:
        raise InvalidData(f"index of {path}: {error}") from None
    nar_hash = Hash(HashAlgorithm.SHA256, message.nar_hash)
    return NarIndex(path, nar_hash, tree, chunks, store_dir)


def _check_size(what: str, size: int, expected: int) -> None:
    if size != expected:
        raise InvalidData(f"its {what} of {size} bytes, expected {expected}")


def _packed_tree(tree: api.Tree) -> PackedTree:
    return PackedTree(tree.kinds, tree.names, tree.children, tree.sizes, tree.targets)


def _chunks(message: api.NarIndex) -> ChunkTable:
    return ChunkTable(
        message.chunks.nar_sizes,
        message.chunks.file_sizes,
        message.chunks.hashes,
        _hash_parts(message.hash_parts.hash_parts),
        _occurrences(message.hash_parts),
        message.hash_parts.blanked_hashes,
    )


def _hash_parts(data: bytes) -> tuple[str, ...]:
    if len(data) % HASH_PART_LENGTH:
        raise InvalidData(
            f"hash parts have {len(data)} bytes, expected a multiple of {HASH_PART_LENGTH}"
        )
    text = data.decode("latin-1")
    parts = tuple(text[i : i + HASH_PART_LENGTH] for i in range(0, len(text), HASH_PART_LENGTH))
    for part in parts:
        StorePath(part, "x")  # says whether it is one
    return parts


def _occurrences(parts: api.HashParts) -> tuple[Occurrence, ...]:
    if len(parts.gaps) != len(parts.which):
        raise InvalidData(f"{len(parts.gaps)} gaps between {len(parts.which)} hash parts")
    found = []
    end = 0
    for gap, which in zip(parts.gaps, parts.which, strict=True):
        found.append(Occurrence(end + gap, which))
        end = found[-1].end
    return tuple(found)
